"""Where a run prints: to the terminal and its log at once, or to a log whose disk may fill up."""

import contextlib
import errno
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pipeline import records
from slurm.record.printable import last_form


def print_any_letter() -> None:
    """Letters that the terminal's or the log's encoding lacks are printed as `\\u0107` from now on, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class TerminalAndLog(io.TextIOBase):
    """Writes to a terminal and, line by line, to a log; of a line that was rewritten in place the log gets the last form."""

    def __init__(self, terminal: TextIO, log: io.TextIOBase | TextIO) -> None:
        self._terminal = terminal
        self._log = log
        self._line = ""

    def write(self, text: str) -> int:
        """Writes `text` to both."""
        self._terminal.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._log.write(last_form(line) + "\n")
        self._line = last_form(self._line)
        self._log.flush()
        return len(text)

    def flush(self) -> None:
        """Flushes both."""
        self._terminal.flush()

    def isatty(self) -> bool:
        """As the terminal says: progress is rewritten in place there."""
        return self._terminal.isatty()

    def fileno(self) -> int:
        """The terminal's."""
        return self._terminal.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The terminal's."""
        return self._terminal.encoding or "utf-8"


class OutputThatMayBeLost(io.TextIOBase):
    """Writes to `output` as long as its disk takes it: a full disk costs log lines, not the run that prints them.

    Once there is room again, a line says how many writes were lost.
    """

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._num_lost = 0

    def write(self, text: str) -> int:
        """Writes `text`, or counts it as lost."""
        try:
            if self._num_lost:
                self._output.write(f"\n[the log's disk was full: {self._num_lost} writes lost]\n")
                self._num_lost = 0
            self._output.write(text)
            self._output.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._num_lost += 1
        return len(text)

    def fileno(self) -> int:
        """The output's."""
        return self._output.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The output's."""
        return self._output.encoding or "utf-8"


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """While the block runs, what is printed to stdout and stderr goes to the log at `path` too, as far as its disk has room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a buffer: what did not fit would be tried again at the end, and fail there.
    with io.TextIOWrapper(records.open_to_append(path), encoding="utf-8", write_through=True) as file:
        log = OutputThatMayBeLost(file)
        with contextlib.redirect_stdout(TerminalAndLog(sys.stdout, log)), contextlib.redirect_stderr(TerminalAndLog(sys.stderr, log)):
            yield
