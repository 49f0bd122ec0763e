"""Which features fire: activation functions, as they are in training and at inference.

Shapes: B positions in a batch, L layers, D model width, F features.

A feature's *rank* is what decides whether it fires, in the unit of the threshold. In training a function may look at
the whole batch; at inference each feature of each position is judged alone, by `rank > threshold`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.config.crosscoder import BatchTopk, Relu
from pipeline.config.schema import Config


class Firing(NamedTuple):
    """What an activation function gives in training."""

    features_BF: Tensor
    smallest_rank: Tensor | None
    """Of the features that fired; float32 scalar, infinite if none did. None where the function has no threshold."""


class ActivationFunction(NamedTuple):
    in_training: Callable[[Tensor, Tensor, Any], Firing]
    """(pre_BF, W_dec_FLD, settings) to what fires."""
    at_inference: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    """(pre_BF, W_dec_FLD, threshold, settings) to features_BF."""


def decoder_norms(W_dec_FLD: Tensor) -> Tensor:
    """[F]: the sum over layers of each feature's decoder norms, float32."""
    norms_FL: Tensor = torch.linalg.vector_norm(W_dec_FLD, dim=-1)
    return norms_FL.sum(dim=-1)


def _relu_in_training(pre_BF: Tensor, W_dec_FLD: Tensor, settings: Relu) -> Firing:
    return Firing(torch.relu(pre_BF), None)


def _relu_at_inference(pre_BF: Tensor, W_dec_FLD: Tensor, threshold: Tensor, settings: Relu) -> Tensor:
    return torch.relu(pre_BF)


def _rank(pre_BF: Tensor, W_dec_FLD: Tensor, settings: BatchTopk) -> Tensor:
    """[B, F], negative where the pre-activation is; in its precision, since a float32 copy would cost more than the ranking."""
    if settings.rank_by == "activation":
        return pre_BF
    return pre_BF * decoder_norms(W_dec_FLD).to(pre_BF.dtype)


def _batch_topk_in_training(pre_BF: Tensor, W_dec_FLD: Tensor, settings: BatchTopk) -> Firing:
    """The k * B highest ranks of the batch fire. Gradients reach what fired and nothing else; ranks carry none."""
    with torch.no_grad():
        rank = _rank(pre_BF, W_dec_FLD, settings).flatten()
        highest = torch.topk(rank, min(settings.k * pre_BF.shape[0], rank.numel()), sorted=False)
        smallest = torch.where(highest.values > 0, highest.values, torch.inf).min().float()
    # With fewer than k * B positive pre-activations some of the highest are zero or below: relu keeps them from firing.
    # gather rather than indexing: the backward of indexing sorts the indices first.
    fired = torch.relu(torch.gather(pre_BF.flatten(), 0, highest.indices))
    features_BF = torch.zeros_like(pre_BF).flatten().scatter_(0, highest.indices, fired).view_as(pre_BF)
    return Firing(features_BF, smallest)


def _batch_topk_at_inference(pre_BF: Tensor, W_dec_FLD: Tensor, threshold: Tensor, settings: BatchTopk) -> Tensor:
    """A feature fires if its rank is above the threshold, whatever else is in the batch."""
    fires_BF = _rank(pre_BF.detach(), W_dec_FLD.detach(), settings) > threshold
    return torch.relu(pre_BF) * fires_BF


ACTIVATION_FUNCTIONS: dict[type[Config], ActivationFunction] = {
    Relu: ActivationFunction(_relu_in_training, _relu_at_inference),
    BatchTopk: ActivationFunction(_batch_topk_in_training, _batch_topk_at_inference),
}


@torch.no_grad()
def update_threshold(threshold: Tensor, num_updates: Tensor, smallest_rank: Tensor, momentum: float) -> None:
    """Moves `threshold` towards the batch's smallest firing rank and counts the update; both in place, on their device.

    The running average of Bussmann et al. 2024, an even mean of the first 1 / (1 - momentum) batches, exponential from
    then on. A batch in which nothing fired changes nothing.
    """
    valid = torch.isfinite(smallest_rank)
    weight = torch.clamp(1.0 / (num_updates + 1).float(), min=1.0 - momentum)
    target = torch.where(valid, smallest_rank, threshold)
    threshold.add_(weight * (target - threshold))
    num_updates.add_(valid)
