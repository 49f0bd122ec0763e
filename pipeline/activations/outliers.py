"""Above which norm a position is an outlier: a handful of them would decide every mean, loss and pooled figure.

In many models the residual stream has *sinks* besides position 0: in SmolLM2-135M after block 14, in contexts of 256, 11 of 102,000
positions have a norm over ten medians and hold 66 % of the sum of |x|^2; in contexts of 1,024 there was none in 73,656
(bench/results/outliers-smollm2-256.json, outliers-smollm2.json).

Shapes: N positions, L layers, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LEADING_TOKENS = 65_536
"""A layer's median norm is taken over so many tokens; it then differs from another sample's by far less than a norm over ten
medians does from the rest."""


class OutlierLimits(NamedTuple):
    """Above which norm a position counts as an outlier."""

    norms_L: Tensor | None
    """float64; None where no position does."""
    source: str
    """Where the norms come from: `training`, `held_out`, `leading_contexts` of the harvest, or `off`."""

    def are_outliers(self, acts_NLD: Tensor) -> Tensor:
        """[N] bool: whether the norm is over the limit in any of the layers."""
        if self.norms_L is None:
            return torch.zeros(len(acts_NLD), dtype=torch.bool, device=acts_NLD.device)
        return (norms(acts_NLD) > self.norms_L).any(1)


def norms(acts_NLD: Tensor) -> Tensor:
    """[N, L] float32: the norm of each position at each layer."""
    norms_NL: Tensor = torch.linalg.vector_norm(acts_NLD, dim=-1, dtype=torch.float32)
    return norms_NL


def limits_from(norms_NL: Tensor, ratio: float) -> Tensor:
    """[L] float64: `ratio` times the median over positions; of an even number the lower middle one."""
    return ratio * norms_NL.median(dim=0).values.double()
