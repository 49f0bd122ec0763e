"""An activation source in memory for the trainer's tests, and small training configurations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.activations.source import ActivationBatch, LayerStatistics, Provenance
from pipeline.config.schema import build
from pipeline.config.train_crosscoder import TrainConfig

LAYERS = ["block.0", "block.1"]


class MemorySource:
    """Rows of a tensor, in another seeded order every epoch. `served` lists (epoch, row) of every row handed out."""

    def __init__(self, acts_NLD: Tensor, *, data_id: str = "f" * 64) -> None:
        self.acts_NLD = acts_NLD
        self.data_id = data_id
        self.provenance = Provenance("m" * 64, "d" * 64, "t" * 64, 16, [0])
        self.layers = LAYERS[: acts_NLD.shape[1]]
        self.d_model = acts_NLD.shape[2]
        self.num_positions = acts_NLD.shape[0]
        exact = acts_NLD.double()
        self.statistics = LayerStatistics.from_sums(exact.sum(0), exact.square().sum((0, 2)), self.num_positions, exact.norm(dim=-1).sum(0))
        self.served: list[tuple[int, int]] = []

    def batches(self, *, batch_positions: int, epoch: int, cursor: int) -> Iterator[ActivationBatch]:
        order = torch.randperm(self.num_positions, generator=torch.Generator().manual_seed(epoch))
        for start in range(cursor, self.num_positions, batch_positions):
            rows_B = order[start : start + batch_positions]
            self.served += [(epoch, row) for row in rows_B.tolist()]
            yield ActivationBatch(self.acts_NLD[rows_B], rows_B, rows_B, rows_B)


def random_activations(num_positions: int, *, num_layers: int = 2, d_model: int = 6, seed: int = 1) -> Tensor:
    """Correlated Gaussian rows with a mean, [N, L, D]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_layers * d_model, num_layers * d_model, generator=generator)
    rows = torch.randn(num_positions, num_layers * d_model, generator=generator) @ mix + torch.randn(
        num_layers * d_model, generator=generator
    )
    return rows.view(num_positions, num_layers, d_model)


RELU = {"kind": "relu"}
BATCH_TOPK = {"kind": "batch_topk", "k": 2, "threshold_momentum": 0.8}
L1 = {"l1": {"coefficient": 0.5}}
AUXK = {"auxk": {"k": 2, "refresh_steps": 3}}
VARIANTS: dict[str, dict[str, Any]] = {
    "relu": {"crosscoder": {"num_features": 16, "activation_function": RELU}, "loss": L1},
    "batch_topk": {"crosscoder": {"num_features": 64, "activation_function": BATCH_TOPK}, "loss": AUXK},
}


def train_config(variant: str = "relu", **changes: Any) -> TrainConfig:
    """A small training on the CPU; `changes` replace whole top-level settings."""
    values: dict[str, Any] = {
        "stage": "train",
        "name": "toy",
        "activations": {"kind": "disk", "path": Path("nowhere")},
        "num_tokens": 1000,
        "batch_positions": 32,
        "dead_window_tokens": 64,
        "device": "cpu",
        "log_every_steps": 4,
        "checkpoints": {"every_tokens": 160, "every_minutes": None, "keep": 3},
        "optimizer": {"learning_rate": 5e-3},
        **VARIANTS[variant],
    }
    return build(TrainConfig, values | changes, "toy.yaml")
