"""Per-layer sums of activations in float64.

Shapes: B positions, L layers, D model width.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.activations.source import ActivationBatch, LayerStatistics
from pipeline.config.activation_source import Harvest

# Rows turned into float64 at a time: bounds the memory, and fixes the order of additions.
_ROWS_AT_A_TIME = 4096


class LayerSums:
    """Sums over positions of x, |x|^2 and |x|, layer by layer, added up in float64 on the activations' device."""

    def __init__(self, num_layers: int, d_model: int) -> None:
        self.num_positions = 0
        self.sum_LD = torch.zeros((num_layers, d_model), dtype=torch.float64)
        self.sum_squared_norm_L = torch.zeros(num_layers, dtype=torch.float64)
        self.sum_norm_L = torch.zeros(num_layers, dtype=torch.float64)

    def add(self, acts_BLD: Tensor) -> None:
        """Adds the activations of B positions."""
        self.sum_LD = self.sum_LD.to(acts_BLD.device)
        self.sum_squared_norm_L = self.sum_squared_norm_L.to(acts_BLD.device)
        self.sum_norm_L = self.sum_norm_L.to(acts_BLD.device)
        for part_BLD in torch.split(acts_BLD, _ROWS_AT_A_TIME):
            double_BLD = part_BLD.double()
            self.sum_LD += double_BLD.sum(0)
            double_BLD.square_()
            self.sum_norm_L += double_BLD.sum(-1).sqrt().sum(0)
            # Over positions first: a sum to a single number would depend on the number of threads.
            self.sum_squared_norm_L += double_BLD.sum(0).sum(-1)
        self.num_positions += len(acts_BLD)

    def statistics(self) -> LayerStatistics:
        """The moments of all that was added."""
        return LayerStatistics.from_sums(self.sum_LD.cpu(), self.sum_squared_norm_L.cpu(), self.num_positions, self.sum_norm_L.cpu())

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; floats keep every bit."""
        norms = {"sum_squared_norm": self.sum_squared_norm_L.tolist(), "sum_norm": self.sum_norm_L.tolist()}
        sums = {**norms, "sum": self.sum_LD.tolist()}
        return {"num_positions": self.num_positions, **sums}


def counted(rows: ActivationBatch, settings: Harvest, reasons_B: Tensor | None = None) -> Tensor:
    """The activations that statistics are of: never those at position 0, whose norm is many times the others', kept or not.

    reasons_B : those for which `rows` are left out (0: for none), where they hold positions that are.
    """
    acts_BLD, positions_B = rows.acts_BLD, rows.positions_B
    if reasons_B is not None:
        acts_BLD, positions_B = acts_BLD[reasons_B == 0], positions_B[reasons_B == 0]
    return acts_BLD if 0 in settings.drop_positions else acts_BLD[positions_B != 0]


def statistics_of(sums: Iterable[dict[str, Any]]) -> LayerStatistics:
    """The moments over several parts, from the sums of each as `LayerSums.to_json` gives them, added in their order."""
    parts = list(sums)
    sum_LD = torch.zeros_like(torch.tensor(parts[0]["sum"], dtype=torch.float64))
    sum_squared_norm_L = torch.zeros(len(sum_LD), dtype=torch.float64)
    sum_norm_L = torch.zeros_like(sum_squared_norm_L) if all("sum_norm" in part for part in parts) else None
    for part in parts:
        sum_LD += torch.tensor(part["sum"], dtype=torch.float64)
        sum_squared_norm_L += torch.tensor(part["sum_squared_norm"], dtype=torch.float64)
        if sum_norm_L is not None:
            sum_norm_L += torch.tensor(part["sum_norm"], dtype=torch.float64)
    num_positions = sum(part["num_positions"] for part in parts)
    return LayerStatistics.from_sums(sum_LD, sum_squared_norm_L, num_positions, sum_norm_L)
