"""Source text: JSON-lines files, plain or compressed, read in bounded memory as chunks of whole lines.

A file is divided into *parts*, its units of work: a part is the shortest run of whole lines that holds at least
`part_bytes` of uncompressed text, so where parts end depends on the text alone, not on its compression or on who reads
it. A part is read as chunks of about `chunk_bytes`, the size of a message to a worker.
"""

import glob
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash
import zstandard

from pipeline.config.errors import UserError

# 64 KiB of zstd can hold some hundred MB of text at the worst, and holds 200 to 300 KB of prose.
READ_BYTES = 1 << 16
MAX_WINDOW_BYTES = 1 << 31
START_BYTES = 80
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Source(NamedTuple):
    name: str
    """The file's name without `.jsonl` and the compression's ending; shards are named after it."""
    path: Path
    num_bytes: int
    """As it lies on disk, compressed."""


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


def find_sources(patterns: list[Path]) -> list[Source]:
    """The files that the patterns name, in the order of their names. A directory stands for the JSON-lines files in it."""
    paths: set[Path] = set()
    for pattern in patterns:
        matches = [pattern] if pattern.is_file() else [Path(found) for found in glob.glob(str(pattern), recursive=True)]
        found = {path for match in matches for path in (_text_files(match) if match.is_dir() else [match])}
        if not found:
            raise UserError(f"sources: {pattern} names no file; give a JSON-lines file, a directory of them or a glob pattern")
        paths |= found
    sources: dict[str, Source] = {}
    for path in sorted(paths, key=lambda path: (source_name(path), str(path))):
        name = source_name(path)
        if name in sources:
            raise UserError(f"sources: {sources[name].path} and {path} would both give shards named {name}-NNN; rename one of them")
        sources[name] = Source(name, path, path.stat().st_size)
    _check_names(list(sources))
    return list(sources.values())


def source_name(path: Path) -> str:
    """The file's name without `.jsonl`, `.json` or `.ndjson` and without `.gz` or `.zst`."""
    return re.sub(r"(\.(jsonl|ndjson|json))?(\.(gz|zst))?$", "", path.name) or path.name


def _text_files(directory: Path) -> list[Path]:
    return [p for p in directory.iterdir() if re.search(r"\.(jsonl|ndjson|json)(\.(gz|zst))?$", p.name) and p.is_file()]


def _check_names(names: list[str]) -> None:
    """Shard `a-000` owns every file called `a-000.*`; a source called `a-000.b` would put its own among them."""
    for name in names:
        owner = re.match(r"(.+)-\d{3,}\.", name)
        if owner and owner[1] in names:
            raise UserError(f"sources: the file named {name} would mix with the shards of {owner[1]}; rename one of them")


class TextFile:
    """The uncompressed bytes of a file, block by block; several zstd frames or gzip members count as one text.

    Raises `UserError` when compressed data is damaged or ends too early (the libraries' own stream readers take a zstd file
    that was cut off for one that is complete).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        """Of the file as it lies on disk."""

    def __iter__(self) -> Iterator[bytes]:
        with open(self.path, "rb", buffering=0) as file:
            if self.path.suffix == ".zst":
                yield from self._decompressed(file, zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj)
            elif self.path.suffix == ".gz":
                yield from self._decompressed(file, lambda: zlib.decompressobj(wbits=31))
            else:
                yield from self._blocks(file)

    def _blocks(self, file: IO[bytes]) -> Iterator[bytes]:
        while block := file.read(READ_BYTES):
            self.bytes_read += len(block)
            yield block

    def _decompressed(self, file: IO[bytes], new_decoder: Callable[[], Any]) -> Iterator[bytes]:
        decoder, inside = new_decoder(), False
        for block in self._blocks(file):
            while block:
                # gzip allows zero bytes after a member, as padding.
                if not inside and self.path.suffix == ".gz" and not (block := block.lstrip(b"\0")):
                    break
                try:
                    text = decoder.decompress(block)
                except (zstandard.ZstdError, zlib.error) as error:
                    raise UserError(f"{self.path} is damaged near byte {self.bytes_read:,} of it: {error}; copy it anew") from error
                inside = not decoder.eof
                block = b"" if inside else decoder.unused_data
                if not inside:
                    decoder = new_decoder()
                if text:
                    yield text
        if inside:
            raise UserError(f"{self.path} ends in the middle of its compressed data, after {self.bytes_read:,} bytes; copy it anew")


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
