"""L0 over the last steps and over the epoch, however often rows are written; kept on the device, exact over a resume."""

from typing import Any

import torch
from torch import Tensor

from pipeline.crosscoder.plan import Plan


class RecentL0:
    """Firings of the last `window_steps` steps and of the epoch so far. The two tensors are all of its state.

    Numbers of firings are whole and far below 2^53, so that float64 sums of them are exact in any order.
    """

    def __init__(self, window_steps: int, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.firings_W = torch.zeros(min(window_steps, max(1, plan.num_steps)), dtype=torch.float64, device=device)
        """Of a step s, counted from 1, at s modulo the window."""
        self.epoch_firings = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, firings_F: Tensor, step: int) -> None:
        """Adds a step. Does not wait for the device."""
        firings = firings_F.sum(dtype=torch.float64)
        self.firings_W[step % len(self.firings_W)] = firings
        if self.plan.place_after(step - 1).cursor == 0:
            self.epoch_firings.zero_()
        self.epoch_firings += firings

    def metrics(self, step: int) -> dict[str, Any]:
        """After `step` steps, one at least; waits for the device."""
        tokens = self.plan.tokens_after(step)
        first_of_epoch = self.plan.place_after(step - 1).epoch * self.plan.steps_an_epoch
        return {
            "recent_l0": self.firings_W.sum().item() / (tokens - self.plan.tokens_after(max(0, step - len(self.firings_W)))),
            "epoch_l0": self.epoch_firings.item() / (tokens - self.plan.tokens_after(first_of_epoch)),
        }
