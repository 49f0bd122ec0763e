"""The seal of a finished task: every file that it leaves, by size and hash, so that damage is named later.

seal.json in the task directory, written just before result.json, which is the commit mark: a task that finished is sealed.

    {"format": "run-seal/1",
     "files":    {"metrics.jsonl": {"bytes": 18220, "xxh3_128": "77d0..."}, "result.json": {...}, "../../code.json": {...}, ...},
     "appended": {"attempts.jsonl": {"bytes": 310, "xxh3_128": "01bb..."}, "log/1042.log": {...}},
     "checksum": "5b1e..."}

`files` are whole. `appended` ones may grow afterwards, so only their first `bytes` are checked: the line of attempts.jsonl that tells of
the end comes after result.json, and a log gets what is printed until the process is gone. A data file that has a record beside it,
as those of checkpoints have, is listed with the hash in that record. The task of an array or a sweep lists what the whole run was
frozen with too. The seal guards against damage and accidents; who edits a file and the seal alike is not found out.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record.run_directory import RunDirectory

SEAL = "seal.json"
FORMAT = "run-seal/1"

APPENDED = ("attempts.jsonl", "log")
LEFT_OUT = {
    "seal.json": "it is the seal",
    "job.json": "later submissions and changes of the run's other tasks are recorded in it; it holds the hashes of config.yaml and code/",
    "setup.json": "its lines may hold a secret, whose hash others could read",
    "lock.json": "the task is held until its process ends",
    "code": "code.json, which is sealed, holds the hash of each of its files",
    "submitit": "submitit and Slurm write there when the task has ended",
    "ranks": "the processes beside the one that seals write there, and may end after it",
    "tasks": "each task has a seal of its own",
}
"""What of a task's directory is in no seal, and why. Besides, names that begin with a dot are of files half made, and a checkpoint
called `.damaged` was found so and set aside."""

FROZEN_FOR_ALL = ("code.json", "code.diff", "environment.json")
"""Files of a divided run that no change touches once a task began; its config.yaml and inputs.json may be changed for what still waits,
and its tasks have such files, or their hashes, of their own."""

Entry = dict[str, Any]


def write(run: RunDirectory, task: int, result: dict[str, Any]) -> None:
    """Seals the task, whose result.json will hold `result` and nothing else. Files are read and hashed: about 1 s for 2 GB."""
    here = run.task_directory(task)
    content = records.json_bytes(result)
    entries = {name: entry for directory, names in _walk(here) for name, entry in _entries(here, directory, names)}
    if here != run.path:
        entries |= {f"../../{name}": _entry(run.path / name) for name in FROZEN_FOR_ALL}
    entries["result.json"] = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    kinds: dict[str, dict[str, Entry]] = {"files": {}, "appended": {}}
    for name in sorted(entries):
        kinds["appended" if name.partition("/")[0] in APPENDED else "files"][name] = entries[name]
    records.write_json(here / SEAL, records.with_checksum({"format": FORMAT, **kinds}))


def _walk(here: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each directory in and under `here` with its files' names, what is in no seal left out."""
    for directory, directories, names in os.walk(here):
        left_out = LEFT_OUT if Path(directory) == here else ()
        directories[:] = [name for name in directories if name not in left_out and _is_sealed(name)]
        yield Path(directory), [name for name in names if name not in left_out and _is_sealed(name)]


def _is_sealed(name: str) -> bool:
    if name.startswith(".") or name.endswith(".damaged"):
        return False
    try:
        name.encode()
    except UnicodeEncodeError:  # no name that anything here gives, and none that JSON can hold
        return False
    return True


def _entries(here: Path, directory: Path, names: list[str]) -> Iterator[tuple[str, Entry]]:
    recorded: dict[str, Entry] = {}
    if records.MANIFEST in names:
        try:
            _, shards = records.read_data_set(directory, None, None)
        except UserError:  # damaged already: left to its own records, which `verify` then asks
            return
        recorded = {name: entry for shard in shards.values() for name, entry in shard["files"].items()}
    for name in names:
        if (directory / name).is_file():
            yield str((directory / name).relative_to(here)), recorded.get(name) or _entry(directory / name)


def _entry(path: Path) -> Entry:
    size = path.stat().st_size
    return {"bytes": size, "xxh3_128": records.hash_file(path, num_bytes=size)}


def is_there(run: RunDirectory, task: int) -> bool:
    """Whether the task ended with a seal; one without a result is of a process that was killed before the task had finished."""
    here = run.task_directory(task)
    return (here / SEAL).exists() and ((here / "result.json").exists() or run.last_ending(task) == "finished")


def check(run: RunDirectory, task: int) -> tuple[list[str], set[str]]:
    """A sentence for each file that is not as it was when the task finished, and the names of all that were compared, from its directory.

    Where the seal itself is damaged it is named, and nothing is compared.
    """
    here = run.task_directory(task)
    again = f"; restore it, or make the run again with `crosscoder rerun {run.reference}`"
    try:
        seal = records.read_checked(here / SEAL, FORMAT, advice=f"what {here} holds can't be checked; restore the file from a copy")
    except UserError as error:
        return [str(error)], set()
    damages = []
    for name, entry in (seal["files"] | seal["appended"]).items():
        path = Path(os.path.normpath(here / name))
        if fault := _fault(path, entry, may_be_longer=name in seal["appended"]):
            damages.append(f"{path} {fault}{again}")
    return damages, set(seal["files"])


def _fault(path: Path, entry: Entry, *, may_be_longer: bool) -> str | None:
    wanted = entry["bytes"]
    try:
        size = path.stat().st_size
        if size < wanted or (size > wanted and not may_be_longer):
            return f"holds {size:,} bytes, {wanted:,} when the task finished: it was changed since"
        if records.hash_file(path, num_bytes=wanted) != entry["xxh3_128"]:
            return "does not have the bytes that it had when the task finished (its hash differs): it was changed since"
    except FileNotFoundError:
        return f"is missing; it held {wanted:,} bytes when the task finished"
    except OSError as error:
        return f"can't be read: {(error.strerror or str(error)).lower()}"
    return None
