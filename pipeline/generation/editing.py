"""Edits of features: what becomes of their activations, and what that adds to a layer.

Shapes: B positions, F features, K of them that are edited.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.generate_text import Mode


@dataclass(frozen=True)
class Edit:
    """What becomes of the activations f of some features."""

    features: tuple[int, ...]
    strength: float = 0.0
    """In the features' unit; a factor for `scale`; without meaning for `ablate`."""
    mode: Mode = "add"
    """add: f + strength, clamp: strength, scale: strength f, ablate: 0."""

    def change(self, features_BF: Tensor) -> Tensor:
        """change_BK: the edited activations less those that are there. What is added may make them negative."""
        now_BK = features_BF[:, list(self.features)]
        match self.mode:
            case "add":
                return torch.full_like(now_BK, self.strength)
            case "scale":
                return now_BK * (self.strength - 1.0)
            case "clamp":
                return self.strength - now_BK
            case "ablate":
                return -now_BK
