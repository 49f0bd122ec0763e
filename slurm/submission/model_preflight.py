"""Looks on the login node whether a language model and a tokenizer are there: a directory, or the hub's local cache.

Without transformers, which takes seconds to be imported.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import weight_files
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
    return [] if config.random_weights else [f"{field}.model: {fault}" for fault in _weights_faults(path)]


def _weights_faults(directory: Path) -> list[str]:
    try:
        config = read_config(directory)
    except UserError as error:
        return [str(error)]
    return weight_files.faults(directory, config)


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
    offline = next((key for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if variables.get(key, "").lower() in TRUE), None)
    if offline is None or telling_file(config, variables):
        return []
    found = f"{field} is {name}, which is not in the local cache {hub_cache(variables)}, and {offline} forbids to download it"
    return [f"{found}; check the name, or run `hf download {name}` where there is a network"]


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
