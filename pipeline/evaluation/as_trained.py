"""How many features fire when they compete within groups of positions, as they did in training.

Shapes: N positions, L layers, D model width.
"""

import torch
from torch import Tensor

from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.crosscoder.metrics import FiringCounts


class EncodingAsTrained:
    """What a BatchTopK crosscoder fires when the features compete within groups of positions, as they did in training.

    The groups are of consecutive held-out positions whatever the batches are; the last one is smaller.
    """

    def __init__(self, trained: TrainedCrosscoder, group_positions: int, device: torch.device) -> None:
        self._trained = trained
        self._group_positions = group_positions
        self._firing = FiringCounts(trained.num_features, device)
        self._applies = trained.config.activation_function.kind in ("topk", "batch_topk")
        self._waiting: list[Tensor] = []

    def add(self, acts_NLD: Tensor) -> None:
        if not self._applies:
            return
        self._waiting.append(acts_NLD)
        if sum(map(len, self._waiting)) >= self._group_positions:
            *groups, rest_NLD = torch.cat(self._waiting).tensor_split(self._cuts())
            self._waiting = [rest_NLD.clone()]
            for group_NLD in groups:
                self._encode(group_NLD)

    def _cuts(self) -> list[int]:
        total = sum(map(len, self._waiting))
        return list(range(self._group_positions, total + 1, self._group_positions))

    def _encode(self, group_NLD: Tensor) -> None:
        if len(group_NLD):
            self._firing.add(self._trained.encode(group_NLD, as_trained=True))

    def l0(self) -> float | None:
        """Of everything added, the last group included; None for other activation functions. To be called once, at the end."""
        if self._waiting:
            self._encode(torch.cat(self._waiting))
            self._waiting = []
        return self._firing.l0 if self._applies else None
