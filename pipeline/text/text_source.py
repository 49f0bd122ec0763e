"""Source text: JSON-lines files, plain or compressed, read in bounded memory as chunks of whole lines.

A file is divided into *parts*, its units of work: a part is the shortest run of whole lines that holds at least
`part_bytes` of uncompressed text, so where parts end depends on the text alone, not on its compression or on who reads
it. A part is read as chunks of about `chunk_bytes`, the size of a message to a worker.
"""

from collections.abc import Iterator
from typing import NamedTuple

import xxhash

START_BYTES = 80
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LongLine(NamedTuple):
    num_bytes: int
    start: bytes


class PartEnd(NamedTuple):
    """What is known of a part once all of it has been read."""

    first_byte: int
    """Of the uncompressed text."""
    num_bytes: int
    num_lines: int
    xxh3_128: str
    """Of the uncompressed text."""
    is_last: bool
    """Of the file."""


class Chunk(NamedTuple):
    part: int
    first_line: int
    """Number in the file of the chunk's first line, from 1."""
    lines: bytes
    """Whole lines; empty where `long_line` is given."""
    long_line: LongLine | None
    """Stands for one line over the limit, whose text was not kept."""
    end: PartEnd | None
    """With the last chunk of a part."""


class _LineCutter:
    """Cuts a stream of blocks into runs of whole lines, never holding more than a line's limit beyond what is asked for."""

    def __init__(self, blocks: Iterator[bytes], max_line_bytes: int) -> None:
        self.hasher = xxhash.xxh3_128()
        self._blocks = blocks
        self._max_line_bytes = max_line_bytes
        self._pending = bytearray()

    def at_end(self) -> bool:
        return not self._pending and not self._fill()

    def take(self, num_bytes: int) -> bytes | LongLine:
        """The shortest run of whole lines of at least `num_bytes`, or what precedes a line over the limit, or that line."""
        searched = num_bytes - 1
        while True:
            newline = self._pending.find(b"\n", searched)
            if newline >= 0:
                return self._cut(newline + 1)
            searched = max(searched, len(self._pending))
            if len(self._pending) > self._max_line_bytes:
                line_start = self._pending.rfind(b"\n") + 1
                if len(self._pending) - line_start > self._max_line_bytes:
                    return self._cut(line_start) if line_start else self._drop_line()
            if not self._fill():
                return self._cut(len(self._pending))

    def _fill(self) -> bool:
        block = next(self._blocks, None)
        self._pending += block or b""
        return block is not None

    def _cut(self, num_bytes: int) -> bytes:
        run = bytes(memoryview(self._pending)[:num_bytes])
        del self._pending[:num_bytes]
        self.hasher.update(run)
        return run

    def _drop_line(self) -> LongLine:
        start, num_bytes = bytes(self._pending[:START_BYTES]), 0
        while (newline := self._pending.find(b"\n")) < 0:
            num_bytes += len(self._cut(len(self._pending)))
            if not self._fill():
                return LongLine(num_bytes, start)
        return LongLine(num_bytes + len(self._cut(newline + 1)) - 1, start)


def read_chunks(blocks: Iterator[bytes], *, part_bytes: int, chunk_bytes: int, max_line_bytes: int) -> Iterator[Chunk]:
    """The text as chunks, in order; an empty text is one empty chunk. A line over `max_line_bytes` is never held."""
    cutter = _LineCutter(blocks, max_line_bytes)
    part, part_line, part_first_byte, num_bytes, line = 0, 1, 0, 0, 1
    is_last = cutter.at_end()
    if is_last:
        yield Chunk(0, 1, b"", None, PartEnd(0, 0, 0, cutter.hasher.hexdigest(), True))
    while not is_last:
        run = cutter.take(min(chunk_bytes, part_bytes - num_bytes))
        first_line = line
        if isinstance(run, LongLine):
            num_bytes += run.num_bytes + 1
            line += 1
        else:
            num_bytes += len(run)
            line += run.count(b"\n") + (not run.endswith(b"\n"))
        is_last = cutter.at_end()
        end = None
        if is_last or num_bytes >= part_bytes:
            end = PartEnd(part_first_byte, num_bytes, line - part_line, cutter.hasher.hexdigest(), is_last)
        yield Chunk(part, first_line, b"", run, end) if isinstance(run, LongLine) else Chunk(part, first_line, run, None, end)
        if end is not None:
            part, part_line, part_first_byte, num_bytes = part + 1, line, part_first_byte + num_bytes, 0
            cutter.hasher.reset()
