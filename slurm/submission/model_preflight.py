"""Looks on the login node whether a language model is there: its directory, or the hub's local cache. Without transformers."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.schema import Config
from pipeline.config.stage import StageConfig

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
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
    if not HUB_NAME.fullmatch(name):
        return [f"language_model.model is {name!r}, neither a directory here nor a name on the hub, such as EleutherAI/pythia-70m"]
    offline = next((key for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if variables.get(key, "").lower() in TRUE), None)
    if offline is None or is_cached(config, variables):
        return []
    found = f"language_model.model is {name}, which is not in the local cache {hub_cache(variables)}, and {offline} forbids to download it"
    return [f"{found}; check the name, or run `hf download {name}` where there is a network"]


def notices(configs: Sequence[StageConfig], variables: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each model that a job will have to download: a wrong name shows only then."""
    models = [model for config in configs for model in _models_in(config)]
    absent = dict.fromkeys(model.model for model in models if _is_on_hub(model) and not is_cached(model, variables))
    return [
        f"language_model.model {name} is not in the local cache {hub_cache(variables)}: the job will download it; if it has no network, "
        f"run `hf download {name}` here first"
        for name in absent
    ]


def _models_in(config: Config) -> Iterator[LanguageModelConfig]:
    for key in type(config).model_fields:
        value = getattr(config, key)
        if isinstance(value, LanguageModelConfig):
            yield value
        elif isinstance(value, Config):
            yield from _models_in(value)


def _is_on_hub(config: LanguageModelConfig) -> bool:
    return config.model != "demo" and not Path(config.model).expanduser().is_dir()


def hub_cache(variables: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it downloads."""
    home = Path(variables.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = variables.get("HF_HUB_CACHE") or Path(variables.get("HF_HOME") or home) / "hub"
    return Path(cache).expanduser()


def is_cached(config: LanguageModelConfig, variables: Mapping[str, str] = os.environ) -> bool:
    """Whether the cache holds the model's config.json in the revision that is asked for."""
    directory = hub_cache(variables) / f"models--{config.model.replace('/', '--')}"
    revision = config.revision or "main"
    reference = directory / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    return (directory / "snapshots" / commit / "config.json").exists()
