"""What a run reads, by content: recorded when it is frozen, checked when it starts.

inputs.json has an entry a field of the configuration:

    {"tokens":     {"path": "/data/tokens/demo/train", "kind": "data set", "data_id": "9f2c..."},
     "crosscoder": {"path": "/runs/train/demo/20261123-...", "kind": "run", "run": "train/demo/20261123-...", "content": "77a0..."},
     "source":     {"path": "/data/text", "kind": "files", "content": "01bb..."},
     "activations": {"path": "/ssd/activations/demo", "kind": "pending", "made_by": "/runs/cache/demo/20261123-..."}}

`data_id` is the identity that the manifest gives. `content` of a run is a hash of its results, of other files a hash of
their names, sizes and times: their bytes are not read. A pending input doesn't exist yet; the job that reads it
completes the entry once the run that makes it has sealed it.
"""

import hashlib
from pathlib import Path
from typing import Any

import xxhash

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.config.stage import StageConfig

Entry = dict[str, Any]


def describe_all(config: StageConfig, pending: dict[str, Path], where: str) -> dict[str, Entry]:
    """The entry of each of the configuration's inputs; `pending` names the run that will make a field's input."""
    entries: dict[str, Entry] = {}
    for field, path in config.inputs().items():
        if field in pending:
            entries[field] = {"path": str(path), "kind": "pending", "made_by": str(pending[field])}
            continue
        try:
            entries[field] = describe(path)
        except UserError as error:
            raise UserError(f"{where}: {field}: {error}") from None
    return entries


def describe(path: Path) -> Entry:
    """What stands at `path` now. Raises `UserError` if nothing does, or if it isn't finished."""
    if (path / records.MANIFEST).exists():
        return {"path": str(path), "kind": "data set", "data_id": records.read_manifest(path)["data_id"]}
    if (path / "job.json").exists():
        return {"path": str(path), "kind": "run", "run": "/".join(path.parts[-3:]), "content": _run_content(path)}
    if (path / records.RECIPE).exists():
        raise UserError(f"{path} has no {records.MANIFEST}: it is not a finished data set; run the stage that makes it again, it resumes")
    if not path.exists() and any(letter in str(path) for letter in "*?["):
        return {"path": str(path), "kind": "files", "content": _names_sizes_times(Path(path.anchor), str(path.relative_to(path.anchor)))}
    if not path.exists():
        raise UserError(f"{path} does not exist; run the stage that makes it first, or submit both in one chain")
    return {"path": str(path), "kind": "files", "content": _names_sizes_times(path)}


def _run_content(path: Path) -> str:
    results = sorted(path.glob("result.json")) + sorted(path.glob("tasks/*/result.json"))
    if not results:
        raise UserError(f"{path} is a run that has not ended; wait for it, or submit both in one chain")
    hashes = []
    for result in results:
        content = records.read_json(result)
        if content["status"] != "finished":
            raise UserError(f"{path} is a run that {content['status']}; resume it with `crosscoder submit --resume {path}` first")
        hashes.append(xxhash.xxh3_128_hexdigest(repr((content["ended"], content["result"])).encode()))
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _names_sizes_times(path: Path, pattern: str = "**/*") -> str:
    files = [path] if path.is_file() else sorted(p for p in path.glob(pattern) if p.is_file())
    if not files:
        raise UserError(f"{path / pattern} names no file")
    listing = "\n".join(f"{file.relative_to(path)}\0{file.stat().st_size}\0{file.stat().st_mtime_ns}" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def check_all(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries with what was pending completed. Raises `UserError` naming each input that is not what was frozen."""
    completed: dict[str, Entry] = {}
    faults = []
    for field, entry in entries.items():
        if "path" not in entry:  # a stage's own entry, such as a model's hash: the stage checks it
            completed[field] = entry
            continue
        try:
            now = describe(Path(entry["path"]))
        except UserError as error:
            faults.append(f"{field}: {error}")
            continue
        completed[field] = {**entry, **now}
        if entry["kind"] != "pending" and (fault := _difference(entry, now)):
            faults.append(f"{field} ({entry['path']}) {fault}")
    if faults:
        raise UserError(f"the inputs are not those that this run was frozen with: {'; '.join(faults)}")
    return completed


def _difference(before: Entry, now: Entry) -> str | None:
    if before["kind"] != now["kind"]:
        return f"was a {before['kind']}, is a {now['kind']}"
    key = "data_id" if before["kind"] == "data set" else "content"  # a stage may have bound its own identity of a run as data_id
    if before[key] == now[key]:
        return None
    return f"had {key.replace('_', ' ')} {before[key][:12]}, has {now[key][:12]}: the data changed; restore it, or submit a new run"
