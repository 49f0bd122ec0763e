"""The loss of a batch, and what is logged about it, from one pass through the crosscoder.

Shapes: B positions in a batch, L layers, D model width, F features, J dead features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config.train_crosscoder import Auxk, TrainConfig
from pipeline.crosscoder.dead_features import firings
from pipeline.crosscoder.losses import PENALTIES, auxk, squared_norms_L
from pipeline.crosscoder.model import Crosscoder


class Outcome(NamedTuple):
    """Of one batch; only `loss` carries a gradient. Float32, on the crosscoder's device."""

    loss: Tensor
    """The sum of the three terms below: what is trained on."""
    reconstruction: Tensor
    sparsity: Tensor
    """With its coefficient."""
    auxiliary: Tensor
    """With its coefficient."""
    residual_L: Tensor
    """Sum over positions of |x - x_hat|^2."""
    variance_L: Tensor
    """Sum over positions of |x - mean|^2, with the mean of all activations."""
    firings_F: Tensor
    """Positions at which each feature fired."""
    smallest_rank: Tensor | None
    """The smallest rank that fired, where the activation function has a threshold."""


class Objective:
    """The loss that a training configuration describes, as a function of crosscoder and batch."""

    def __init__(self, config: TrainConfig, d_model: int, device_type: str) -> None:
        self.auxiliary = config.loss.auxiliary
        self.penalty = PENALTIES[type(config.loss.sparsity)]
        self.autocast_to = torch.bfloat16 if config.precision == "bfloat16" else None
        self.device_type = device_type
        self.k_auxiliary = (self.auxiliary.k or max(1, d_model // 2)) if isinstance(self.auxiliary, Auxk) else 0

    def __call__(self, crosscoder: Crosscoder, acts_BLD: Tensor, mean_LD: Tensor, coefficient: Tensor, dead_J: Tensor | None) -> Outcome:
        """The outcome of the normalized batch `acts_BLD`.

        `mean_LD` is the activations' mean in normalized units, `coefficient` the penalty's weight as a scalar tensor, and
        `dead_J` the indices of dead features, None where there are none: the auxiliary term is then exactly zero.
        """
        with torch.autocast(self.device_type, dtype=self.autocast_to, enabled=self.autocast_to is not None):
            pre_BF = crosscoder.pre_activations(acts_BLD)
            firing = crosscoder.fire(pre_BF)
            residual_BLD = acts_BLD - crosscoder.decode(firing.features_BF)
            share_left = auxk(crosscoder, pre_BF, residual_BLD, dead_J, self.k_auxiliary) if dead_J is not None else None
        num_positions = acts_BLD.shape[0]
        residual_L = squared_norms_L(residual_BLD)
        variance_L = squared_norms_L(acts_BLD - mean_LD)
        reconstruction = residual_L.sum() / num_positions
        sparsity = coefficient * self.penalty(firing.features_BF, crosscoder.W_dec_FLD)
        auxiliary = torch.zeros_like(reconstruction)
        if share_left is not None and isinstance(self.auxiliary, Auxk):
            # Gao et al. divide both terms, the reconstruction by the variance and this one by the residual. Here the first is
            # in absolute units, so this one is multiplied by the variance: their ratio is the paper's.
            auxiliary = self.auxiliary.coefficient * share_left * (variance_L.sum() / num_positions)
        loss = reconstruction + sparsity + auxiliary
        return Outcome(
            loss,
            reconstruction.detach(),
            sparsity.detach(),
            auxiliary.detach(),
            residual_L.detach(),
            variance_L.detach(),
            firings(firing.features_BF),
            firing.smallest_rank,
        )
