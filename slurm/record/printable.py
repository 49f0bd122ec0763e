"""What commands print of text that others wrote: logs, notes, names of files, lines of documents. A terminal obeys what is in it.

`print` here takes the place of Python's in every module whose words a person reads on a terminal (a test looks that it does), and
what rich prints goes through `printable` first. The same holds for a pipe: `crosscoder logs RUN | less -R` is a terminal too. Who
wants the very bytes of a log reads its file, in `log/` of the run directory.
"""

import builtins
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

# Whole escape sequences (CSI with what it sets, OSC and other strings with their text, single letters), of 7 bits and of 8.
_SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)"
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x1b\x9c\n]*(?:\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
# Letters that turn the writing direction are no control bytes, but show a line as another one.
_TURNS = "\u202a-\u202e\u2066-\u2069"
_CONTROLS = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_TURNS}]")
_CONTROLS_OR_BREAKS = re.compile(f"[\x00-\x1f\x7f-\x9f{_TURNS}]")
_UNESCAPED_IN_JSON = re.compile(f"[\x7f-\x9f{_TURNS}]")


def printable(text: str) -> str:
    """`text` without escape sequences, any other control character but line breaks and tabs as `\\x07`."""
    return _CONTROLS.sub(_escaped, _SEQUENCES.sub("", text))


def printable_line(text: str) -> str:
    """As `printable`, for what is one line: a break in it is escaped as well."""
    return _CONTROLS_OR_BREAKS.sub(_escaped, _SEQUENCES.sub("", text))


def printable_json(text: str) -> str:
    """JSON `text` with the control characters escaped that JSON itself lets stand in strings."""
    return _UNESCAPED_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def printable_log(text: str) -> str:
    """As `printable`, for what a job printed; of a line that was rewritten in place, by `\\r`, the last form."""
    return printable("\n".join(map(last_form, text.split("\n"))))


def last_form(line: str) -> str:
    """What stands on the terminal after a line that rewrote itself."""
    return line.rstrip("\r").rpartition("\r")[2].replace("\x1b[2K", "")


def print(*values: object, **options: Any) -> None:
    """Python's `print`, of what is `printable`."""
    builtins.print(*(printable(str(value)) for value in values), **options)


def cleaned(line: "str | Text") -> "Text":
    """One line for rich to print: in its own colors, with nothing in it that a terminal would obey."""
    from rich.text import Text

    if isinstance(line, str):
        return Text(printable_line(line))
    clean = printable_line(line.plain)
    return line if clean == line.plain else Text(clean, style=line.style)


def _escaped(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
