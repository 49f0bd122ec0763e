"""A running mean of scalars on the device: even over the first ones, exponential from then on."""

import torch
from torch import Tensor


@torch.no_grad()
def update_running_mean(mean: Tensor, num_updates: Tensor, value: Tensor, momentum: float) -> None:
    """Moves `mean` towards `value` and counts the update; both in place, on their device, which is not waited for.

    An even mean of the first 1 / (1 - momentum) values, exponential from then on, as Bussmann et al. 2024 estimate a
    threshold. A value that is not finite (a batch in which nothing fired) changes nothing.
    """
    valid = torch.isfinite(value)
    weight = torch.clamp(1.0 / (num_updates + 1).float(), min=1.0 - momentum)
    target = torch.where(valid, value, mean)
    mean.add_(weight * (target - mean))
    num_updates.add_(valid)
