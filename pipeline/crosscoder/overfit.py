"""How soon training on one batch explains it: the first thing to ask of a new kind of crosscoder.

Weights that can't learn one batch by heart won't learn more; a fault in a loss, a gradient or a schedule shows in minutes.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.crosscoder.objective import Outcome

ENOUGH = 0.99
"""The explained variance that counts as learned: 1 - sum |x - x_hat|^2 / sum |x - mean|^2, all layers together, normalized units."""


class Overfit:
    """The first step before whose update the batch was explained, and the best so far. `state` is all that it keeps."""

    def __init__(self, device: torch.device) -> None:
        self.first_step = torch.zeros((), dtype=torch.int64, device=device)
        """0 while there is none."""
        self.best = torch.full((), -torch.inf, dtype=torch.float64, device=device)

    def add(self, outcome: Outcome, step: int) -> None:
        """Adds a step. Does not wait for the device."""
        explained = 1.0 - outcome.residual_L.double().sum() / outcome.variance_L.double().sum()
        self.first_step.masked_fill_((explained >= ENOUGH) & (self.first_step == 0), step)
        torch.maximum(self.best, explained, out=self.best)

    @property
    def state(self) -> dict[str, Tensor]:
        return {"overfit.first_step": self.first_step, "overfit.best": self.best}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        for name, tensor in self.state.items():
            tensor.copy_(tensors[name])

    def results(self) -> dict[str, Any]:
        """For `result.json`; `overfit_steps` is None where the batch was not explained. Waits for the device."""
        steps, best = int(self.first_step.item()), self.best.item()
        return {"overfit_steps": steps or None, "overfit_explained_variance": best if best > -torch.inf else None}

    def sentence(self, num_steps: int) -> str:
        """What `results` say, in words."""
        found = self.results()
        if found["overfit_steps"] is not None:
            return f"overfit: the batch's explained variance reached {ENOUGH} at step {found['overfit_steps']:,} of {num_steps:,}"
        best = found["overfit_explained_variance"]
        reached = "is not known, since the batch never varies" if best is None else f"came to {best:.4f} at best"
        return (
            f"overfit: the batch's explained variance did not reach {ENOUGH} in {num_steps:,} steps, it {reached}; give it more "
            "num_tokens, fewer batch_positions or a larger learning rate, or less sparsity; if none helps, look for a fault in the variant"
        )
