"""The names of sites: places in a language model where activations are read and replaced.

    transformer.h.2                     the residual stream after block 2
    transformer.h.2.mlp_output          what block 2's MLP adds to the residual stream
    transformer.h.2.attention_output    what its attention adds

A mapping `{layer: transformer.h.2, point: mlp_output}` says the same as the second.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator

RESIDUAL = "residual"
MLP_OUTPUT = "mlp_output"
ATTENTION_OUTPUT = "attention_output"
POINTS = (RESIDUAL, MLP_OUTPUT, ATTENTION_OUTPUT)


class SiteName(NamedTuple):
    """A block, by its module path, and a point of it."""

    block: str
    point: str = RESIDUAL

    @classmethod
    def parse(cls, text: str) -> "SiteName":
        """Raises `ValueError` for a point that there is none of; whether the model has the block is not known here."""
        block, _, point = text.rpartition(".")
        if point in POINTS:
            return cls(block, point)
        # The name of a block ends with its number: what follows a number is meant as a point.
        if block.rpartition(".")[2].isdigit() and not point.isdigit():
            near = difflib.get_close_matches(point, POINTS, n=1)
            hint = f"did you mean {block}.{near[0]}?" if near else f"leave it away for {RESIDUAL}"
            raise ValueError(f"{text} names the point {point}, expected one of {', '.join(POINTS)}; {hint}")
        return cls(text)

    def __str__(self) -> str:
        return self.block if self.point == RESIDUAL else f"{self.block}.{self.point}"


def _written(value: Any) -> Any:
    """The one written form of a site, whichever it was given in."""
    if isinstance(value, Mapping):
        if set(value) - {"layer", "point"} or not isinstance(value.get("layer"), str):
            raise ValueError(f"a site is {dict(value)}, expected a name or {{layer: NAME, point: {' | '.join(POINTS)}}}")
        value = f"{value['layer']}.{value.get('point', RESIDUAL)}"
    return str(SiteName.parse(value)) if isinstance(value, str) else value


SiteText = Annotated[str, BeforeValidator(_written)]
"""A site in a configuration: text in the one written form."""
