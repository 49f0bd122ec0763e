"""The loss of a batch, and what is logged about it, from one pass through the crosscoder.

Shapes: B positions in a batch, L layers, D model width, F features, J dead features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config.train_crosscoder import NoHistory, TrainConfig
from pipeline.crosscoder.dead_features import firings
from pipeline.crosscoder.losses import TERMS, reconstruction, squared_norms_L
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.schedules import StepValues
from pipeline.crosscoder.training_pass import BatchSums, Pass
from pipeline.crosscoder.weights import decoder_norms


class Outcome(NamedTuple):
    """Of one batch, or of a part of it; only `loss` carries a gradient. Float32, on the crosscoder's device."""

    loss: Tensor
    """The sum of the reconstruction and all terms: what is trained on."""
    reconstruction: Tensor
    terms: dict[str, Tensor]
    """With their coefficients."""
    residual_L: Tensor
    """Sum over positions of |x - x_hat|^2."""
    variance_L: Tensor
    """Sum over positions of |x - mean|^2, with the mean of all activations."""
    error_BL: Tensor
    """|x - x_hat| of each position."""
    firings_F: Tensor
    """Positions at which each feature fired."""
    smallest_rank: Tensor | None
    """The smallest rank that fired, where the activation function ranks."""
    activation_sum_F: Tensor | None
    """Of each feature's activations over positions; None where the run keeps no history."""

    @classmethod
    def added(cls, parts: "Sequence[Outcome]") -> "Outcome":
        """Of a batch, from those of its parts: all but errors and the smallest rank add up."""
        ranks = [part.smallest_rank for part in parts if part.smallest_rank is not None]
        sums = [part.activation_sum_F for part in parts if part.activation_sum_F is not None]
        names = parts[0].terms
        return cls(
            loss=torch.stack([part.loss for part in parts]).sum(),
            reconstruction=torch.stack([part.reconstruction for part in parts]).sum(),
            terms={name: torch.stack([part.terms[name] for part in parts]).sum() for name in names},
            residual_L=torch.stack([part.residual_L for part in parts]).sum(0),
            variance_L=torch.stack([part.variance_L for part in parts]).sum(0),
            error_BL=torch.cat([part.error_BL for part in parts]),
            firings_F=torch.stack([part.firings_F for part in parts]).sum(0),
            smallest_rank=torch.stack(ranks).mean() if ranks else None,
            activation_sum_F=torch.stack(sums).sum(0) if sums else None,
        )


class Objective:
    """The loss that a training configuration describes, as a function of crosscoder and batch."""

    def __init__(self, config: TrainConfig, device_type: str) -> None:
        self.reconstruction = config.loss.reconstruction
        self.terms = config.loss.terms()
        for name, term in self.terms.items():
            if type(term) not in TERMS:
                raise KeyError(f"no function gives the term {name} of the loss")
        self.autocast_to = torch.bfloat16 if config.precision == "bfloat16" else None
        self.device_type = device_type
        self.sums_activations = not isinstance(config.checkpoints.history, NoHistory)

    def __call__(
        self,
        crosscoder: Crosscoder,
        acts_BLD: Tensor,
        mean_LD: Tensor,
        values: StepValues,
        dead_J: Tensor | None,
        batch: BatchSums | None = None,
    ) -> Outcome:
        """The outcome of the normalized activations `acts_BLD`.

        mean_LD : the activations' mean in normalized units.
        dead_J : the indices of dead features; None where there are none, and then the auxiliary term is exactly zero.
        batch : sums over the whole batch, where `acts_BLD` is only a part of it (see `batch_sums`).
        """
        variance_L = squared_norms_L(crosscoder.only_written(acts_BLD - mean_LD))
        p = self._pass(crosscoder, acts_BLD, mean_LD, values, dead_J, batch, variance_L.sum())
        residual_L = squared_norms_L(p.residual_BLD)
        with self._autocast():
            error = reconstruction(self.reconstruction, p, residual_L)
            terms = {name: values.coefficients[name] * TERMS[type(term)](term, p) for name, term in self.terms.items()}
        loss = error
        for term in terms.values():
            loss = loss + term
        return Outcome(
            loss,
            error.detach(),
            {name: term.detach() for name, term in terms.items()},
            residual_L.detach(),
            variance_L.detach(),
            torch.linalg.vector_norm(p.residual_BLD.detach().float(), dim=-1),
            firings(p.fired.features_BF),
            p.fired.smallest_rank,
            p.fired.features_BF.detach().sum(dim=0, dtype=torch.float32) if self.sums_activations else None,
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.autocast_to, enabled=self.autocast_to is not None)

    def _pass(
        self,
        crosscoder: Crosscoder,
        acts_BLD: Tensor,
        mean_LD: Tensor,
        values: StepValues,
        dead_J: Tensor | None,
        batch: BatchSums | None,
        squared_deviation: Tensor,
    ) -> Pass:
        weights = crosscoder.weights()
        norms_F = decoder_norms(weights.W_dec_FLD)
        ranking_F = crosscoder.ranking_norms(norms_F)
        penalized_F = norms_F if crosscoder.groups is None else norms_F * crosscoder.groups.cost_F
        smallest_rank = None if batch is None else batch.smallest_rank
        with self._autocast():
            pre_BF = crosscoder.pre_activations(seen(acts_BLD, mean_LD, values.keep_BL), weights.W_enc_LDF)
            fired = crosscoder.activation_function.fire(pre_BF, ranking_F, crosscoder.b_enc_F, values, smallest_rank)
            residual_BLD = crosscoder.only_written(acts_BLD - crosscoder.decode(fired.features_BF, acts_BLD, weights.W_dec_FLD))
        num_positions = acts_BLD.shape[0] if batch is None else batch.num_positions
        variance = (squared_deviation if batch is None else batch.variance) / num_positions
        if self.reconstruction.reduction == "mean":
            variance = variance / acts_BLD[0].numel()
        return Pass(crosscoder, values, acts_BLD, pre_BF, fired, weights, penalized_F, residual_BLD, dead_J, variance, batch)

    @torch.no_grad()
    def batch_sums(self, crosscoder: Crosscoder, parts: Sequence[Tensor], mean_LD: Tensor, values: Sequence[StepValues]) -> BatchSums:
        """What the parts of one batch must know of the whole, from passes over them without a gradient.

        parts, values : the normalized activations of each part, and the step's values for it.
        """
        num_positions = sum(len(part_BLD) for part_BLD in parts)
        function, weights = crosscoder.activation_function, crosscoder.weights()
        ranking_F = crosscoder.ranking_norms(decoder_norms(weights.W_dec_FLD))
        highest: list[Tensor] = []
        for part_BLD, of_part in zip(parts, values, strict=True):
            with self._autocast():
                pre_BF = crosscoder.pre_activations(seen(part_BLD, mean_LD, of_part.keep_BL), weights.W_enc_LDF)
                ranks = function.ranks_that_fire(pre_BF, ranking_F, num_positions, of_part)
            highest += [] if ranks is None else [ranks]
        smallest_rank = function.smallest_of(torch.cat(highest), num_positions, values[0]) if highest else None
        zero = torch.zeros((), device=parts[0].device)
        sums = BatchSums(num_positions, smallest_rank, zero, zero, zero)
        for part_BLD, of_part in zip(parts, values, strict=True):
            variance = squared_norms_L(crosscoder.only_written(part_BLD - mean_LD)).sum()
            p = self._pass(crosscoder, part_BLD, mean_LD, of_part, None, sums, variance)
            sums = sums._replace(
                squared_residual=sums.squared_residual + squared_norms_L(p.residual_BLD).sum(),
                variance=sums.variance + variance,
                l0=sums.l0 + firings(p.fired.features_BF).sum() / num_positions,
            )
        return sums


def seen(acts_BLD: Tensor, mean_LD: Tensor, keep_BL: Tensor | None) -> Tensor:
    """What the encoder sees: the mean in place of the layers that are masked."""
    return acts_BLD if keep_BL is None else mean_LD + (acts_BLD - mean_LD) * keep_BL[..., None]
