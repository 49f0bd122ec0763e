"""What a file of text is by its first bytes: JSON lines as its name says, or something else, named with what to do about it.

The submission and the stage both ask `faults_of`, the submission for the field of the text too. What can't be told from the beginning is
left to the stage, which counts every line.
"""

import codecs
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import text_fields
from pipeline.config.errors import UserError
from pipeline.config.text_files import FOREIGN, READ_BYTES, Source, TextFile

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MOST_FAULTS = 5
MOST_TEXT_BYTES = 1 << 20


class Kind(NamedTuple):
    """Something other than JSON lines."""

    magic: bytes
    """A regular expression for the file's first bytes."""
    name: str
    advice: str
    """`{cat}` stands for the command that prints the file, `{file}` for its name, `{stem}` for that without endings."""


class Packing(NamedTuple):
    """A compression that the stage reads."""

    ending: str
    name: str
    magic: bytes
    """A regular expression for the file's first bytes."""
    empty_bytes: int
    """Of an empty text, at the least."""


PACKINGS = (
    Packing(".gz", "gzip", rb"\x1f\x8b", 20),
    Packing(".zst", "zstandard", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", 9),
)
PACK = "unpack it: `{unpack} {file} > {stem}.jsonl`, or pack it as gzip or zstandard"
AS_LINES = "write a JSON object a line"
PACKED = (
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2", "bzcat"),
    (rb"\xfd7zXZ\0", "xz", "xzcat"),
    (rb"\x5d\0\0.{2}", "lzma", "xzcat"),
    (rb"\x04\x22\x4d\x18", "lz4", "lz4cat"),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "zip", "unzip -p"),
    (rb"7z\xbc\xaf\x27\x1c", "7-Zip", "7z x -so"),
)
OBJECT_OVER_LINES = Kind(rb"\s*\{\s*\n", "JSON over several lines", f"{AS_LINES}: `{{cat}} | jq -c . > {{stem}}-lines.jsonl`")
KINDS = (
    *(Kind(magic, name, PACK.replace("{unpack}", unpack)) for magic, name, unpack in PACKED),
    *(Kind(packing.magic, packing.name, "it was packed twice; unpack it once") for packing in PACKINGS),
    Kind(rb"Rar!\x1a\x07", "RAR", "unpack it, and name what was in it"),
    Kind(rb".{257}ustar", "a tar archive", "unpack it with `tar -xf {file}`, and name the files that were in it"),
    Kind(rb"PAR1", "Parquet", f"{AS_LINES}, as pandas does: read_parquet(...).to_json('{{stem}}.jsonl', orient='records', lines=True)"),
    Kind(rb"ARROW1|\xff\xff\xff\xff.{2}\0\0", "Arrow", f"{AS_LINES}, as `datasets` does: Dataset.from_file(...).to_json('{{stem}}.jsonl')"),
    Kind(rb"\x89HDF\r\n\x1a\n", "HDF5", AS_LINES),
    Kind(rb"\x93NUMPY", "a NumPy array", AS_LINES),
    Kind(rb"SQLite format 3\0", "an SQLite database", AS_LINES),
    Kind(rb"Obj\x01", "Avro", AS_LINES),
    Kind(rb"%PDF-", "PDF", AS_LINES),
    Kind(
        rb"\xff\xfe\0\0|\0\0\xfe\xff|[{\[]\0\0\0|\0\0\0[{\[]",
        "UTF-32",
        "turn it into UTF-8: `{cat} | iconv -f utf-32 -t utf-8 > {stem}-utf8.jsonl`",
    ),
    Kind(rb"\xff\xfe|\xfe\xff|[{\[]\0|\0[{\[]", "UTF-16", "turn it into UTF-8: `{cat} | iconv -f utf-16 -t utf-8 > {stem}-utf8.jsonl`"),
    Kind(rb"\0{16}", "nothing but zeros where it begins", "it was never written to its end; copy it again"),
    Kind(
        rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer, not the file that it stands for", "get that with `git lfs pull`"
    ),
    Kind(rb"/annex/objects/", "a git-annex pointer, not the file that it stands for", "get that with `git annex get`"),
    Kind(rb"(?i)\s*<(!doctype|html|head|body|\?xml|!--)", "HTML or XML, as of an error page", "download it again, and look at what came"),
    Kind(rb"\s*\[\s*[{\[\"\]]", "a JSON array", f"{AS_LINES}: `{{cat}} | jq -c '.[]' > {{stem}}-lines.jsonl`"),
    OBJECT_OVER_LINES,
)


def faults_of(sources: Sequence[Source], text_field: str | None = None) -> list[str]:
    """A sentence for each source that holds no JSON lines with a text, as far as its beginning tells; of many the first few, and a number.

    text_field : where each line's object should have its text; None: anywhere.
    """
    found = [fault for source in sources if (fault := _fault_of(source.path, text_field)) is not None]
    if len(found) > MOST_FAULTS:
        return [*found[:MOST_FAULTS], f"{len(found) - MOST_FAULTS} more of the {len(sources)} sources are refused too"]
    return found


def _fault_of(path: Path, text_field: str | None) -> str | None:
    try:
        with open(path, "rb") as file:
            start = file.read(READ_BYTES)
        named = next((packing for packing in PACKINGS if packing.ending == path.suffix), None)
        fault = _packing_fault(path, named, start)
        if fault is not None:
            return fault
        text, is_whole = _beginning(path)
        fault = _text_fault(path, text, is_whole)
        if fault is not None or text_field is None:
            return fault
        return text_fields.fault(path, list(_objects(text.removeprefix(BYTE_ORDER_MARK))), text_field, is_whole=is_whole)
    except OSError as error:
        return f"{path} can't be read: {(error.strerror or str(error)).lower()}; have it made readable, or name another"
    except UserError as error:  # damaged, or cut off before its first text
        return str(error)


def _packing_fault(path: Path, named: Packing | None, start: bytes) -> str | None:
    """Of a file whose name and first bytes disagree on how it is packed."""
    found = next((packing for packing in PACKINGS if re.match(packing.magic, start, re.DOTALL)), None)
    if found == named:
        return None
    if found is not None:
        return f"{path} is {found.name}, but its name does not end in {found.ending}; rename it, or a link to it, so that it does"
    assert named is not None
    if not start:
        return f"{path} has 0 bytes, but even an empty text has {named.empty_bytes} as {named.name}: it was cut off; copy it again"
    if (kind := _kind_of(start)) is not None:
        return _kind_fault(path, kind, "cat")
    if _has_object(start):
        return f"{path} is plain text, though its name ends in {named.ending}; rename it, or a link to it, to {_stem(path)}.jsonl"
    return f"{path} is not {named.name}, as its name says: it begins with {_shown(start)}; copy it again"


def _beginning(path: Path) -> tuple[bytes, bool]:
    """The first text of a file, unpacked, and whether that is all of it."""
    text = b""
    for block in TextFile(path):
        text += block
        if len(text) >= READ_BYTES:
            return text[:MOST_TEXT_BYTES], False
    return text, True


def _text_fault(path: Path, text: bytes, is_whole: bool) -> str | None:
    text = text.removeprefix(BYTE_ORDER_MARK)
    if (kind := _kind_of(text)) is not None:
        return _kind_fault(path, kind, {".gz": "zcat", ".zst": "zstdcat"}.get(path.suffix, "cat"))
    if not text.strip() or _has_object(text):
        return None
    # A first line without an end may be a document of any length, or the rest of one where the file was divided by bytes.
    if not is_whole and b"\n" not in text and (text.startswith(b"{") or _is_utf8_so_far(text)):
        return None
    return f"{path} is not JSON lines: no line of its beginning is a JSON object; it begins with {_shown(text)}; {AS_LINES}"


def _kind_of(start: bytes) -> Kind | None:
    found = next((kind for kind in KINDS if re.match(kind.magic, start, re.DOTALL)), None)
    return None if found is OBJECT_OVER_LINES and _has_object(start) else found  # its first line alone is cut off


def _kind_fault(path: Path, kind: Kind, cat: str) -> str:
    name, stem = shlex.quote(path.name), shlex.quote(_stem(path))
    inside = "" if cat == "cat" else " inside"
    return f"{path} is {kind.name}{inside}, not JSON lines; {kind.advice.format(cat=f'{cat} {name}', file=name, stem=stem)}"


def _has_object(text: bytes) -> bool:
    """Whether a line is a JSON object."""
    return next(_objects(text), None) is not None


def _objects(text: bytes) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects."""
    for line in text.split(b"\n"):
        try:
            if line.lstrip().startswith(b"{") and isinstance(value := json.loads(line.decode()), dict):
                yield value
        except (ValueError, RecursionError):
            continue


def _is_utf8_so_far(text: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text)
    except UnicodeDecodeError:
        return False
    return True


def _stem(path: Path) -> str:
    return re.sub(rf"(\.(jsonl|ndjson|json))?(\.(gz|zst|{FOREIGN}))?$", "", path.name) or path.name


def _shown(start: bytes) -> str:
    return repr(start[:24].decode(errors="backslashreplace"))
