"""Second moments of layers' activations among each other, in one pass: what linear maps between layers are fitted from.

Shapes: N positions, L layers, D model width; S and T chosen layers, their widths side by side.
"""

import torch
from torch import Tensor

from pipeline.crosscoder.metrics import chunks

WIDEST = 16_384
"""All pairs of layers are kept up to this many dimensions in all (2 GiB of float64), beyond it each layer with its neighbours."""


class Covariances:
    """Sums of products of the activations of pairs of layers, float64.

    Parameters
    ----------
    reference_LD : is subtracted first, so that the sums don't cancel; near the mean. It does not change the result.
    """

    def __init__(self, reference_LD: Tensor) -> None:
        self._reference_LD = reference_LD.double()
        self.num_layers, self.d_model = reference_LD.shape
        self.num_positions = 0
        self.has_all_pairs = self._reference_LD.numel() <= WIDEST
        self._sum_LD = torch.zeros_like(self._reference_LD)
        layers = range(self.num_layers)
        pairs = [(i, j) for i in layers for j in layers if i <= j and (self.has_all_pairs or j - i <= 1)]
        self._products = {pair: self._reference_LD.new_zeros(self.d_model, self.d_model) for pair in pairs}

    def add(self, acts_NLD: Tensor) -> None:
        for part in chunks(len(acts_NLD), self._reference_LD.numel(), acts_NLD.device):
            shifted_LND = (acts_NLD[part].double() - self._reference_LD).transpose(0, 1).contiguous()
            self._sum_LD += shifted_LND.sum(1)
            for (i, j), product_DD in self._products.items():
                product_DD.addmm_(shifted_LND[i].T, shifted_LND[j])
        self.num_positions += len(acts_NLD)

    @property
    def mean_LD(self) -> Tensor:
        return self._reference_LD + self._sum_LD / self.num_positions

    @property
    def variance_L(self) -> Tensor:
        """[L]: mean of |x - mean|^2."""
        squares_LD = torch.stack([self._products[layer, layer].diagonal() for layer in range(self.num_layers)])
        return (squares_LD / self.num_positions - (self._sum_LD / self.num_positions).square()).sum(1)

    def neighbours(self, layer: int) -> list[int]:
        """The other layers whose covariance with `layer` is known."""
        return [other for other in range(self.num_layers) if other != layer and (min(layer, other), max(layer, other)) in self._products]

    def between(self, first: int, second: int) -> Tensor:
        """[D, D]: mean of (x_first - mean) (x_second - mean)^T."""
        low, high = min(first, second), max(first, second)
        shift_LD = self._sum_LD / self.num_positions
        covariance_DD = self._products[low, high] / self.num_positions - torch.outer(shift_LD[low], shift_LD[high])
        return covariance_DD if first <= second else covariance_DD.T

    def block(self, rows: list[int], columns: list[int]) -> Tensor:
        """[S, T]: the covariances of several layers side by side with several others."""
        return torch.cat([torch.cat([self.between(row, column) for column in columns], dim=1) for row in rows])
