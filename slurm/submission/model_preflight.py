"""Looks on the login node whether a language model and a tokenizer are there: a directory, or the hub's local cache.

Without transformers, which takes seconds to be imported.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pipeline
from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.schema import Config
from pipeline.config.stage import StageConfig
from pipeline.config.tokenize_text import TokenizerConfig

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
DEMO_MODEL = Path(pipeline.__file__).parent / "demo" / "model"
MODEL_FILES = ("config.json",)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of them is there wherever a tokenizer is."""
TRUE = ("1", "true", "yes", "on")


def faults_of(config: LanguageModelConfig, variables: Mapping[str, str] = os.environ) -> list[str]:
    """Why the model can't be loaded, as far as that can be seen without a network; one phrase or none."""
    name = config.model
    directory = Path(name).expanduser()
    if name == "demo":
        return []
    if directory.is_dir():
        return [] if (directory / "config.json").is_file() else [f"language_model.model is {name}, a directory without a config.json"]
    if name.startswith((".", "/", "~")):
        return [f"language_model.model is {name}, but there is no such directory; give a model's directory or its name on the hub"]
    return _hub_faults("language_model.model", name, config.revision, MODEL_FILES, variables)


def tokenizer_faults(config: TokenizerConfig, variables: Mapping[str, str] = os.environ) -> list[str]:
    """Why the tokenizer can't be loaded, as far as that can be seen without a network; one phrase or none."""
    name, path = config.name, Path(config.name).expanduser()
    if name == "demo" or path.is_file():
        return []
    if path.is_dir():
        there = any((path / file).is_file() for file in TOKENIZER_FILES)
        return [] if there else [f"tokenizer.name is {name}, a directory without a tokenizer.json"]
    if name.startswith((".", "/", "~")):
        return [f"tokenizer.name is {name}, but there is nothing there; give a directory, a tokenizer.json or a name on the hub"]
    return _hub_faults("tokenizer.name", name, config.revision, TOKENIZER_FILES, variables)


def _hub_faults(field: str, name: str, revision: str | None, files: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    if not HUB_NAME.fullmatch(name):
        return [f"{field} is {name!r}, neither a directory here nor a name on the hub, such as EleutherAI/pythia-70m"]
    offline = next((key for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if variables.get(key, "").lower() in TRUE), None)
    if offline is None or cached_file(name, revision, files, variables):
        return []
    found = f"{field} is {name}, which is not in the local cache {hub_cache(variables)}, and {offline} forbids to download it"
    return [f"{found}; check the name, or run `hf download {name}` where there is a network"]


def notices(configs: Sequence[StageConfig], variables: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each model or tokenizer that a job will have to download: a wrong name shows only then."""
    absent = dict.fromkeys(
        (field, name)
        for field, name, revision, files in (entry for config in configs for entry in _loaded_by(config))
        if name != "demo" and not Path(name).expanduser().exists() and not cached_file(name, revision, files, variables)
    )
    return [
        f"{field} {name} is not in the local cache {hub_cache(variables)}: the job will download it; if it has no network, "
        f"run `hf download {name}` here first"
        for field, name in absent
    ]


def _loaded_by(config: Config) -> Iterator[tuple[str, str, str | None, Sequence[str]]]:
    """Field, name, revision and telling files of each model and tokenizer that a configuration names."""
    for key in type(config).model_fields:
        value = getattr(config, key)
        if isinstance(value, LanguageModelConfig):
            yield "language_model.model", value.model, value.revision, MODEL_FILES
        elif isinstance(value, TokenizerConfig):
            yield "tokenizer.name", value.name, value.revision, TOKENIZER_FILES
        elif isinstance(value, Config):
            yield from _loaded_by(value)


def config_file(config: LanguageModelConfig, variables: Mapping[str, str] = os.environ) -> Path | None:
    """The model's config.json, of its directory or of the hub's cache; None where it is not on this machine."""
    directory = DEMO_MODEL if config.model == "demo" else Path(config.model).expanduser()
    if (directory / "config.json").is_file():
        return directory / "config.json"
    return cached_file(config.model, config.revision, MODEL_FILES, variables)


def hub_cache(variables: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it downloads."""
    home = Path(variables.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = variables.get("HF_HUB_CACHE") or Path(variables.get("HF_HOME") or home) / "hub"
    return Path(cache).expanduser()


def cached_file(name: str, revision: str | None, files: Sequence[str], variables: Mapping[str, str]) -> Path | None:
    """The first of `files` that the cache holds of a name on the hub, in the revision that is asked for."""
    directory = hub_cache(variables) / f"models--{name.replace('/', '--')}"
    reference = directory / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or "main"
    found = (directory / "snapshots" / commit / file for file in files)
    return next((path for path in found if path.exists()), None)
