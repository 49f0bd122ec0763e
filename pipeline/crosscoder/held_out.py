"""How a crosscoder in training does on positions that it isn't trained on.

Shapes: N held-out positions, L layers, D model width, F features.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.normalizer import Normalizer

# Positions encoded at a time: 1,024 of 131,072 features take half a gigabyte.
NUMBERS_AT_A_TIME = 1 << 27


class Measured(NamedTuple):
    """Of one look at the held-out positions; sums in float64."""

    metrics: dict[str, Any]
    """As a row of metrics has them, by name; of a layer that is not reconstructed None."""
    firings_F: Tensor
    """Positions at which each feature fires, by the inference form; int64."""
    sum_F: Tensor
    """Of each feature's activations over the positions; float64."""


class HeldOutPositions:
    """Raw activations that stay the same through the run; `measure` looks at them with the weights as they are."""

    def __init__(self, acts_NLD: Tensor) -> None:
        self.acts_NLD = acts_NLD
        self.mean_LD = torch.stack([part.double().sum(0) for part in torch.split(acts_NLD, 4096)]).sum(0) / len(acts_NLD)

    @torch.no_grad()
    def measure(self, crosscoder: Crosscoder, normalizer: Normalizer) -> Measured:
        """Explained variance, L0, shrinkage and the median error; waits for the device."""
        num_features, num_layers = crosscoder.b_enc_F.numel(), self.acts_NLD.shape[1]
        device = self.acts_NLD.device
        firings_F = torch.zeros(num_features, dtype=torch.int64, device=device)
        sum_F = torch.zeros(num_features, dtype=torch.float64, device=device)
        sums_5L = torch.zeros(5, num_layers, dtype=torch.float64, device=device)
        errors, norms = [], []
        for part_NLD in torch.split(self.acts_NLD, max(1, NUMBERS_AT_A_TIME // num_features)):
            acts_NLD = normalizer.normalize(part_NLD)
            features_NF = crosscoder.encode(acts_NLD)
            x_NLD = normalizer.denormalize(crosscoder.decode(features_NF, acts_NLD)).double()
            raw_NLD = part_NLD.double()
            error_NL, norm_NL = (raw_NLD - x_NLD).square().sum(-1), raw_NLD.square().sum(-1)
            deviation_NL = (raw_NLD - self.mean_LD).square().sum(-1)
            columns = (error_NL, deviation_NL, norm_NL, x_NLD.square().sum(-1), (raw_NLD * x_NLD).sum(-1))
            sums_5L += torch.stack([column.sum(0) for column in columns])
            errors.append(error_NL.sqrt())
            norms.append(norm_NL.sqrt())
            firings_F += (features_NF > 0).sum(0)
            sum_F += features_NF.sum(0, dtype=torch.float64)
        written_L = [True] * num_layers if crosscoder.groups is None else (crosscoder.groups.written_L > 0).tolist()
        medians_2L = torch.stack([torch.cat(errors).median(0).values, torch.cat(norms).median(0).values])
        metrics = _metrics(sums_5L, medians_2L, firings_F, len(self.acts_NLD), written_L)
        return Measured(metrics, firings_F, sum_F)


def _metrics(sums_5L: Tensor, medians_2L: Tensor, firings_F: Tensor, num_positions: int, written_L: list[bool]) -> dict[str, Any]:
    error_L, deviation_L, norm_L, x_norm_L, product_L = sums_5L
    explained_L = [
        1.0 - error / deviation if written and deviation > 0 else None
        for error, deviation, written in zip(error_L.tolist(), deviation_L.tolist(), written_L, strict=True)
    ]
    known = [value for value in explained_L if value is not None]

    def by_layer(values_L: Tensor) -> list[float | None]:
        # Not finite: quotients by the norm of a reconstruction that is 0, as before anything fires.
        return [value if written and math.isfinite(value) else None for value, written in zip(values_L.tolist(), written_L, strict=True)]

    return {
        # Each layer weighs the same, so that runs of different normalization compare.
        "held_out_explained_variance": sum(known) / len(known) if known else None,
        "held_out_explained_variance_by_layer": explained_L,
        "held_out_l0": firings_F.sum().item() / num_positions,
        "held_out_silent_features": (firings_F == 0).sum().item(),
        "held_out_median_norm_by_layer": by_layer(medians_2L[1]),
        "held_out_median_error_by_layer": by_layer(medians_2L[0] / medians_2L[1]),
        "held_out_norm_ratio_by_layer": by_layer((x_norm_L / norm_L).sqrt()),
        "held_out_best_scalar_by_layer": by_layer(product_L / x_norm_L),
    }
