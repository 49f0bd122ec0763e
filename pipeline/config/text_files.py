"""The files that a setting names as text, found and opened: plain, gzip or zstandard, without torch, so that a submission can look too."""

import glob
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from pipeline.config.errors import UserError

# 64 KiB of zstd can hold some hundred MB of text at the worst, and holds 200 to 300 KB of prose.
READ_BYTES = 1 << 16
MAX_WINDOW_BYTES = 1 << 31


class Source(NamedTuple):
    name: str
    """The file's name without `.jsonl` and the compression's ending; shards are named after it."""
    path: Path
    num_bytes: int
    """As it lies on disk, compressed."""


def find_sources(patterns: list[Path]) -> list[Source]:
    """The files that the patterns name, in the order of their names. A directory stands for the JSON-lines files in it.

    Raises `UserError` for a pattern that names no file, for two files whose shards would be called alike, and for what is no file.
    """
    paths: set[Path] = set()
    for pattern in patterns:
        matches = [pattern] if pattern.is_file() else [Path(found) for found in glob.glob(str(pattern), recursive=True)]
        found = {path for match in matches for path in (_text_files(match) if match.is_dir() else [match])}
        if not found:
            there = _contents(matches[0]) if len(matches) == 1 and matches[0].is_dir() else ""
            raise UserError(f"sources: {pattern} names no file{there}; give a JSON-lines file, a directory of them or a glob pattern")
        paths |= found
    sources: dict[str, Source] = {}
    for path in sorted(paths, key=lambda path: (source_name(path), str(path))):
        name = source_name(path)
        if name in sources:
            raise UserError(f"sources: {sources[name].path} and {path} would both give shards named {name}-NNN; rename one of them")
        sources[name] = Source(name, path, _size(path))
    _check_names(list(sources))
    return list(sources.values())


def _size(path: Path) -> int:
    try:
        facts = path.stat()
    except FileNotFoundError:
        raise UserError(f"sources: {path} is a link to {os.readlink(path)}, which does not exist") from None
    if not stat.S_ISREG(facts.st_mode):
        raise UserError(f"sources: {path} is a pipe or a device, not a file: text is read more than once; write it to a file first")
    return facts.st_size


def source_name(path: Path) -> str:
    """The file's name without `.jsonl`, `.json` or `.ndjson` and without `.gz` or `.zst`."""
    return re.sub(r"(\.(jsonl|ndjson|json))?(\.(gz|zst))?$", "", path.name) or path.name


FOREIGN = "bz2|xz|lzma|lz4|br|snappy|zip|7z|rar"
"""Endings of packed JSON lines that can't be read: a directory's are named rather than left out."""


def _text_files(directory: Path) -> list[Path]:
    wanted = re.compile(rf"\.(jsonl|ndjson|json)(\.(gz|zst|{FOREIGN}))?$")
    return [path for path in directory.iterdir() if wanted.search(path.name) and path.is_file()]


def _contents(directory: Path, most: int = 4) -> str:
    names = sorted(path.name for path in directory.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f" called .jsonl, .ndjson or .json, nor with .gz or .zst after it (it holds {', '.join(names[:most]) or 'nothing'}{more})"


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
