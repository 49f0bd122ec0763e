"""How much a trained crosscoder explains at other L0s: its thresholds times one factor after another, all else as it is.

Shapes: N positions, L layers of the crosscoder, D model width, F features, K factors.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.crosscoder.metrics import ratio
from pipeline.evaluation.approximations import FEATURES_AT_A_TIME

MULTIPLES = (0.5, 0.7, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
"""Of the crosscoder's L0: what the factors are chosen to give, beside the factor 1."""
SAMPLE_POSITIONS = 1024
"""Rows that the factors are chosen on; what they then give is measured on all positions."""


class SweepPoint(NamedTuple):
    """The crosscoder with its thresholds times one factor, over all held-out positions but outliers."""

    threshold_factor: float
    l0: float
    explained_variance: dict[str, float | None]
    """By layer; None where the activations never vary."""


class ThresholdSweep:
    """Adds up batches; made with a sample of the rows that baselines are fitted on."""

    def __init__(self, trained: TrainedCrosscoder, layers: list[int], sample_NLD: Tensor) -> None:
        """layers : those that the crosscoder reconstructs."""
        self._trained, self._layers = trained, layers
        self.factors = threshold_factors(trained, sample_NLD[:SAMPLE_POSITIONS])
        device = trained.normalizer.mean_LD.device
        self._firings_K = torch.zeros(len(self.factors), dtype=torch.float64, device=device)
        self._error_KL = torch.zeros(len(self.factors), len(layers), dtype=torch.float64, device=device)
        self._spread_L = torch.zeros(len(layers), dtype=torch.float64, device=device)
        self._num_positions = 0

    def add(self, acts_NLD: Tensor, centered_NL: Tensor) -> None:
        """Adds positions; `centered_NL` is |x - mean|^2 of all layers."""
        crosscoder, normalizer = self._trained.crosscoder, self._trained.normalizer
        for part_NLD in torch.split(acts_NLD, max(1, FEATURES_AT_A_TIME // self._trained.num_features)):
            value_NF, threshold_F = crosscoder.values_and_thresholds(normalizer.normalize(part_NLD))
            for place, factor in enumerate(self.factors):
                features_NF = torch.where(value_NF > factor * threshold_F, value_NF, 0.0)
                error_NLD = part_NLD[:, self._layers].double() - self._trained.decode(features_NF, part_NLD)[:, self._layers].double()
                self._firings_K[place] += (features_NF > 0).sum()
                self._error_KL[place] += error_NLD.square().sum((0, 2))
        self._spread_L += centered_NL[:, self._layers].sum(0)
        self._num_positions += len(acts_NLD)

    def results(self) -> list[SweepPoint]:
        """From the lowest L0 to the highest."""
        names, spreads = [self._trained.layers[layer] for layer in self._layers], self._spread_L.tolist()
        points = []
        for factor, firings, errors in zip(self.factors, self._firings_K.tolist(), self._error_KL.tolist(), strict=True):
            shares = [ratio(error, spread) for error, spread in zip(errors, spreads, strict=True)]
            explained = {name: None if share is None else 1.0 - share for name, share in zip(names, shares, strict=True)}
            points.append(SweepPoint(factor, firings / max(1, self._num_positions), explained))
        return sorted(points, key=lambda point: (point.l0, -point.threshold_factor))


def threshold_factors(trained: TrainedCrosscoder, sample_NLD: Tensor) -> list[float]:
    """1, and the factors that give `MULTIPLES` of the crosscoder's L0 on the sample; 0 in the place of those with too few positive values.

    1 alone where the activation function has no thresholds that a factor would move.
    """
    if not trained.crosscoder.activation_function.has_thresholds or not len(sample_NLD):
        return [1.0]
    value_NF, threshold_F = trained.crosscoder.values_and_thresholds(trained.normalizer.normalize(sample_NLD))
    # A feature fires at a factor below the ratio of its value to its threshold.
    ratios = (value_NF / threshold_F)[(value_NF > 0) & (threshold_F > 0)]
    num_firing = int((ratios > 1).sum())
    wanted = [round(multiple * num_firing) for multiple in MULTIPLES]
    chosen = [count for count in wanted if 0 < count < len(ratios)]
    highest = torch.topk(ratios, max(chosen, default=0) + 1).values if chosen else ratios
    factors = [1.0, *(highest[count].item() for count in chosen)]
    return list(dict.fromkeys(factors if max(wanted) < len(ratios) else [*factors, 0.0]))


class Crossing(NamedTuple):
    """Where the curve of a layer reaches a share of its variance."""

    l0: float | None
    """By linear interpolation between points; None where it does not."""
    best_l0: float
    """Of the point that explains most,"""
    best: float
    """and how much that is."""
    highest_l0: float
    """Of all points."""


def crossing(points: list[SweepPoint], layer: str, share: float) -> Crossing | None:
    """The lowest L0 at which the layer's explained variance is above `share`; None where the layer never varies."""
    curve = [(point.l0, explained) for point in points if (explained := point.explained_variance[layer]) is not None]
    if not curve:
        return None
    best_l0, best = max(curve, key=lambda point: point[1])
    above = next((place for place, (_, explained) in enumerate(curve) if explained > share), None)
    if above is None:
        return Crossing(None, best_l0, best, curve[-1][0])
    if above == 0:
        return Crossing(curve[0][0], best_l0, best, curve[-1][0])
    (l0, low), (next_l0, high) = curve[above - 1], curve[above]
    return Crossing(l0 + (next_l0 - l0) * (share - low) / (high - low), best_l0, best, curve[-1][0])
