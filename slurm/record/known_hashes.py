"""Hashes of large files, kept under the root of runs and used as long as the file is as it was when it was hashed.

    <runs>/.hashes/<xxh3-128 of the path>.json      {"path": "/models/llama/model.safetensors", "xxh3_128": "a2c4...",
                                                     "stamp": [269060552, 1795424130123456789, 1795424130123456789, 8123]}

The stamp is size, time of the last change of content, time of the last change of any kind (no program can set that one back), inode.
Any number of processes may read and write these files at once: each is replaced as a whole, and a lost one costs a hashing.
"""

import contextlib
import os
import time
from pathlib import Path

import xxhash

from pipeline import records
from pipeline.config.errors import UserError

DIRECTORY = ".hashes"
SMALLEST_BYTES = 16 << 20
"""A smaller file is hashed each time: that takes 2 ms, and a run's own copy of the demo's model is one path more for each run."""
SETTLED_SECONDS = 2.0
"""A file that changed less than so long ago may change again within the tick of its clock, and look the same."""


class KnownHashes:
    """What is known under one root of runs."""

    def __init__(self, runs: Path) -> None:
        self._directory = runs / DIRECTORY

    def hash_file(self, path: Path) -> str:
        """xxh3-128 of the file's bytes, as hex; read only if it is small, or changed since it was last hashed."""
        stamp = _stamp(path)
        if stamp[0] < SMALLEST_BYTES:
            return records.hash_file(path)
        place = self._directory / f"{xxhash.xxh3_128_hexdigest(os.fsencode(path.absolute()))}.json"
        known = _read(place)
        if known.get("stamp") == stamp and isinstance(known.get("xxh3_128"), str):
            return str(known["xxh3_128"])
        found = records.hash_file(path)
        if _stamp(path) == stamp and time.time() - max(stamp[1:3]) / 1e9 > SETTLED_SECONDS:
            with contextlib.suppress(OSError, UserError):  # a disk that is full, a root that others own: it is only a memory
                records.write_json(place, {"path": str(path.absolute()), "stamp": stamp, "xxh3_128": found})
        return found


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read(place: Path) -> records.Record:
    try:
        value = records.read_json(place)
    except (OSError, UserError):
        return {}
    return value if isinstance(value, dict) else {}
