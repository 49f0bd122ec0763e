"""Figures of one layer, as an evaluation finds them, for the tests of what is said and drawn of it."""

from typing import Any

import torch

from pipeline.crosscoder.metrics import FiringCounts, ReconstructionMetrics
from pipeline.evaluation.measurements import Loss, Measurements
from pipeline.evaluation.predictions import Stand
from pipeline.evaluation.threshold_sweep import SweepPoint

RANKS = {"pca": 32, "pca_joint": 40}
COSTS = {"crosscoder": 0.147, "affine": 0.044, "other_layer": 0.21, "pca": 0.5, "mean": 6.0, "zero": 7.0}
EXPLAINED = {"crosscoder": 0.916, "affine": 0.939, "other_layer": 0.79, "pca": 0.92, "random_dictionary": 0.3, "mean": 0.0, "zero": -0.3}


SWEEP = [SweepPoint(factor, l0, {"h.2": share}) for factor, l0, share in ((1.0, 30.0, 0.916), (0.5, 40.0, 0.936), (0.2, 60.0, 0.946))]


def found(costs: dict[str, float], explained: dict[str, float | None], sweep: list[SweepPoint] = SWEEP) -> Measurements:
    """Figures of one layer, `h.2`; what is taken from another is from `h.3`."""

    def stand(by: str) -> Stand:
        return Stand("h.2", by, "h.3" if by.startswith(("affine", "other_layer")) else "one-each" if by == "compared" else None)

    losses = {stand(by): Loss(1.8 + cost, cost, cost, None, None) for by, cost in costs.items()}
    empty = ReconstructionMetrics(*[None] * len(ReconstructionMetrics._fields))
    rows = {stand(by): empty._replace(explained_variance=value) for by, value in explained.items()}
    others: dict[str, Any] = dict.fromkeys(Measurements._fields)
    firing = FiringCounts(2, torch.device("cpu"))
    firing.add(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    others |= {"compared_firing": {"one-each": firing}, "compared_kinds": {"one-each": "sparse autoencoders a layer"}, "sweep": sweep}
    return Measurements(**{**others, "layers": ["h.2"], "losses": losses, "reconstruction": rows})
