"""JSON lines to texts: what each line of a chunk holds, and why a bad one is left out.

A line is kept, empty (blank, or its text is "", or the tokenizer makes nothing of it) or rejected, by one of `REASONS`.
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import msgspec

from pipeline.text.text_source import BYTE_ORDER_MARK, START_BYTES, Chunk

EMPTY = "empty"
REASONS = ("not_json", "no_text_field", "not_a_string", "invalid_utf8", "too_long")


class Reject(NamedTuple):
    """A line that gave no document."""

    line: int
    """Number in the file, from 1."""
    part: int
    reason: str
    """`empty` or one of `REASONS`."""
    bytes: int
    """Length of the line, without its end."""
    start: str
    """The line's first bytes, for the reader."""


class Texts(NamedTuple):
    texts: list[str]
    lines: list[int]
    """The line number of each text."""
    rejects: list[Reject]
    num_lines: int
    num_blank: int
    """Lines of white space alone, which are among the empty ones."""


class LineParser:
    """Takes the texts out of chunks.

    Parameters
    ----------
    text_field : the key of the text in each line's object; `a.b` is the key `b` of the object under `a` in a line without a key `a.b`.
    max_line_bytes : a longer line is rejected, whatever it holds.
    """

    def __init__(self, text_field: str, max_line_bytes: int) -> None:
        self._text_field = text_field
        self._path = text_field.split(".")
        self._decode = _decoder(text_field)
        self._max_line_bytes = max_line_bytes

    def parse(self, chunk: Chunk) -> Texts:
        if chunk.long_line is not None:
            reject = Reject(chunk.first_line, chunk.part, "too_long", chunk.long_line.num_bytes, _readable(chunk.long_line.start))
            return Texts([], [], [reject], 1, 0)
        lines = chunk.lines.split(b"\n")
        if not lines[-1]:
            lines.pop()
        all_utf8 = _is_utf8(chunk.lines)
        texts, numbers, rejects, num_blank = [], [], [], 0
        for number, line in enumerate(lines, chunk.first_line):
            text = self._text_or_reason(line, all_utf8)
            if isinstance(text, str):
                texts.append(text)
                numbers.append(number)
            else:
                num_blank += text.is_blank
                rejects.append(Reject(number, chunk.part, text.name, len(line), _readable(line[:START_BYTES])))
        return Texts(texts, numbers, rejects, len(lines), num_blank)

    def _text_or_reason(self, line: bytes, all_utf8: bool) -> "str | _Reason":
        if len(line) > self._max_line_bytes:
            return _Reason("too_long")
        if not (all_utf8 or _is_utf8(line)):
            return _Reason("invalid_utf8")
        try:
            text = self._decode(line)
        except (msgspec.DecodeError, RecursionError):
            return self._text_or_reason_slowly(line.decode())
        return text or _Reason(EMPTY)

    def _text_or_reason_slowly(self, line: str) -> "str | _Reason":
        """Says what is wrong with a line that msgspec refused, or its text: json allows a lone surrogate beside the text."""
        line = line.removeprefix(BYTE_ORDER_MARK.decode())
        if not line.strip(" \t\r"):
            return _Reason(EMPTY, is_blank=True)
        try:
            value = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return _Reason("not_json")
        for key in [self._text_field] if isinstance(value, dict) and self._text_field in value else self._path:
            if not isinstance(value, dict) or key not in value:
                return _Reason("no_text_field")
            value = value[key]
        if not isinstance(value, str):
            return _Reason("not_a_string")
        if not value:
            return _Reason(EMPTY)
        # A surrogate without its pair (`"\ud800"`) is a string to JSON and has no form in UTF-8.
        return value if _is_encodable(value) else _Reason("invalid_utf8")


class _Reason(NamedTuple):
    name: str
    is_blank: bool = False


def _decoder(text_field: str) -> Callable[[bytes], str]:
    """What takes the text out of a line that holds one, and raises `msgspec.DecodeError` at any other.

    Only the text is built; msgspec checks the rest of the line and skips it.
    """
    if re.search(r'["\\\x00-\x1f]', text_field):  # msgspec takes no such names: each line is read slowly
        return _refuse_line
    if "." not in text_field:
        decode = msgspec.json.Decoder(msgspec.defstruct("Line", [("text", str)], rename={"text": text_field})).decode
        return lambda line: decode(line).text  # type: ignore[attr-defined]
    first, *inner = text_field.split(".")
    nested: Any = str
    for key in reversed(inner):
        nested = msgspec.defstruct("Inner", [("text", nested)], rename={"text": key})
    fields = [("alone", str | msgspec.UnsetType, msgspec.UNSET), ("nested", nested | msgspec.UnsetType, msgspec.UNSET)]
    decode_either = msgspec.json.Decoder(msgspec.defstruct("Line", fields, rename={"alone": text_field, "nested": first})).decode

    def text_of(line: bytes) -> str:
        found: Any = decode_either(line)
        if isinstance(found.alone, str):
            return found.alone
        value = found.nested
        if value is msgspec.UNSET:
            raise msgspec.DecodeError
        for _ in inner:
            value = value.text
        return str(value)

    return text_of


def _refuse_line(line: bytes) -> NoReturn:
    raise msgspec.DecodeError


def drop_empty(texts: Texts, chunk: Chunk, is_empty: Iterable[bool]) -> list[Reject]:
    """Rejects for those texts that the tokenizer made no id of."""
    lines = [line for line, empty in zip(texts.lines, is_empty, strict=True) if empty]
    found = chunk.lines.split(b"\n") if lines else []
    raw = [(line, found[line - chunk.first_line]) for line in lines]
    return [Reject(line, chunk.part, EMPTY, len(content), _readable(content[:START_BYTES])) for line, content in raw]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _readable(start: bytes) -> str:
    return start.decode("utf-8", errors="replace")
