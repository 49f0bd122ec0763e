"""Whether language models are those that activations were computed with."""

from typing import NamedTuple

from pipeline.activations.source import Provenance
from pipeline.config.language_models import field_of
from pipeline.language_models import Models, each


class OtherModel(NamedTuple):
    """What is given in place of what activations are of, in words for a sentence."""

    given: str
    """Setting, name and hash: `language_model.model gpt2 has hash 51f0...`."""
    known: str
    """`a language model of hash a2c4...`"""


def other_model(provenance: Provenance, models: Models) -> OtherModel | None:
    """The first of `models` that the activations are not of; None if they are of just these."""
    if models.hash == provenance.language_model_hash:
        return None
    known = provenance.language_models or {"": provenance.language_model_hash}
    given = each(models)
    if known.keys() != given.keys():
        return OtherModel(_fields(list(given)), _fields(list(known)))
    name = next(name for name, model in given.items() if model.hash != known[name])
    called = f", {name}," if name else ""
    found = f"{field_of(name)}.model {given[name].name} has {_short(given[name].hash)}"
    return OtherModel(found, f"a language model{called} of hash {_short(known[name])}")


def _fields(names: list[str]) -> str:
    return "one language_model" if names == [""] else f"language_models called {', '.join(names)}"


def _short(content_hash: str) -> str:
    return content_hash[:12] if content_hash else "(none)"
