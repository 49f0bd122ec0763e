"""One pass of a batch through a crosscoder in training, as a record that every term of the loss reads.

Shapes: B positions in a batch, L layers, D model width, F features, J dead features.
"""

from typing import NamedTuple

from torch import Tensor

from pipeline.crosscoder.activation_functions import Fired
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.schedules import StepValues
from pipeline.crosscoder.weights import Weights


class BatchSums(NamedTuple):
    """Sums over a whole batch that the terms of a part of it need. Float32 scalars without a gradient."""

    num_positions: int
    smallest_rank: Tensor | None
    """Of the features that fire; None where the activation function doesn't rank over the batch."""
    squared_residual: Tensor
    """|x - x_hat|^2, over layers too."""
    variance: Tensor
    """|x - mean|^2, over layers too."""
    l0: Tensor
    """Mean number of features that fire at a position."""


class Pass(NamedTuple):
    """What a batch, or a part of one, went through. All in normalized units."""

    crosscoder: Crosscoder
    values: StepValues
    acts_BLD: Tensor
    pre_BF: Tensor
    """Pre-activations."""
    fired: Fired
    weights: Weights
    norms_F: Tensor
    """What penalties weigh an activation by: the sum over layers of the feature's decoder norms, times its group's cost; with its
    gradient, float32."""
    residual_BLD: Tensor
    """acts_BLD minus the reconstruction."""
    dead_J: Tensor | None
    """Indices of dead features; None where there are none."""
    variance: Tensor
    """Mean over the whole batch's positions of |x - mean|^2, in the units of the reconstruction term; float32 scalar."""
    batch: BatchSums | None
    """Of the whole batch where this is a part of it; None where it is all of it."""

    @property
    def num_positions(self) -> int:
        """Of the whole batch: what means over positions divide by."""
        return self.acts_BLD.shape[0] if self.batch is None else self.batch.num_positions

    @property
    def share(self) -> float:
        """The part of the batch's positions that are here."""
        return self.acts_BLD.shape[0] / self.num_positions
