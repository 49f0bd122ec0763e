"""Files that are whole or not there: atomic writes, shard records, manifests and the data id.

A data set is a directory. Each shard is a few files that share a stem, and one record, `<stem>.json`; the manifest,
`manifest.json`, comes last. Every file is written under a temporary name, fsynced and renamed. The record is the commit
mark: a shard exists if and only if its record does and the sizes match.

    tokens/demo/train/
      lib-000.bin  lib-000.ends  lib-000.json      one shard: two data files and their record
      manifest.json                                {"format": "token-set/1", "data_id": "9f2c...", "shards": ["lib-000"], ...}
      recipe.json                                  the settings that made it; another recipe may not write here

A record holds `format`, `files` (name to size in bytes and xxh3-128), facts about the content, and `provenance`: where
and when it was made. The record hash leaves out `provenance` and the files' names; the data id is the sha256 of the
sorted record hashes. So the same content has the same id wherever it lies and whatever it is called. Records and manifests
end with a `checksum` over all but `provenance`, so that no reader takes a damaged one for whole.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

from pipeline.config.errors import UserError, sentence_of

MANIFEST = "manifest.json"
RECIPE = "recipe.json"
CHUNK_BYTES = 1 << 22

Record = dict[str, Any]


@contextlib.contextmanager
def atomic_file(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A file to write that appears at `path`, whole and on disk, when the block ends without an error.

    On an error nothing appears and what stood at `path` stays. The temporary name carries host and process, so two
    writers never share one; a link that somebody put at it is not followed. The umask takes its part of `mode`. Raises
    `UserError` when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path} could not be written: {os.strerror(error.errno).lower()}; free some space and start the same "
                "command again, what is finished is kept"
            ) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_to_append(path: Path) -> IO[bytes]:
    """The file at `path`, made if it is missing, opened so that each write goes to its end at once; reading is possible.

    Raises `UserError` for a link: in a directory that others may write to, it could lead to any file of whoever appends.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link, expected a file that this program made; remove it") from None
        raise
    return open(descriptor, "a+b", buffering=0)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path, stem: str) -> None:
    """Deletes temporary files that killed writers of this stem left, and its data files if its record is missing."""
    for leftover in directory.glob(f".{glob.escape(stem)}.*.tmp"):
        leftover.unlink(missing_ok=True)
    if not (directory / f"{stem}.json").exists():
        for part in directory.glob(f"{glob.escape(stem)}.*"):
            part.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, mode: int = 0o666) -> None:
    """Writes `value` to `path` atomically, indented, keys in their order; `mode` as `atomic_file` takes it."""
    with atomic_file(path, mode) as file:
        file.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_once(path: Path, value: Any) -> Any:
    """Writes `value` to `path` as JSON unless something stands there, and gives what stands there then.

    Of processes that come at the same time the first decides for all.
    """
    if not path.exists():
        draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.draft")
        write_json(draft, value)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links: there the last of those that come at the same time decides
            os.replace(draft, path)
        draft.unlink(missing_ok=True)
    return read_json(path)


def read_json(path: Path) -> Any:
    """The value in the JSON file at `path`; a missing or broken one raises `UserError`."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except PermissionError as error:
        raise UserError(str(sentence_of(error))) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): the file is damaged") from error


def hash_file(path: Path, check_stop: Callable[[], None] = lambda: None, *, num_bytes: int | None = None) -> str:
    """xxh3-128 of the file's bytes, or of its first `num_bytes`, as hex. Calls `check_stop` every few milliseconds."""
    hasher = xxhash.xxh3_128()
    left = num_bytes if num_bytes is not None else sys.maxsize
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(min(left, CHUNK_BYTES)):
            hasher.update(chunk)
            left -= len(chunk)
            check_stop()
    return hasher.hexdigest()


def commit_shard(
    directory: Path,
    stem: str,
    shard_format: str,
    files: Iterable[str],
    facts: Record,
    provenance: Record,
    hashes: Mapping[str, str] | None = None,
) -> Record:
    """Writes the record of a shard whose data files are already in place, and gives it. The shard exists from here on.

    `hashes` holds the xxh3-128 of files that were hashed as they were written; the others are read and hashed here.
    """
    known = hashes or {}
    paths = {name: directory / name for name in files}
    described = {name: {"bytes": path.stat().st_size, "xxh3_128": known.get(name) or hash_file(path)} for name, path in paths.items()}
    record = with_checksum({"format": shard_format, "files": described, **facts, "provenance": provenance})
    write_json(directory / f"{stem}.json", record)
    return record


def _checksum(value: Record) -> str:
    covered = {key: entry for key, entry in value.items() if key not in ("provenance", "checksum")}
    canonical = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def with_checksum(value: Record) -> Record:
    """A record or manifest as it is written: its checksum, new or renewed, comes last."""
    return {**{key: entry for key, entry in value.items() if key != "checksum"}, "checksum": _checksum(value)}


def read_checked(path: Path, wanted_format: str | None, *, advice: str = "") -> Record:
    """The record or manifest at `path`, if it is of that format (None: of any) and its checksum is right; else `UserError`.

    advice : what to do about a damaged one; without it, what mends a data set.
    """
    value = read_json(path)
    found = value.get("format") if isinstance(value, dict) else None
    if not isinstance(value, dict) or (wanted_format is not None and found != wanted_format):
        raise UserError(f"{path} is of format {found!r}, expected {wanted_format!r}")
    if value.get("checksum") != _checksum(value):
        advice = advice or "delete it and run the stage again, it redoes only what this file stands for"
        raise UserError(f"{path} does not say what was written (its checksum differs): the file is damaged; {advice}")
    return value


def read_shard(directory: Path, stem: str, shard_format: str | None) -> Record:
    """The record of a shard, its format, checksum and files' sizes checked. Raises `UserError` naming the file that is wrong."""
    path = directory / f"{stem}.json"
    if not path.exists():
        raise UserError(f"{path} does not exist, so its shard does not either; run the stage that makes it again, it redoes only that")
    record = read_checked(path, shard_format)
    for name, described in record["files"].items():
        file = directory / name
        size = file.stat().st_size if file.exists() else None
        if size != described["bytes"]:
            state = "is missing" if size is None else f"holds {size:,} bytes"
            raise UserError(
                f"{file} {state}, its record says {described['bytes']:,} bytes: the shard is damaged; delete {path} and "
                "run the stage again, it redoes only that shard"
            )
    return record


def check_hashes(directory: Path, stem: str, record: Record, check_stop: Callable[[], None] = lambda: None) -> None:
    """Rehashes a shard's files. Raises `UserError` naming the first that does not have the bytes that were written."""
    for name, described in record["files"].items():
        if hash_file(directory / name, check_stop) != described["xxh3_128"]:
            raise UserError(
                f"{directory / name} does not have the bytes that were written (its hash differs): the shard is damaged; "
                f"delete {directory / stem}.json and run the stage that makes it again, it redoes only that shard"
            )


def committed_shards(directory: Path, shard_format: str) -> dict[str, Record]:
    """Stem to record of every shard that exists in `directory`, in the order of their names."""
    stems = sorted(p.stem for p in directory.glob("*.json") if p.name not in (MANIFEST, RECIPE) and not p.name.startswith("."))
    return {stem: read_shard(directory, stem, shard_format) for stem in stems}


def record_hash(record: Record) -> str:
    """xxh3-128 of what a shard is: its record without provenance and checksum, its files by ending and hash instead of name."""
    content = {key: value for key, value in record.items() if key not in ("provenance", "files", "checksum")}
    files = sorted([Path(name).suffix, described["bytes"], described["xxh3_128"]] for name, described in record["files"].items())
    canonical = json.dumps([content, files], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def data_id(records: Iterable[Record]) -> str:
    """sha256, as hex, of the sorted record hashes: the identity of a data set, by content alone."""
    return hashlib.sha256("\n".join(sorted(record_hash(record) for record in records)).encode()).hexdigest()


def write_manifest(directory: Path, set_format: str, shards: dict[str, Record], facts: Record) -> Record:
    """Seals a data set whose shards are all committed, and gives its manifest; the same shards give the same bytes."""
    manifest = with_checksum({"format": set_format, "data_id": data_id(shards.values()), "shards": list(shards), **facts})
    write_json(directory / MANIFEST, manifest)
    return manifest


def read_manifest(directory: Path, set_format: str | None = None) -> Record:
    """The manifest of the data set in `directory`; `UserError` where there is none, or it is of another format or damaged."""
    if not (directory / MANIFEST).exists():
        if not directory.exists():
            raise UserError(f"{directory} does not exist; run the stage that makes it first")
        raise UserError(f"{directory} has no {MANIFEST}: it is not a finished data set; run the stage that makes it again, it resumes")
    return read_checked(directory / MANIFEST, set_format)


def read_data_set(directory: Path, set_format: str | None, shard_format: str | None) -> tuple[Record, dict[str, Record]]:
    """Manifest and shard records of a sealed data set, with sizes, shard list and data id checked against each other.

    A format that is None may be any.
    """
    manifest = read_manifest(directory, set_format)
    shards = {stem: read_shard(directory, stem, shard_format) for stem in manifest["shards"]}
    found = data_id(shards.values())
    if found != manifest["data_id"]:
        raise UserError(
            f"{directory / MANIFEST} says data id {manifest['data_id'][:12]}, its shards' records give {found[:12]}: a record "
            "was changed or replaced; run the stage that makes the set again"
        )
    return manifest, shards


def claim(directory: Path, recipe: Record, *, measured: Record | None = None) -> Record:
    """Reserves `directory` for the output of `recipe` (settings and data ids), or checks that it was made by the same.

    measured : further inputs, of which whoever comes first decides the values; gives what was decided.

    Raises `UserError` naming the first setting that differs: two recipes never mix in one data set.
    """
    path, measured = directory / RECIPE, measured or {}
    # Looked at before the recipe: whoever made something visible here had written the recipe first, so tasks that start together agree.
    occupied = directory.exists() and any(not p.name.startswith(".") for p in directory.iterdir())
    if not path.exists():
        if occupied:
            raise UserError(f"{directory} is not empty and has no {RECIPE}: it was not made by this pipeline; choose another output")
        write_once(path, with_checksum(_with_inputs(recipe, measured)))
    found = read_recipe(directory)
    decided = {key: found["inputs"][key] for key in measured if key in found.get("inputs", {})}
    wanted = json.loads(json.dumps(_with_inputs(recipe, measured | decided)))
    if found == wanted:
        return decided
    key, before, now = _first_difference(found, wanted)
    raise UserError(
        f"{directory} was made with other settings: {key} was {_short(before)}, now it is {_short(now)}; "
        "choose another output, or delete the directory to make it anew"
    )


def _with_inputs(recipe: Record, further: Record) -> Record:
    return {**recipe, "inputs": {**recipe.get("inputs", {}), **further}} if further else recipe


def read_recipe(directory: Path) -> Record:
    """The stage, settings and inputs that the set in `directory` is made by; `UserError` where they are damaged.

    Recipes of version 0.1 have no checksum.
    """
    path, advice = directory / RECIPE, "restore it, or delete the directory to make it anew"
    recipe = read_json(path)
    if not isinstance(recipe, dict) or "stage" not in recipe or not recipe.keys() <= {"stage", "settings", "inputs", "checksum"}:
        raise UserError(f"{path} is not a recipe (stage, settings, inputs): the file is damaged; {advice}")
    if "checksum" in recipe:
        recipe = read_checked(path, None, advice=advice)
    return {key: value for key, value in recipe.items() if key != "checksum"}


def _first_difference(before: Record, now: Record) -> tuple[str, Any, Any]:
    """The dotted key of the first innermost entry that differs, and its two values."""
    key = next(k for k in [*now, *before] if before.get(k) != now.get(k))
    one, other = before.get(key), now.get(key)
    if isinstance(one, dict) and isinstance(other, dict):
        inner, one, other = _first_difference(one, other)
        key = f"{key}.{inner}"
    return key, one, other


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."


def verify(directory: Path) -> list[str]:
    """Rehashes every file of the data set in `directory`; one sentence for each damaged shard, none when it is whole."""
    manifest = read_manifest(directory)
    damages: list[str] = []
    if (directory / RECIPE).exists():  # checkpoints have none
        try:
            read_recipe(directory)
        except UserError as error:
            damages.append(str(error))
    records: list[Record] = []
    for stem in manifest["shards"]:
        try:
            records.append(read_shard(directory, stem, None))
            check_hashes(directory, stem, records[-1])
        except UserError as error:
            damages.append(str(error))
    if len(records) == len(manifest["shards"]) and data_id(records) != manifest["data_id"]:
        damages.append(f"{directory / MANIFEST} has another data id than its records give: a record was changed; run the stage again")
    return damages
