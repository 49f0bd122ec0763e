"""The units that a crosscoder works in: a fixed, per-layer affine map of the raw activations and its inverse.

Shapes: B positions in a batch, L layers, D model width.
"""

import torch
from torch import Tensor, nn

from pipeline.activations.source import LayerStatistics
from pipeline.config.crosscoder import Normalization
from pipeline.config.errors import UserError


class Normalizer(nn.Module):
    """normalized = (raw - offset) * scale, a scale a layer; the offset is the mean where centering is on, else zero.

    `mean_LD` is the activations' mean in raw units in either case: explained variance is measured against it.
    """

    mean_LD: Tensor
    scale_L: Tensor
    offset_LD: Tensor

    def __init__(self, mean_LD: Tensor, scale_L: Tensor, *, center: bool) -> None:
        super().__init__()
        self.center = center
        self.register_buffer("mean_LD", mean_LD.float())
        self.register_buffer("scale_L", scale_L.float())
        self.register_buffer("offset_LD", mean_LD.float() if center else torch.zeros_like(mean_LD, dtype=torch.float32))

    @classmethod
    def from_statistics(cls, statistics: LayerStatistics, settings: Normalization) -> "Normalizer":
        """Scales each layer as `settings.scale` says, from what the crosscoder sees: centered or not."""
        mean_LD = statistics.mean_LD
        if settings.scale == "mean_norm":
            return cls(mean_LD, _by_mean_norm(statistics), center=settings.center)
        squared_norm_L = statistics.mean_squared_centered_norm_L if settings.center else statistics.mean_squared_norm_L
        if not bool((squared_norm_L > 0).all()):
            constant = int((~(squared_norm_L > 0)).nonzero()[0])
            raise UserError(f"layer {constant} of the activations never varies, so it has no scale; leave it out of the layers")
        scale_L = torch.sqrt(mean_LD.shape[1] / squared_norm_L) if settings.scale == "layer" else torch.ones_like(squared_norm_L)
        return cls(mean_LD, scale_L, center=settings.center)

    def normalize(self, raw_BLD: Tensor) -> Tensor:
        """Float32, whatever the raw dtype."""
        return (raw_BLD.float() - self.offset_LD) * self.scale_L[:, None]

    def denormalize(self, acts_BLD: Tensor) -> Tensor:
        """Float32, in the language model's units."""
        return acts_BLD.float() / self.scale_L[:, None] + self.offset_LD

    def normalized_mean(self) -> Tensor:
        """[L, D]: where the mean lies in normalized units; zero where centering is on."""
        return (self.mean_LD - self.offset_LD) * self.scale_L[:, None]


def _by_mean_norm(statistics: LayerStatistics) -> Tensor:
    """[L]: sqrt(D) over the mean norm of the activations as the model gives them, centered or not."""
    if statistics.mean_norm_L is None:
        raise UserError("normalization.scale mean_norm needs the activations' mean norms, which this set was made without; cache it again")
    return torch.full_like(statistics.mean_norm_L, statistics.mean_LD.shape[1]).sqrt() / statistics.mean_norm_L
