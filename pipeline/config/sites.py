"""The names of sites: places in language models where activations are read and replaced.

    transformer.h.2                     the residual stream after block 2
    transformer.h.2.mlp_output          what block 2's MLP adds to the residual stream
    transformer.h.2.attention_output    what its attention adds
    chat/transformer.h.2                the residual stream of the model called chat, where there are several (`language_models`)

A mapping `{layer: transformer.h.2, point: mlp_output}` says the same as the second, `{model: chat, layer: transformer.h.2}` as the last.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator

RESIDUAL = "residual"
MLP_OUTPUT = "mlp_output"
ATTENTION_OUTPUT = "attention_output"
POINTS = (RESIDUAL, MLP_OUTPUT, ATTENTION_OUTPUT)

MODEL_KEY = re.compile(r"[A-Za-z]\w*", re.ASCII)
"""What a model may be called in `language_models`."""


class SiteName(NamedTuple):
    """A block, by its module path, a point of it, and the model that it is in."""

    block: str
    point: str = RESIDUAL
    model: str = ""
    """The model's key in `language_models`; empty where there is but one model, which has no name."""

    @classmethod
    def parse(cls, text: str) -> "SiteName":
        """Raises `ValueError` for a point that there is none of; whether the model has the block is not known here."""
        model, slash, path = text.rpartition("/")
        if slash and not MODEL_KEY.fullmatch(model):
            raise ValueError(f"{text} names the model {model!r}, expected a key of language_models before the slash: letters, digits and _")
        block, _, point = path.rpartition(".")
        if point in POINTS:
            return cls(block, point, model)
        # The name of a block ends with its number: what follows a number is meant as a point.
        if block.rpartition(".")[2].isdigit() and not point.isdigit():
            near = difflib.get_close_matches(point, POINTS, n=1)
            hint = f"did you mean {block}.{near[0]}?" if near else f"leave it away for {RESIDUAL}"
            raise ValueError(f"{text} names the point {point}, expected one of {', '.join(POINTS)}; {hint}")
        return cls(path, model=model)

    def __str__(self) -> str:
        return (f"{self.model}/" if self.model else "") + str(self.block if self.point == RESIDUAL else f"{self.block}.{self.point}")

    @property
    def in_its_model(self) -> str:
        """The site as its own model knows it."""
        return str(self._replace(model=""))


def _written(value: Any) -> Any:
    """The one written form of a site, whichever it was given in."""
    if isinstance(value, Mapping):
        if set(value) - {"model", "layer", "point"} or not isinstance(value.get("layer"), str):
            raise ValueError(f"a site is {dict(value)}, expected a name or {{layer: NAME, point: {' | '.join(POINTS)}}}, and model: NAME")
        model = f"{value['model']}/" if value.get("model") else ""
        value = f"{model}{value['layer']}.{value.get('point', RESIDUAL)}"
    return str(SiteName.parse(value)) if isinstance(value, str) else value


SiteText = Annotated[str, BeforeValidator(_written)]
"""A site in a configuration: text in the one written form."""
