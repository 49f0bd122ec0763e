"""The language models and tokenizers that a configuration names, wherever in it they stand."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.schema import Config
from pipeline.config.tokenize_text import TokenizerConfig

Pretrained = LanguageModelConfig | TokenizerConfig

C = TypeVar("C", bound=Config)


def pretrained_in(config: Config) -> dict[str, Pretrained]:
    """What `config` and its groups name, by the last part of the field: `activations.language_model` is `language_model`, the entry `chat`
    of `activations.language_models` is `language_models.chat`."""
    found: dict[str, Pretrained] = {}
    for key in type(config).model_fields:
        value = getattr(config, key)
        inner: dict[str, Pretrained] = {}
        if isinstance(value, Pretrained):
            inner = {key: value}
        elif isinstance(value, Config):
            inner = pretrained_in(value)
        elif isinstance(value, dict):
            inner = {f"{key}.{name}": entry for name, entry in value.items() if isinstance(entry, Pretrained)}
        assert not found.keys() & inner.keys(), f"two fields are called {', '.join(inner)}, so their records would be one"
        found |= inner
    return found


def at_commits(config: C, commits: Mapping[str, str]) -> C:
    """`config` with the revision of each field in `commits`, named as `pretrained_in` does, set to that commit."""
    update: dict[str, Any] = {}
    for key in type(config).model_fields:
        value = getattr(config, key)
        if isinstance(value, Pretrained):
            update |= {key: value.model_copy(update={"revision": commits[key]})} if key in commits else {}
        elif isinstance(value, Config):
            update[key] = at_commits(value, commits)
        elif isinstance(value, dict):
            update[key] = {name: _at_commit(entry, commits.get(f"{key}.{name}")) for name, entry in value.items()}
    return config.model_copy(update=update)


def _at_commit(entry: Any, commit: str | None) -> Any:
    return entry.model_copy(update={"revision": commit}) if commit is not None else entry
