"""Groups of features: which layers each feature reads and writes, and what it costs.

Shapes: L layers, D model width, F features. One mechanism for dictionaries that are a crosscoder only in part: a group that
reads and writes one layer is that layer's sparse autoencoder, one that reads one and writes another a transcoder, groups
that read the layers up to one and write those from it on a weakly causal crosscoder.
"""

import torch
from torch import Tensor, nn

from pipeline.config.crosscoder import Aligned, CrosscoderConfig
from pipeline.config.errors import UserError
from pipeline.crosscoder.weights import Weights


class Groups(nn.Module):
    """Masks that follow from the configuration; nothing here is trained or stored."""

    reads_FL: Tensor
    """1 where the feature's encoder sees the layer, else 0; float32."""
    writes_FL: Tensor
    cost_F: Tensor

    def __init__(self, config: CrosscoderConfig, layers: list[str]) -> None:
        """Raises `UserError` for a layer that is not one of `layers`."""
        super().__init__()
        sizes = torch.tensor([group.features for group in config.groups])
        for name in ("reads", "writes"):
            rows = [_mask(getattr(group, name), layers, f"groups[{i}].{name}") for i, group in enumerate(config.groups)]
            self.register_buffer(f"{name}_FL", torch.stack(rows).repeat_interleave(sizes, dim=0), persistent=False)
        costs = torch.tensor([group.cost for group in config.groups])
        self.register_buffer("cost_F", costs.repeat_interleave(sizes), persistent=False)
        if isinstance(config.parameterization, Aligned) and not bool((self.reads_FL * self.writes_FL).any(1).all()):
            raise UserError("parameterization aligned needs a layer that every group both reads and writes; use kind free")

    @property
    def written_L(self) -> Tensor:
        """1 for the layers that some feature writes, else 0: those that are reconstructed."""
        return self.writes_FL.amax(dim=0)

    def masked(self, weights: Weights) -> Weights:
        """The weights with zeros in the layers that a feature doesn't read or write."""
        return Weights(weights.W_enc_LDF * self.reads_FL.T[:, None, :], weights.W_dec_FLD * self.writes_FL[..., None])


def _mask(chosen: str | list[str], layers: list[str], where: str) -> Tensor:
    unknown = [] if chosen == "all" else [name for name in chosen if name not in layers]
    if unknown:
        raise UserError(
            f"crosscoder.{where} names {unknown[0]}, but the activations are of {', '.join(layers)}; name one of those, or `all`"
        )
    return torch.tensor([1.0 if chosen == "all" or layer in chosen else 0.0 for layer in layers])
