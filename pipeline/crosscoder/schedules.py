"""Values that change in the course of training, each a function of the step alone."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config.crosscoder import BatchTopk, JumpRelu, Topk
from pipeline.config.schedule import Schedule
from pipeline.config.train_crosscoder import TrainConfig

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}
"""Progress through the decay, from 0 to 1, to the share of the fall that is still ahead."""


def factor(schedule: Schedule, step: int, num_steps: int) -> float:
    """The factor of step `step`, counted from 1 to `num_steps`.

    The warm-up reaches 1 at its last step. A fall reaches `final_fraction` one step after the last.
    """
    warmup_steps = round(schedule.warmup_fraction * num_steps)
    risen = min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0
    risen = schedule.initial_fraction + (1.0 - schedule.initial_fraction) * risen
    decay_steps = round(schedule.decay_fraction * num_steps)
    steps_into_decay = max(0, step - (num_steps - decay_steps))
    left = DECAYS[schedule.decay](steps_into_decay / (decay_steps + 1))
    return (schedule.final_fraction + (1.0 - schedule.final_fraction) * left) * risen


class StepValues(NamedTuple):
    """What one training step takes from the schedules, and what it draws at random. Scalars are float32 tensors on the device:
    as numbers they would make a compiled step be compiled again."""

    coefficients: dict[str, Tensor]
    """Of each term of the loss."""
    k: int | None = None
    """Of TopK and BatchTopK."""
    bandwidth: Tensor | None = None
    """Of JumpReLU."""
    keep_BL: Tensor | None = None
    """1 where the encoder sees the layer of the position, 0 where it is masked; None where nothing is masked."""
    sample_J: Tensor | None = None
    """Features whose decoders are compared by the orthogonality term."""


def scheduled_numbers(config: TrainConfig, step: int, num_steps: int) -> dict[str, float]:
    """Every value of step `step` that a schedule moves, by the name under which it is logged."""
    function, optimizer = config.crosscoder.activation_function, config.optimizer
    numbers = {"learning_rate": optimizer.learning_rate * factor(optimizer.schedule, step, num_steps)}
    for name, term in config.loss.terms().items():
        numbers[f"coefficient_{name}"] = term.coefficient * factor(term.schedule, step, num_steps)
    if isinstance(function, Topk | BatchTopk):
        scheduled = round(function.k * factor(function.k_schedule, step, num_steps))
        numbers["k"] = min(max(1, scheduled), config.crosscoder.num_features)
    if isinstance(function, JumpRelu):
        numbers["bandwidth"] = function.bandwidth * factor(function.bandwidth_schedule, step, num_steps)
    if config.layer_mask_rate > 0:
        numbers["layer_mask_rate"] = min(1.0, config.layer_mask_rate * factor(config.layer_mask_schedule, step, num_steps))
    return numbers


def step_values(config: TrainConfig, numbers: dict[str, float], *, batch_shape: tuple[int, int], device: torch.device) -> StepValues:
    """The values of a step for a batch of `batch_shape` (B, L), from its scheduled `numbers` and torch's global generators."""

    def scalar(name: str) -> Tensor | None:
        return torch.full((), numbers[name], device=device) if name in numbers else None

    terms = config.loss.terms()
    return StepValues(
        coefficients={name: torch.full((), numbers[f"coefficient_{name}"], device=device) for name in terms},
        k=int(numbers["k"]) if "k" in numbers else None,
        bandwidth=scalar("bandwidth"),
        keep_BL=_layers_kept(batch_shape, numbers["layer_mask_rate"], device) if "layer_mask_rate" in numbers else None,
        sample_J=_sample(config, device),
    )


def _layers_kept(batch_shape: tuple[int, int], rate: float, device: torch.device) -> Tensor:
    """Masks each layer of each position with probability `rate`; a position that would lose all of them keeps all."""
    keep_BL = torch.rand(batch_shape, device=device) >= rate
    return (keep_BL | ~keep_BL.any(dim=1, keepdim=True)).float()


def _sample(config: TrainConfig, device: torch.device) -> Tensor | None:
    settings = config.loss.orthogonality
    if settings is None:
        return None
    num_features = config.crosscoder.num_features
    return torch.randperm(num_features, device=device)[: min(settings.sample, num_features)]
