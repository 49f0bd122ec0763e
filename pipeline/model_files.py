"""The files that decide what a language model computes and which ids a tokenizer gives: found and hashed, without torch.

A name means one of three things (see `pipeline.config.schema.PretrainedName`): `demo`, the model shipped in this package; an
absolute path; else a name on the Hugging Face hub, of which the local cache holds copies:

    <cache>/models--EleutherAI--pythia-70m/
      refs/main                     the commit that a branch or tag was when something of it was last downloaded
      snapshots/<commit>/           config.json, model.safetensors, ... of that commit

A record of such files is {"files": {"config.json": "51f0...", "model.safetensors": "a2c4..."}, "content": "77ab..."}: xxh3-128 of
each file's bytes, but of a config.json only of what it says of the matter, and a sha256 over all. That of a model with its own
weights has `data_id` besides, the hash that its activations carry.
"""

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from pipeline import records, weight_files
from pipeline.config.errors import UserError

DEMO_MODEL = Path(__file__).parent / "demo" / "model"

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "tekken.json"),
    *("vocab.*", "*.model", "*.model.v*", "*.tiktoken"),
)
"""What transformers makes a tokenizer of, whichever there are; `*` stands for any letters."""
_TOKENIZER_KEYS = ("model_type", "model_name", "tokenizer_class", "auto_map")
"""What of a config.json decides which kind of tokenizer transformers makes."""

_DROPOUT = re.compile(rb'"dropout"\s*:\s*([^\s,}]+)')

# Say where and by what a model was saved, not what it computes; `dtype` is the format of the file, whose bytes are hashed anyway.
_CONFIG_KEYS_WITHOUT_MEANING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}

Record = dict[str, Any]
HashFile = Callable[[Path], str]


class Place(NamedTuple):
    """Where a language model or tokenizer lies on this machine."""

    path: Path
    """A directory, or a tokenizer.json."""
    commit: str | None
    """Of what the cache holds of the hub; None for anything else."""


# -- finding ----------------------------------------------------------------------------------------------------------


def local_path(name: str) -> Path | None:
    """Where the files of `name` lie if it is `demo` or a path; None for a name on the hub."""
    if name == "demo":
        return DEMO_MODEL
    return Path(name) if name.startswith("/") else None


def location(name: str, field: str) -> str:
    """What transformers is given for the `name` in `field`. Raises `UserError` where it isn't there, or transformers would err."""
    path = local_path(name)
    if path is not None and not path.exists():
        raise UserError(f"{field} is {name}, which does not exist; put it back, or give a path that is there")
    if path is None and Path(name).exists():
        raise UserError(
            f"{field} is {name}, a name on the hub, but transformers would take {Path(name).absolute()} for it; start this in another "
            "directory, or give that path if it is the one that you mean"
        )
    return name if path is None else str(path)


def hub_cache(variables: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps what it downloads."""
    home = variables.get("HF_HOME") or Path(variables.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expandvars(cache)).expanduser()


def find(name: str, revision: str | None, variables: Mapping[str, str] = os.environ) -> Place | None:
    """Where `name` lies, or would; None for a name and revision on the hub that the cache holds nothing of."""
    path = local_path(name)
    if path is not None:
        return Place(path, None)
    directory = hub_cache(variables) / f"models--{name.replace('/', '--')}"
    reference = directory / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or "main"
    snapshot = directory / "snapshots" / commit
    return Place(snapshot, commit) if snapshot.is_dir() else None


def commit_on_hub(name: str, revision: str | None) -> str | None:
    """The commit that `revision` is on the hub now, its config.json then being in the cache; None where the hub can't be asked.

    Asks the network. What transformers says of a wrong name or revision it says better.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they are redrawn with carriage returns even in a log file
    from huggingface_hub import hf_hub_download

    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        try:
            return Path(hf_hub_download(name, file, revision=revision)).relative_to(hub_cache()).parts[2]
        except (OSError, ValueError):
            continue
    return None


# -- hashing ----------------------------------------------------------------------------------------------------------


def language_model_record(directory: Path, *, random_weights: bool = False, hash_file: HashFile = records.hash_file) -> Record:
    """The record of the model in `directory`; with `random_weights` of its architecture alone. Raises `UserError` where files lack.

    hash_file : gives the xxh3-128 of a file.
    """
    config = read_config(directory)
    files = {"config.json": _hash_of(_meaning(config))}
    if random_weights:
        return _with_content(files)
    weights = {str(path.relative_to(directory)): hash_file(path) for path in weight_files.files_in(directory, config)}
    return _with_content(files | weights) | {"data_id": with_config(" ".join(weights.values()), config)}


def tokenizer_record(path: Path, *, hash_file: HashFile = records.hash_file) -> Record:
    """The record of the tokenizer in the directory, or of the tokenizer.json, at `path`. Raises `UserError` where there is none."""
    if path.is_file():
        return _with_content({path.name: hash_file(path)})
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file()) if path.is_dir() else []
    files = {name: hash_file(path / name) for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in TOKENIZER_FILES)}
    if not files:
        raise UserError(f"{path} holds no tokenizer.json, nor anything else that makes a tokenizer")
    if "config.json" in names:
        config = read_config(path)
        files["config.json"] = _hash_of({key: config[key] for key in _TOKENIZER_KEYS if key in config})
    return _with_content(files)


def tokenizer_files(name: str, revision: str | None) -> dict[str, str] | None:
    """The hash of each file of the tokenizer called `name`; None if nothing of it is on this machine."""
    place = find(name, revision)
    return None if place is None else dict(tokenizer_record(place.path)["files"])


def tokenizer_fault(path: Path) -> str | None:
    """Why the tokenizer in the directory, or the tokenizer.json, at `path` gives other ids each time; None if nothing there says so."""
    file, settings = (path / "tokenizer.json", path / "tokenizer_config.json") if path.is_dir() else (path, None)
    if dropout := _dropout(file):
        return (
            f"{file} has model.dropout {dropout:g}, which drops merges at random, so that a text has other ids each time; name a copy "
            "of it with that set to null"
        )
    sampling = (_read_object(settings).get("sp_model_kwargs") or {}) if settings is not None else {}
    if isinstance(sampling, dict) and sampling.get("enable_sampling"):
        return f"{settings} has sp_model_kwargs.enable_sampling, so that a text has other ids each time; name a copy of it without that"
    return None


def _dropout(file: Path) -> float:
    """The share of merges that a tokenizer.json drops. Vocabularies have a token `dropout` too: the file is parsed only if need be."""
    content = file.read_bytes() if file.is_file() else b""
    if not any(value not in (b"null", b"0", b"0.0") for value in _DROPOUT.findall(content)):
        return 0.0
    model = _read_object(file).get("model")
    dropout = model.get("dropout") if isinstance(model, dict) else None
    return float(dropout) if isinstance(dropout, int | float) else 0.0


def _read_object(file: Path) -> dict[str, Any]:
    """What a JSON file says; nothing where it is missing or of another form, which whoever loads it says better."""
    try:
        value = records.read_json(file)
    except UserError:
        return {}
    return value if isinstance(value, dict) else {}


def own_code(directory: Path, *, tokenizer: bool = False) -> list[str]:
    """A sentence for the log if the model, or tokenizer, in `directory` names Python code beside it: that is never run."""
    wanted = {
        name: entry
        for file in ("config.json", "tokenizer_config.json")
        for name, entry in (_read_object(directory / file).get("auto_map") or {}).items()
        if (name == "AutoTokenizer") == tokenizer
    }
    if not wanted:
        return []
    what = "tokenizer" if tokenizer else "model"
    said = f"{directory} names Python code of its own for the {what} (auto_map: {', '.join(wanted)}); "
    return [f"{said}it is not used, transformers' own {what} of that type is"]


def read_config(directory: Path) -> dict[str, Any]:
    """What the config.json in `directory` says. Raises `UserError` where it is missing or not of that form."""
    config = records.read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{directory / 'config.json'} holds a {type(config).__name__}, expected a JSON object: it is not a model's")
    return config


def with_config(weights_hash: str, config: dict[str, Any]) -> str:
    """The hash of a model: that of its weights and of what its config.json says of what it computes."""
    return hashlib.sha256(f"{weights_hash}\n{json.dumps(_meaning(config), sort_keys=True, default=str)}".encode()).hexdigest()


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _CONFIG_KEYS_WITHOUT_MEANING}


def _hash_of(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True, default=str).encode())


def _with_content(files: dict[str, str]) -> Record:
    listing = "\n".join(f"{name}\0{content_hash}" for name, content_hash in sorted(files.items()))
    return {"files": files, "content": hashlib.sha256(listing.encode()).hexdigest()}


# -- comparing --------------------------------------------------------------------------------------------------------


def changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A phrase for each file that is not in the record `now` what it was in `before`; none where one of the two names no files."""
    one, other = before.get("files"), now.get("files")
    if one is None or other is None:
        return []
    phrases = [f"{name} was changed" for name in one if name in other and one[name] != other[name]]
    if "commit" not in before:  # of a commit the cache may hold more files at one time than at another
        phrases += [f"{name} is missing" for name in one if name not in other]
        phrases += [f"{name} was added" for name in other if name not in one]
    return phrases
