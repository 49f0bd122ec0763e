"""Which features fire: activation functions, as they are in training and at inference.

Shapes: B positions in a batch, F features.

A feature's *rank* is what decides whether it fires. In training a function may look at the whole batch; at inference all of
them have one form, in which each feature of each position is judged alone: its value gain * pre + shift is its activation
where that is above the feature's own threshold, and 0 elsewhere.

A new activation function is a class here with its settings in `pipeline.config.crosscoder`, and an entry in `ACTIVATION_FUNCTIONS`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config.crosscoder import BatchTopk, FixedThreshold, Gated, JumpRelu, Relu, Topk
from pipeline.config.schema import Config
from pipeline.crosscoder import straight_through
from pipeline.crosscoder.running_mean import update_running_mean
from pipeline.crosscoder.schedules import StepValues


class Fired(NamedTuple):
    """What an activation function gives in training."""

    features_BF: Tensor
    penalized_BF: Tensor
    """What penalties on activations act on: the features, or a gate's own pre-activations, rectified."""
    smallest_rank: Tensor | None = None
    """Of the features that fired; float32 scalar, infinite if none did. None where the threshold is learned or absent."""


class InferenceForm(NamedTuple):
    """A feature's value is gain * pre + shift; it fires where that is above the threshold. Each [F] float32, none negative but shift."""

    gain_F: Tensor
    shift_F: Tensor
    threshold_F: Tensor


class ActivationFunction(nn.Module):
    """One kind, with the parameters and buffers that it owns."""

    has_thresholds = False
    """Whether its inference form has positive thresholds, whose size decides how many features fire."""

    def fire(self, pre_BF: Tensor, norms_F: Tensor, b_enc_F: Tensor, values: StepValues, smallest_rank: Tensor | None) -> Fired:
        """The features as in training.

        norms_F : the sum over layers of each feature's decoder norms.
        smallest_rank : of the whole batch, where `pre_BF` is only a part of it; None where it is all of it.
        """
        raise NotImplementedError

    def ranks_that_fire(self, pre_BF: Tensor, norms_F: Tensor, num_positions: int, values: StepValues) -> Tensor | None:
        """The highest ranks of a part of a batch of `num_positions`, as many as fire in the whole; None where parts are independent."""
        return None

    def smallest_of(self, ranks: Tensor, num_positions: int, values: StepValues) -> Tensor:
        """The smallest rank that fires in a batch, from what `ranks_that_fire` gave of all its parts."""
        raise NotImplementedError

    def inference_form(self, norms_F: Tensor, b_enc_F: Tensor) -> InferenceForm:
        raise NotImplementedError

    def update(self, smallest_rank: Tensor | None) -> None:
        """Takes the smallest rank that fired in a training batch into whatever is estimated from it."""


class ReluFunction(ActivationFunction):
    def __init__(self, settings: Relu, num_features: int) -> None:
        super().__init__()
        self.negative_gradient = settings.negative_gradient

    def fire(self, pre_BF: Tensor, norms_F: Tensor, b_enc_F: Tensor, values: StepValues, smallest_rank: Tensor | None) -> Fired:
        leaks = self.negative_gradient > 0
        features_BF = straight_through.leaky_gradient_relu(pre_BF, self.negative_gradient) if leaks else torch.relu(pre_BF)
        return Fired(features_BF, features_BF)

    def inference_form(self, norms_F: Tensor, b_enc_F: Tensor) -> InferenceForm:
        return _plain(torch.zeros_like(norms_F))


class RankedFunction(ActivationFunction):
    """Features compete by rank in training; a running average of the smallest rank that fired is the threshold at inference."""

    has_thresholds = True
    threshold: Tensor
    num_threshold_updates: Tensor

    def __init__(self, settings: Topk | BatchTopk, num_features: int) -> None:
        super().__init__()
        self.by_norm = settings.rank_by == "activation_times_decoder_norm"
        self.momentum = settings.threshold_momentum
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("num_threshold_updates", torch.zeros((), dtype=torch.int64))

    def rank(self, pre_BF: Tensor, norms_F: Tensor) -> Tensor:
        """[B, F], negative where the pre-activation is; in its precision, since a float32 copy would cost more than the ranking."""
        return pre_BF * norms_F.to(pre_BF.dtype) if self.by_norm else pre_BF

    def inference_form(self, norms_F: Tensor, b_enc_F: Tensor) -> InferenceForm:
        # A feature without a decoder has rank 0 whatever its activation, so it never fires above a positive threshold.
        smallest = torch.finfo(torch.float32).tiny
        return _plain(self.threshold / norms_F.clamp(min=smallest) if self.by_norm else self.threshold.expand_as(norms_F))

    def update(self, smallest_rank: Tensor | None) -> None:
        assert smallest_rank is not None
        update_running_mean(self.threshold, self.num_threshold_updates, smallest_rank, self.momentum)


class TopkFunction(RankedFunction):
    def fire(self, pre_BF: Tensor, norms_F: Tensor, b_enc_F: Tensor, values: StepValues, smallest_rank: Tensor | None) -> Fired:
        with torch.no_grad():
            rank_BF = self.rank(pre_BF, norms_F)
            assert values.k is not None
            highest_BK = torch.topk(rank_BF, values.k, dim=-1, sorted=False).values
            smallest_B = _smallest_positive(highest_BK, dim=-1)
            fires_BF = rank_BF >= smallest_B[:, None]
            some_B = torch.isfinite(smallest_B)
            mean = torch.where(some_B, smallest_B, 0.0).float().sum() / some_B.sum()
        features_BF = torch.relu(pre_BF) * fires_BF
        return Fired(features_BF, features_BF, torch.where(some_B.any(), mean, torch.inf))


class BatchTopkFunction(RankedFunction):
    def fire(self, pre_BF: Tensor, norms_F: Tensor, b_enc_F: Tensor, values: StepValues, smallest_rank: Tensor | None) -> Fired:
        """The k * B highest ranks of the batch fire, and what ties with the smallest of them. Ranks carry no gradient."""
        with torch.no_grad():
            rank_BF = self.rank(pre_BF, norms_F)
            if smallest_rank is None:
                smallest_rank = self.smallest_of(rank_BF, pre_BF.shape[0], values)
            fires_BF = rank_BF >= smallest_rank
        # The smallest rank is positive, so all that fire are; relu is there for its gradient at what does not.
        features_BF = torch.relu(pre_BF) * fires_BF
        return Fired(features_BF, features_BF, smallest_rank)

    def ranks_that_fire(self, pre_BF: Tensor, norms_F: Tensor, num_positions: int, values: StepValues) -> Tensor | None:
        return self._highest(self.rank(pre_BF, norms_F), num_positions, values)

    def smallest_of(self, ranks: Tensor, num_positions: int, values: StepValues) -> Tensor:
        return _smallest_positive(self._highest(ranks, num_positions, values)).float()

    def _highest(self, ranks: Tensor, num_positions: int, values: StepValues) -> Tensor:
        assert values.k is not None
        return torch.topk(ranks.flatten(), min(values.k * num_positions, ranks.numel()), sorted=False).values


class JumpReluFunction(ActivationFunction):
    has_thresholds = True

    def __init__(self, settings: JumpRelu, num_features: int) -> None:
        super().__init__()
        # The logarithm keeps thresholds positive.
        self.log_threshold_F = nn.Parameter(torch.full((num_features,), settings.initial_threshold).log())

    def thresholds(self) -> Tensor:
        """[F], in the pre-activation's unit, with their gradient."""
        return self.log_threshold_F.exp()

    def fire(self, pre_BF: Tensor, norms_F: Tensor, b_enc_F: Tensor, values: StepValues, smallest_rank: Tensor | None) -> Fired:
        assert values.bandwidth is not None
        features_BF = straight_through.jump_relu(pre_BF, self.thresholds(), values.bandwidth)
        return Fired(features_BF, features_BF)

    def inference_form(self, norms_F: Tensor, b_enc_F: Tensor) -> InferenceForm:
        return _plain(self.thresholds())


class GatedFunction(ActivationFunction):
    """The gate is open where pre > 0; the magnitude is exp(log_gain) * (pre - b_enc) + b_magnitude, rectified."""

    def __init__(self, settings: Gated, num_features: int) -> None:
        super().__init__()
        self.log_gain_F = nn.Parameter(torch.zeros(num_features))
        self.b_magnitude_F = nn.Parameter(torch.zeros(num_features))

    def fire(self, pre_BF: Tensor, norms_F: Tensor, b_enc_F: Tensor, values: StepValues, smallest_rank: Tensor | None) -> Fired:
        magnitude_BF = torch.relu((pre_BF - b_enc_F) * self.log_gain_F.exp() + self.b_magnitude_F)
        return Fired(magnitude_BF * (pre_BF.detach() > 0), torch.relu(pre_BF))

    def inference_form(self, norms_F: Tensor, b_enc_F: Tensor) -> InferenceForm:
        gain_F = self.log_gain_F.exp()
        shift_F = self.b_magnitude_F - gain_F * b_enc_F
        # pre > 0 is the same as value > shift, since the gain is positive.
        return InferenceForm(gain_F, shift_F, torch.relu(shift_F))


class FixedThresholdFunction(ActivationFunction):
    threshold_F: Tensor

    def __init__(self, settings: FixedThreshold, num_features: int) -> None:
        super().__init__()
        self.register_buffer("threshold_F", torch.full((num_features,), settings.threshold))

    def fire(self, pre_BF: Tensor, norms_F: Tensor, b_enc_F: Tensor, values: StepValues, smallest_rank: Tensor | None) -> Fired:
        features_BF = torch.relu(pre_BF) * (pre_BF > self.threshold_F)
        return Fired(features_BF, features_BF)

    def inference_form(self, norms_F: Tensor, b_enc_F: Tensor) -> InferenceForm:
        return _plain(self.threshold_F)


def _plain(threshold_F: Tensor) -> InferenceForm:
    return InferenceForm(torch.ones_like(threshold_F), torch.zeros_like(threshold_F), threshold_F)


def _smallest_positive(values: Tensor, dim: int | None = None) -> Tensor:
    """The least of the values above 0; infinite where there is none."""
    positive = torch.where(values > 0, values, torch.inf)
    return positive.min() if dim is None else positive.amin(dim)


ACTIVATION_FUNCTIONS: dict[type[Config], Any] = {
    Relu: ReluFunction,
    Topk: TopkFunction,
    BatchTopk: BatchTopkFunction,
    JumpRelu: JumpReluFunction,
    Gated: GatedFunction,
    FixedThreshold: FixedThresholdFunction,
}
"""By the type of its settings, a class that is made from the settings and the number of features."""


def make_activation_function(settings: Config, num_features: int) -> ActivationFunction:
    """The module of the kind that `settings` are of; `KeyError` for a kind that has none."""
    made: ActivationFunction = ACTIVATION_FUNCTIONS[type(settings)](settings, num_features)
    return made
