"""Looks on the login node whether a language model and a tokenizer are there: a directory, or the hub's local cache.

Without transformers, which takes seconds to be imported.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import model_kinds, weight_files
from pipeline.config.errors import UserError
from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.pretrained import Pretrained, pretrained_in
from pipeline.config.stage import StageConfig
from pipeline.config.tokenize_text import TokenizerConfig
from pipeline.model_files import find, hub_cache, local_path, read_config, tokenizer_fault

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
MODEL_FILES = ("config.json",)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of them is there wherever a tokenizer is."""
TRUE = ("1", "true", "yes", "on")


def faults_of(config: LanguageModelConfig, variables: Mapping[str, str] = os.environ, *, field: str = "language_model") -> list[str]:
    """Why the model in `field` can't be loaded, as far as that can be seen without a network; one phrase or none."""
    path = local_path(config.model)
    if path is None:
        return _hub_faults(f"{field}.model", config.model, config, variables)
    if not path.is_dir():
        there = "a file, not a directory" if path.exists() else "which does not exist"
        return [f"{field}.model is {config.model}, {there}; give a model's directory, or its name on the hub"]
    if not telling_file(config, variables):
        return [f"{field}.model is {config.model}, a directory without a config.json"]
    return _directory_faults(field, config, path)


def _directory_faults(field: str, config: LanguageModelConfig, directory: Path) -> list[str]:
    """What speaks against the kind and the weights of the model in `directory`, which has a config.json."""
    try:
        said = read_config(directory)
    except UserError as error:
        return [f"{field}.model: {error}"]
    if (kind := model_kinds.fault(said)) is not None:
        return [f"{field}.model is {config.model}, whose {kind}"]
    faults = [] if config.random_weights else weight_files.faults(directory, said)
    return [f"{field}.model: {fault}" for fault in faults]


def tokenizer_faults(config: TokenizerConfig, variables: Mapping[str, str] = os.environ) -> list[str]:
    """Why the tokenizer can't be loaded, as far as that can be seen without a network; one phrase or none."""
    path = local_path(config.name)
    if path is None:
        return _hub_faults("tokenizer.name", config.name, config, variables)
    if not path.exists():
        return [f"tokenizer.name is {config.name}, which does not exist; give a directory, a tokenizer.json or a name on the hub"]
    if not path.is_file() and not telling_file(config, variables):
        return [f"tokenizer.name is {config.name}, a directory without a tokenizer.json"]
    fault = tokenizer_fault(path)
    return [] if fault is None else [f"tokenizer.name: {fault}"]


def _hub_faults(field: str, name: str, config: Pretrained, variables: Mapping[str, str]) -> list[str]:
    if not HUB_NAME.fullmatch(name):
        return [f"{field} is {name!r}, neither a directory here nor a name on the hub, such as EleutherAI/pythia-70m"]
    found = telling_file(config, variables)
    if found is None and (mistyped := _mistyped_path(name)) is not None:
        return [f"{field} is {name}, {mistyped}"]
    offline = next((key for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if variables.get(key, "").lower() in TRUE), None)
    if found is not None and isinstance(config, LanguageModelConfig):
        return _cached_faults(field.removesuffix(".model"), config, found.parent, offline)
    if offline is None or found is not None:
        return []
    absent = f"{field} is {name}, which is not in the local cache {hub_cache(variables)}, and {offline} forbids to download it"
    return [f"{absent}; check the name, or run `hf download {name}` where there is a network"]


def _mistyped_path(name: str) -> str | None:
    """A phrase if `name`, which is no path here, begins with a directory that is: `models/lama` beside `models/llama/`."""
    path = Path(name)
    if len(path.parts) < 2 or not path.parent.is_dir():
        return None
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()), n=1)
    hint = f"did you mean `{path.parent / near[0]}`?" if near else "give a path that is there."
    return (
        f"but there is nothing at {path.absolute()}, and the local cache of the hub has no such name; {hint} If it is a name on the hub, "
        f"run `hf download {name}` first"
    )


def _cached_faults(field: str, config: LanguageModelConfig, directory: Path, offline: str | None) -> list[str]:
    """What speaks against the kind of a model in the cache; and against its weights, where none can be downloaded any more."""
    if offline is not None:
        return _directory_faults(field, config, directory)
    return _directory_faults(field, config.model_copy(update={"random_weights": True}), directory)  # the job downloads what lacks


def notices(configs: Sequence[StageConfig], variables: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each model or tokenizer that a job will have to download: a wrong name shows only then."""
    named = [pair for config in configs for pair in pretrained_in(config).items()]
    absent = dict.fromkeys(
        (f"{field}.{_key(entry)}", _name(entry))
        for field, entry in named
        if not telling_file(entry, variables) and local_path(_name(entry)) is None
    )
    return [
        f"{field} {name} is not in the local cache {hub_cache(variables)}: the job will download it; if it has no network, "
        f"run `hf download {name}` here first"
        for field, name in absent
    ]


def telling_file(config: Pretrained, variables: Mapping[str, str] = os.environ) -> Path | None:
    """The file that tells that the model (its config.json) or tokenizer is there; None where it is not on this machine."""
    place = find(_name(config), config.revision, variables)
    files = MODEL_FILES if isinstance(config, LanguageModelConfig) else TOKENIZER_FILES
    return next((place.path / file for file in files if (place.path / file).is_file()), None) if place else None


def _key(config: Pretrained) -> str:
    return "model" if isinstance(config, LanguageModelConfig) else "name"


def _name(config: Pretrained) -> str:
    return config.model if isinstance(config, LanguageModelConfig) else config.name
