"""Checkpoints on disk: directories that are whole or not there.

    checkpoints/
      00001000/                      the step; appears by one rename, so it is whole or absent
        crosscoder.safetensors       weights, threshold, normalizer, tokens since each feature fired
        crosscoder.json              its record: configuration, layers, step, tokens; size and hash of the file above
        training.safetensors         optimizer moments, counters, unlogged metrics, random state
        training.json                its record: position in the data
        manifest.json                {"format": "checkpoint/1", "data_id": "5d0c...", "shards": ["crosscoder", "training"], "step": 1000}

A checkpoint is a data set in the sense of `pipeline.records`: two shards, each with its record, and a manifest. Nothing
in it depends on when or where it was written.
"""

import errno
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from pipeline import records
from pipeline.config.errors import UserError

CHECKPOINT_FORMAT = "checkpoint/1"
CROSSCODER_FORMAT = "crosscoder/1"
TRAINING_FORMAT = "training-state/1"
SNAPSHOT_FEATURES_FORMAT = "snapshot-features/1"
FORMATS = {"crosscoder": CROSSCODER_FORMAT, "training": TRAINING_FORMAT, "features": SNAPSHOT_FEATURES_FORMAT}


class Part(NamedTuple):
    """One of the shards of a checkpoint or of a snapshot: its tensors, and the facts that stand in its record."""

    tensors: dict[str, Tensor]
    facts: records.Record


def name_of(step: int) -> str:
    """The name of the directory of a step's checkpoint; names sort as steps do."""
    return f"{step:08d}"


def write(checkpoints: Path, step: int, parts: dict[str, Part]) -> Path:
    """Writes and seals the checkpoint of `step`, and gives its directory; one that stands there is replaced.

    Raises `UserError` when the disk is full; the checkpoints that were there stay.
    """
    final = checkpoints / name_of(step)
    temporary = checkpoints / f".{final.name}.{socket.gethostname()}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        shards = {stem: _write_part(temporary, stem, part) for stem, part in parts.items()}
        records.write_manifest(temporary, CHECKPOINT_FORMAT, shards, {"step": step})
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        _fsync(checkpoints)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if disk_is_full(error):
            raise UserError(
                f"{final} could not be written: the disk is full; free some space and start the same command again, it goes on "
                "from the checkpoint before this one"
            ) from error
        raise
    return final


def _write_part(directory: Path, stem: str, part: Part) -> records.Record:
    path = directory / f"{stem}.safetensors"
    safetensors.torch.save_file({name: tensor.detach().cpu().contiguous() for name, tensor in part.tensors.items()}, path)
    _fsync(path)
    return records.commit_shard(directory, stem, FORMATS[stem], [path.name], part.facts, provenance={})


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space, or of quota."""
    full = (errno.ENOSPC, errno.EDQUOT)
    # safetensors wraps the system's error in one of its own, whose text ends with its number.
    if isinstance(error, safetensors.SafetensorError):
        return any(f"os error {number})" in str(error) for number in full)
    return isinstance(error, OSError) and error.errno in full


def read_part(checkpoint: Path, stem: str) -> Part:
    """Tensors, on the CPU, and facts of one shard of a checkpoint, its size and hash checked."""
    record = records.read_shard(checkpoint, stem, FORMATS[stem])
    path = checkpoint / f"{stem}.safetensors"
    if records.hash_file(path) != record["files"][path.name]["xxh3_128"]:
        raise UserError(f"{path} does not have the bytes that were written (its hash differs): the checkpoint is damaged; use another")
    return Part(safetensors.torch.load_file(path), record)


def all_in(checkpoints: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in checkpoints.glob("[0-9]*") if path.name.isdigit() and (path / records.MANIFEST).exists())


def newest_whole(checkpoints: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files have the bytes that were written, or None; `say` hears of those that are damaged."""
    for path in reversed(all_in(checkpoints)):
        damage = _damage(path)
        if damage is None:
            return path
        say(f"checkpoint {path} is damaged, the one before it is used: {damage}")
    return None


def set_damaged_aside(checkpoints: Path, say: Callable[[str], None]) -> None:
    """Renames the damaged checkpoints that are newer than the newest whole one to `<step>.damaged`; `say` hears of each."""
    for path in reversed(all_in(checkpoints)):
        damage = _damage(path)
        if damage is None:
            return
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        say(f"checkpoint {path} is damaged, the one before it is used; it now lies in {aside}: {damage}")


def _damage(checkpoint: Path) -> str | None:
    """One sentence for what is wrong with a checkpoint; None if every file has the bytes that were written."""
    try:
        return next(iter(records.verify(checkpoint)), None)
    except UserError as error:
        return str(error)


def remove_old(checkpoints: Path, keep: int, *, spare: int | None = None) -> None:
    """Deletes all but the newest `keep` checkpoints and that of the step `spare`, and what killed writers left."""
    for path in all_in(checkpoints)[:-keep]:
        if spare is not None and path.name == name_of(spare):
            continue
        # Under a temporary name first: what a kill leaves of it is then neither taken for a checkpoint nor left for ever.
        os.rename(path, path.with_name(f".{path.name}.old.tmp"))
    for path in checkpoints.glob(".*.tmp"):
        shutil.rmtree(path)
