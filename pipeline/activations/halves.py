"""A sample of activations in two halves, whose agreement says whether the sample is large enough.

Shapes: B positions, L layers, D model width.
"""

import torch
from torch import Tensor

from pipeline.activations.layer_sums import LayerSums, statistics_of
from pipeline.activations.source import LayerStatistics

AGREEMENT = 0.01
"""Difference of two halves, relative to the scale, from which on a sample is large enough."""
_FIRST_CONTEXTS = 64


class Halves:
    """Sums over a sample that grows by model batches, which go to one half and the other in turn.

    A sample is looked at when its contexts have doubled, from 64 on: fewer looks leave less room for a chance agreement.
    """

    def __init__(self, num_layers: int, d_model: int) -> None:
        self.num_contexts = 0
        self._halves = [LayerSums(num_layers, d_model), LayerSums(num_layers, d_model)]
        self._num_batches = 0
        self._next_look = _FIRST_CONTEXTS

    def add(self, acts_BLD: Tensor, num_contexts: int) -> None:
        """Adds the activations of a model batch of `num_contexts` contexts."""
        self._halves[self._num_batches % 2].add(acts_BLD)
        self._num_batches += 1
        self.num_contexts += num_contexts

    def agree(self) -> bool:
        """Whether a look is due and finds the halves within `AGREEMENT` of each other; asked after every model batch."""
        if self.num_contexts < self._next_look:
            return False
        while self._next_look <= self.num_contexts:
            self._next_look *= 2
        return self.disagreement() <= AGREEMENT

    def disagreement(self) -> float:
        """The largest difference of the halves over layers, in scale and in mean, in units of the layer's scale.

        The scale is the root of the mean of |x - mean|^2; means differ by the norm of their difference. Infinite while a
        half is empty.
        """
        if any(half.num_positions == 0 for half in self._halves):
            return float("inf")
        first, second = (half.statistics() for half in self._halves)
        differences_L = [_scale_L(first) - _scale_L(second), (first.mean_LD - second.mean_LD).norm(dim=-1)]
        # A layer that is the same everywhere has scale 0; its halves agree.
        relative_L = [(difference_L.abs() / _scale_L(self.statistics())).nan_to_num(nan=0.0) for difference_L in differences_L]
        return float(torch.stack(relative_L).max())

    def statistics(self) -> LayerStatistics:
        """The moments of both halves together."""
        return statistics_of(half.to_json() for half in self._halves)


def _scale_L(statistics: LayerStatistics) -> Tensor:
    # Rounding can leave a mean square just below 0.
    return statistics.mean_squared_centered_norm_L.clamp_min(0).sqrt()
