"""What training steps add up to between two rows of metrics, kept on the device so that a step never waits for it.

Shapes: L layers, F features.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.crosscoder.objective import Outcome

FIXED = 3
"""Sums before those of the losses: features that fired, gradient norms, steps whose gradient was clipped."""


class Window:
    """Sums over the steps since the last row. `sums` and the two counts are all of its state."""

    def __init__(self, terms: list[str], num_layers: int, device: torch.device) -> None:
        """terms : the loss's terms beside the reconstruction, by name."""
        self.losses = ["loss", "loss_reconstruction", *(f"loss_{name}" for name in terms)]
        self.num_layers = num_layers
        self.num_steps = 0
        self.num_tokens = 0
        self.sums = torch.zeros(FIXED + len(self.losses) + 2 * num_layers, dtype=torch.float64, device=device)
        """The fixed ones, the losses times positions, then the residual and the variance of each layer."""
        self.first_bad_step = torch.zeros((), dtype=torch.int64, device=device)
        """The first step whose loss or gradient was not finite; 0 while there is none."""

    def add(self, outcome: Outcome, gradient_norm: Tensor, clipped: Tensor, *, step: int, num_tokens: int) -> None:
        """Adds a step. Does not wait for the device."""
        fixed = torch.stack((outcome.firings_F.sum(), gradient_norm, clipped))
        losses = torch.stack((outcome.loss.detach(), outcome.reconstruction, *outcome.terms.values()))
        self.sums += torch.cat((fixed.double(), losses.double() * num_tokens, outcome.residual_L.double(), outcome.variance_L.double()))
        bad = ~(torch.isfinite(losses[0]) & torch.isfinite(gradient_norm)) & (self.first_bad_step == 0)
        self.first_bad_step.masked_fill_(bad, step)
        self.num_steps += 1
        self.num_tokens += num_tokens

    def metrics(self) -> dict[str, Any]:
        """Means over the window; waits for the device. Explained variance pools the window, with the mean of all activations."""
        sums = self.sums.tolist()
        row: dict[str, Any] = {name: sums[FIXED + i] / self.num_tokens for i, name in enumerate(self.losses)}
        row["l0"] = sums[0] / self.num_tokens
        row["gradient_norm"] = sums[1] / self.num_steps
        row["gradient_clipped_share"] = sums[2] / self.num_steps
        residual_L, variance_L = sums[-2 * self.num_layers : -self.num_layers], sums[-self.num_layers :]
        row["explained_variance"] = _explained(sum(residual_L), sum(variance_L))
        row["explained_variance_by_layer"] = [_explained(r, v) for r, v in zip(residual_L, variance_L, strict=True)]
        return row

    def clear(self) -> None:
        """Begins the next window."""
        self.sums.zero_()
        self.num_steps = self.num_tokens = 0


def _explained(residual: float, variance: float) -> float | None:
    return 1.0 - residual / variance if variance > 0 else None
