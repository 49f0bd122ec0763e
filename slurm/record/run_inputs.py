"""What a run reads, by content: recorded when it is frozen, checked when it starts.

inputs.json has an entry a field of the configuration:

    {"tokens":     {"path": "/data/tokens/demo/train", "kind": "data set", "data_id": "9f2c..."},
     "crosscoder": {"path": "/runs/train/demo/20261123-...", "kind": "run", "run": "train/demo/20261123-...", "content": "77a0..."},
     "crosscoder": {"path": "/runs/train/demo/20261123-.../checkpoints/00000391", "kind": "checkpoint", "content": "3917..."},
     "source":     {"path": "/data/text", "kind": "files", "content": "01bb...", "by": "bytes"},
     "activations": {"path": "/ssd/activations/demo", "kind": "pending", "made_by": "/runs/cache/demo/20261123-..."},
     "language_model": {"kind": "language model", "name": "EleutherAI/pythia-70m", "revision": null, "commit": "a39f...",
                        "files": {"config.json": "51f0...", "model.safetensors": "a2c4..."}, "content": "0d1f...", "data_id": "77ab..."},
     "tokenizer": {"kind": "tokenizer", "name": "/models/llama", "revision": null, "files": {"tokenizer.json": "c3d1..."}, "content": ...}}

`data_id` is the identity that the manifest gives. `content` of a run is a hash of its results, of a checkpoint the identity of its
manifest, of other files a hash of their names and bytes; where they hold over `MOST_BYTES_READ`, of names, sizes and times, and their
bytes are not read (`by` says which; without it: times). A pending input doesn't exist yet; the job
that reads it completes the entry once the run that makes it has sealed it.

A language model and a tokenizer are known by the bytes of their files (see `pipeline.model_files`), one of which weights are drawn at
random (`"random_weights": true`) by its config.json. `commit` is what the revision on the hub was when the run was frozen, which the
job then loads. What only the hub has is bound by the job, as it first uses it: commit, files and `data_id` are added then, those of
a run that is divided in `bound/<field>.json`, so that all of its tasks read the same. `data_id` is what the stage itself found when
it had loaded it: the hash of a model, which is known before unless its weights are drawn, or of what a tokenizer does.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from pipeline import model_files, records
from pipeline.config.errors import UserError
from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.pretrained import Pretrained, pretrained_in
from pipeline.config.stage import StageConfig
from pipeline.model_files import HashFile
from slurm.record.run_directory import RunDirectory

Entry = dict[str, Any]

PRETRAINED = ("language model", "tokenizer")
"""The kinds whose entry names files of a model."""
BYTES, TIMES = "bytes", "times"
MOST_BYTES_READ = 64 << 20
"""Of files that are no data set, all together: these are read in 50 ms or so, and touching them changes nothing."""
SUBJECT = ("path", "name", "revision", "random_weights")
"""What an entry is of; all else says what was found there."""


def describe_all(
    config: StageConfig,
    pending: dict[str, Path],
    where: str,
    *,
    hash_file: HashFile = records.hash_file,
    before: Mapping[str, Entry] | None = None,
) -> dict[str, Entry]:
    """The entry of each of the configuration's inputs, its language models and tokenizers among them.

    pending : the run that will make a field's input.
    hash_file : gives the xxh3-128 of a model's file.
    before : entries of the run whose code and configuration are taken; what is the same on the hub has the commit that it had then.
    """
    entries: dict[str, Entry] = {}
    for field, path in config.inputs().items():
        if field in pending:
            entries[field] = {"path": str(path), "kind": "pending", "made_by": str(pending[field])}
            continue
        try:
            entries[field] = describe(path, like=(before or {}).get(field))
        except UserError as error:
            raise UserError(f"{where}: {config.field_of_input(field)}: {error}") from None
    return entries | describe_pretrained(config, where, hash_file=hash_file, before=before or {})


def describe_pretrained(
    config: StageConfig, where: str, *, hash_file: HashFile = records.hash_file, before: Mapping[str, Entry] | None = None
) -> dict[str, Entry]:
    """The entries of the configuration's language models and tokenizers alone (see `describe_all`)."""
    entries = {}
    for field, named in pretrained_in(config).items():
        try:
            entries[field] = _described(named, (before or {}).get(field, {}), hash_file)
        except UserError as error:
            raise UserError(f"{where}: {field}: {error}") from None
    return entries


def describe(path: Path, *, like: Entry | None = None) -> Entry:
    """What stands at `path` now. Raises `UserError` if nothing does, or if it isn't finished.

    like : an earlier entry; what is no data set and no run is described in the same way, so that the two can be compared.
    """
    if (path / records.MANIFEST).exists():
        manifest = records.read_manifest(path)
        if str(manifest["format"]).startswith("checkpoint/"):
            # Its data id is no `data_id` here: that is what the stage finds, the identity of the crosscoder in it.
            return {"path": str(path), "kind": "checkpoint", "content": manifest["data_id"]}
        return {"path": str(path), "kind": "data set", "data_id": manifest["data_id"]}
    if (path / "job.json").exists():
        return {"path": str(path), "kind": "run", "run": RunDirectory(path).reference, "content": _run_content(path)}
    if (path / records.RECIPE).exists():
        raise UserError(f"{path} has no {records.MANIFEST}: it is not a finished data set; run the stage that makes it again, it resumes")
    if not path.exists() and any(letter in str(path) for letter in "*?["):
        return {"path": str(path), "kind": "files"} | _of_files(Path(path.anchor), str(path.relative_to(path.anchor)), like)
    if not path.exists():
        raise UserError(f"{path} does not exist; run the stage that makes it first, or submit both in one chain")
    return {"path": str(path), "kind": "files"} | _of_files(path, "**/*", like)


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


def _of_files(path: Path, pattern: str, like: Entry | None) -> Entry:
    """The content of the file at `path`, or of those that `pattern` finds below it, and by what it is known."""
    files = [path] if path.is_file() else sorted(p for p in path.glob(pattern) if p.is_file())
    if not files:
        raise UserError(f"{path / pattern} names no file")
    is_small = sum(file.stat().st_size for file in files) <= MOST_BYTES_READ
    by = like.get("by", TIMES) if like is not None and like.get("kind") == "files" else BYTES if is_small else TIMES
    known = {file: records.hash_file(file) if by == BYTES else f"{file.stat().st_size}\0{file.stat().st_mtime_ns}" for file in files}
    listing = "\n".join(f"{file.relative_to(path)}\0{content}" for file, content in known.items())
    return {"content": hashlib.sha256(listing.encode()).hexdigest()} | ({"by": BYTES} if by == BYTES else {})


def _described(named: Pretrained, before: Entry, hash_file: HashFile) -> Entry:
    """The entry of a language model or tokenizer, at the commit of `before` if that is of the same."""
    if isinstance(named, LanguageModelConfig):
        entry: Entry = {"kind": "language model", "name": named.model, "revision": named.revision}
        entry |= {"random_weights": True} if named.random_weights else {}
    else:
        entry = {"kind": "tokenizer", "name": named.name, "revision": named.revision}
    if not is_of_the_same(before, entry):
        return _found(entry, hash_file)
    if entry["name"] == "demo":  # it is part of the code, which is that of before
        return _as_frozen(before)
    found = _found(entry | ({"commit": before["commit"]} if "commit" in before else {}), hash_file)
    return _as_frozen(before) if "commit" in before and "files" not in found else found


def _as_frozen(entry: Entry) -> Entry:
    """The entry without what its stage found: other versions of the libraries may call the same by another name."""
    is_known_before = entry["kind"] == "language model" and "random_weights" not in entry
    return {key: value for key, value in entry.items() if key != "data_id" or is_known_before}


def _found(entry: Entry, hash_file: HashFile) -> Entry:
    """What lies on this machine of the language model or tokenizer that `entry` is of; of what only the hub has, as much as is known."""
    entry = {key: entry[key] for key in ("kind", *SUBJECT, "commit") if key in entry}
    place = model_files.find(entry["name"], entry.get("commit") or entry["revision"])
    if place is None:
        return entry
    entry |= {"commit": place.commit} if place.commit is not None else {}
    try:
        if entry["kind"] == "tokenizer":
            return entry | model_files.tokenizer_record(place.path, hash_file=hash_file)
        return entry | model_files.language_model_record(place.path, random_weights="random_weights" in entry, hash_file=hash_file)
    except UserError:
        if place.commit is None:
            raise
        return entry  # the cache holds a part; the job will download the rest of that commit


def bind_commits(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries with the commit that each language model and tokenizer has on the hub now, if they don't say which. Asks the hub."""
    bound = dict(entries)
    for field, entry in entries.items():
        is_open = entry.get("kind") in PRETRAINED and "commit" not in entry and model_files.local_path(entry["name"]) is None
        if is_open and (commit := model_files.commit_on_hub(entry["name"], entry["revision"])) is not None:
            bound[field] = entry | {"commit": commit}
    return bound


def commits(entries: Mapping[str, Entry]) -> dict[str, str]:
    """The commit that the job loads, for each field that is bound to one."""
    return {field: entry["commit"] for field, entry in entries.items() if "commit" in entry}


def is_of_the_same(one: Entry, other: Entry) -> bool:
    """Whether both are of the same path, or of the same name and revision, whatever was found there."""
    return all(one.get(key) == other.get(key) for key in SUBJECT)


def was_read(now: Entry, recorded: Entry) -> bool:
    """Whether a run whose entry is `recorded` read what is there now; a language model or tokenizer may have lain elsewhere then."""
    if now["kind"] not in PRETRAINED:
        return all(recorded.get(key) == value for key, value in now.items())
    return "content" in now and all(recorded.get(key) == now.get(key) for key in ("kind", "content", "random_weights"))


def check_all(entries: Mapping[str, Entry], hash_file: HashFile = records.hash_file) -> dict[str, Entry]:
    """The entries with what was pending completed. Raises `UserError` naming each input that is not what was frozen.

    hash_file : gives the xxh3-128 of a model's file.
    """
    completed: dict[str, Entry] = {}
    faults = []
    for field, entry in entries.items():
        if entry.get("kind") not in PRETRAINED and "path" not in entry:  # a stage's own entry: the stage checks it
            completed[field] = entry
            continue
        try:
            now = _found(entry, hash_file) if entry["kind"] in PRETRAINED else describe(Path(entry["path"]), like=entry)
        except UserError as error:
            faults.append(f"{field}: {error}")
            continue
        completed[field] = entry if entry["kind"] in PRETRAINED else {**entry, **now}  # what lacks there, the stage will bind
        if fault := difference(entry, now):
            faults.append(f"{field} ({entry.get('name') or entry['path']}) {fault}")
    if faults:
        raise UserError(f"the inputs are not those that this run was frozen with: {'; '.join(faults)}")
    return completed


def difference(before: Entry, now: Entry) -> str | None:
    """In what an input is not what it was, and what to do; None if in nothing that both entries tell."""
    if before["kind"] == "pending":
        return None
    if before["kind"] != now["kind"]:
        return f"was a {before['kind']}, is a {now['kind']}"
    if before["kind"] in PRETRAINED:
        changed = ", ".join(model_files.changed_files(before, now))
        return f"is another one: {changed}; put back what it was, or submit a new run" if changed else None
    key = "data_id" if before["kind"] == "data set" else "content"  # a stage may have bound its own identity of a run as data_id
    if before[key] == now[key]:
        return None
    return f"had {key.replace('_', ' ')} {before[key][:12]}, has {now[key][:12]}: the data changed; restore it, or submit a new run"


def check_unchanged(before: Mapping[str, Entry], now: Mapping[str, Entry], reference: str) -> None:
    """Raises `UserError` naming what the run `reference` read, and what is no more what it was then."""
    pairs = {field: (before[field], entry) for field, entry in now.items() if "kind" in before.get(field, {})}
    faults = [
        f"{field} ({entry.get('name') or entry['path']}) {fault}"
        for field, (old, entry) in pairs.items()
        if is_of_the_same(old, entry) and (fault := difference(old, entry))
    ]
    if faults:
        raise UserError(f"{reference} can't be run again as it was: {'; '.join(faults)}")
