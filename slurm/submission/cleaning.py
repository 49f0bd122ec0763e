"""What no run under a root of runs needs any more: frozen files in its store of code, and the hashes of models' files that are gone.

A frozen file is a hard link in the `code/` of each run that has it, so one with a single name is in none. A run that is being frozen
meanwhile and misses a file that was just deleted copies it instead.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record import known_hashes
from slurm.submission.freezing import CODE_STORE


class Leftover(NamedTuple):
    """A file that nothing needs."""

    path: Path
    num_bytes: int
    is_own: bool
    """Whether it is this user's; in a shared root each cleans up what is his."""


def leftovers(runs: Path) -> list[Leftover]:
    """All that can go, in the order of their names; other users' too."""
    return sorted([*_frozen_files(runs / CODE_STORE), *_hashes(runs / known_hashes.DIRECTORY)])


def _frozen_files(store: Path) -> Iterator[Leftover]:
    for path in store.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            facts = path.lstat()
            if path.is_file() and facts.st_nlink == 1:
                yield Leftover(path, facts.st_size, facts.st_uid == os.geteuid())


def _hashes(directory: Path) -> Iterator[Leftover]:
    for path in directory.glob("*.json"):
        with contextlib.suppress(FileNotFoundError, UserError):  # whoever reads a damaged one says so
            facts, entry = path.lstat(), records.read_json(path)
            if isinstance(entry, dict) and not Path(str(entry.get("path"))).exists():
                yield Leftover(path, facts.st_size, facts.st_uid == os.geteuid())


def delete(found: Sequence[Leftover]) -> None:
    """Deletes them, and directories of the store that are empty then."""
    for leftover in found:
        leftover.path.unlink(missing_ok=True)
    for directory in {leftover.path.parent for leftover in found if leftover.path.parent.name != known_hashes.DIRECTORY}:
        with contextlib.suppress(OSError):  # not empty
            directory.rmdir()
