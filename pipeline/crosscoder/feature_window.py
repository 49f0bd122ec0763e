"""What each feature did over the training steps between two snapshots; kept on the device, exact over a resume.

Shapes: F features.
"""

import torch
from torch import Tensor

from pipeline.crosscoder.objective import Outcome


class FeatureWindow:
    """Firings and activations since the last snapshot, as features fire in training. `state` and `num_tokens` are all of its state."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        # Firings are whole and far below 2^53: their float64 sums are exact.
        self.firings_F = torch.zeros(num_features, dtype=torch.float64, device=device)
        """Positions at which each feature fired."""
        self.activation_sum_F = torch.zeros(num_features, dtype=torch.float64, device=device)
        """Of each feature's activations, in normalized units."""
        self.num_tokens = 0

    def add(self, outcome: Outcome, num_tokens: int) -> None:
        """Adds a step. Does not wait for the device."""
        assert outcome.activation_sum_F is not None, "the objective sums activations where there is a history"
        self.firings_F += outcome.firings_F
        self.activation_sum_F += outcome.activation_sum_F
        self.num_tokens += num_tokens

    def clear(self) -> None:
        """Begins the next window."""
        self.firings_F.zero_()
        self.activation_sum_F.zero_()
        self.num_tokens = 0

    @property
    def state(self) -> dict[str, Tensor]:
        """As tensors of a checkpoint."""
        tokens = torch.tensor(self.num_tokens, dtype=torch.int64)
        return {"history.firings": self.firings_F, "history.activation_sum": self.activation_sum_F, "history.tokens": tokens}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes `state` over. Of a checkpoint from before there was a history nothing: the window begins there."""
        if "history.tokens" in tensors:
            self.firings_F.copy_(tensors["history.firings"])
            self.activation_sum_F.copy_(tensors["history.activation_sum"])
            self.num_tokens = int(tensors["history.tokens"])
