"""L0 over the last steps and over the epoch, however often rows are written; kept on the device, exact over a resume."""

from typing import Any

import torch
from torch import Tensor

from pipeline.crosscoder.plan import Plan


class RecentL0:
    """Firings, and the rows that they are of, in the last `window_steps` steps and in the epoch so far. `state` is all that it keeps.

    Numbers of firings are whole and far below 2^53, so that float64 sums of them are exact in any order.
    """

    def __init__(self, window_steps: int, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self._sums_W2 = torch.zeros((min(window_steps, max(1, plan.num_steps)), 2), dtype=torch.float64, device=device)
        """Of a step s, counted from 1, at s modulo the window."""
        self._epoch_2 = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, firings_F: Tensor, step: int, num_rows: int) -> None:
        """Adds a step. Does not wait for the device."""
        firings = firings_F.sum(dtype=torch.float64)
        sums_2 = torch.stack((firings, torch.full_like(firings, num_rows)))
        self._sums_W2[step % len(self._sums_W2)] = sums_2
        if self.plan.place_after(step - 1).cursor == 0:
            self._epoch_2.zero_()
        self._epoch_2 += sums_2

    @property
    def state(self) -> dict[str, Tensor]:
        return {"l0.steps": self._sums_W2, "l0.epoch": self._epoch_2}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        for name, tensor in self.state.items():
            tensor.copy_(tensors[name])

    def metrics(self) -> dict[str, Any]:
        """After a step that had rows; waits for the device."""
        (recent, recent_rows), (epoch, epoch_rows) = self._sums_W2.sum(0).tolist(), self._epoch_2.tolist()
        return {"recent_l0": recent / recent_rows, "epoch_l0": epoch / epoch_rows}
