"""Values that change in the course of training, each a function of the step alone."""

import math
from collections.abc import Callable

from pipeline.config.train_crosscoder import DecoderNormL1, Loss, Optimizer

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}
"""Progress through the decay, from 0 to 1, to the share of the fall that is still ahead."""


def warmup(step: int, num_steps: int, fraction: float) -> float:
    """Rises linearly over the first `fraction` of all steps and reaches 1 at its last step; `step` counts from 1."""
    warmup_steps = round(fraction * num_steps)
    return min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0


def learning_rate(settings: Optimizer, step: int, num_steps: int) -> float:
    """Of step `step`, counted from 1 to `num_steps`. A fall to zero reaches zero one step after the last."""
    decay_steps = round(settings.decay_fraction * num_steps)
    steps_into_decay = max(0, step - (num_steps - decay_steps))
    left = DECAYS[settings.decay](steps_into_decay / (decay_steps + 1))
    factor = settings.final_fraction + (1.0 - settings.final_fraction) * left
    return settings.learning_rate * factor * warmup(step, num_steps, settings.warmup_fraction)


def sparsity_coefficient(settings: Loss, step: int, num_steps: int) -> float:
    """The penalty's weight in step `step`, counted from 1; zero where there is no penalty."""
    if not isinstance(settings.sparsity, DecoderNormL1):
        return 0.0
    return settings.sparsity.coefficient * warmup(step, num_steps, settings.sparsity.warmup_fraction)
