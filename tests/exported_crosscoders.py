"""A small crosscoder of every kind as a checkpoint, and activations on which some of its features fire."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toy_activations import LAYERS, MemorySource, random_activations

from pipeline.config.crosscoder import CrosscoderConfig
from pipeline.config.schema import build
from pipeline.crosscoder import checkpoint_files
from pipeline.crosscoder.checkpoint import crosscoder_part
from pipeline.crosscoder.checkpoint_files import Part
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.normalizer import Normalizer

GROUPS = [{"features": 10, "reads": [LAYERS[0]], "cost": 0.5}, {"features": 30, "writes": [LAYERS[1]]}]
JUMP_RELU = {"kind": "jump_relu"}
KINDS: dict[str, dict[str, Any]] = {
    "relu": {"activation_function": {"kind": "relu"}},
    "topk": {"activation_function": {"kind": "topk", "k": 5}},
    "batch_topk": {"activation_function": {"kind": "batch_topk", "k": 5}},
    "batch_topk_by_activation": {"activation_function": {"kind": "batch_topk", "k": 5, "rank_by": "activation"}},
    "jump_relu": {"activation_function": JUMP_RELU},
    "gated": {"activation_function": {"kind": "gated"}},
    "aligned": {"activation_function": JUMP_RELU, "parameterization": {"kind": "aligned"}},
    "factorized": {"activation_function": JUMP_RELU, "parameterization": {"kind": "factorized", "rank": 7}},
    "groups": {"activation_function": {"kind": "batch_topk", "k": 5}, "groups": GROUPS},
    "dense": {"activation_function": JUMP_RELU, "dense_rank": 2},
    "not_normalized": {"activation_function": JUMP_RELU, "normalization": {"center": False, "scale": "none"}},
}
NUM_FEATURES = 40
FACTS = {"step": 7, "tokens": 7000, "dead_window_tokens": 100, "activations_id": "a" * 64, "language_model_hash": "m" * 64}
FACTS |= {"tokens_id": "d" * 64, "tokenizer_hash": "t" * 64, "batch_positions": 16, "context_tokens": 12, "drop_positions": [0]}


def activations(num_positions: int = 300) -> Tensor:
    """[N, L, D], of two layers whose scales lie a factor of 10 apart."""
    return random_activations(num_positions) * torch.tensor([1.0, 10.0])[:, None]


def write_run(
    directory: Path,
    kind: str | dict[str, Any],
    change: Callable[[Crosscoder], object] = lambda crosscoder: None,
    *,
    layers: list[str] = LAYERS,
) -> Path:
    """A run directory with one checkpoint of a crosscoder of that kind, every weight drawn, then changed; gives the run directory."""
    config = build(CrosscoderConfig, {"num_features": NUM_FEATURES, **(KINDS[kind] if isinstance(kind, str) else kind)}, "test")
    crosscoder = Crosscoder(config, layers=layers, d_model=6, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in crosscoder.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, tensor in crosscoder.state_dict().items():
            if name.endswith(".threshold"):
                tensor.fill_(0.4)
            if name.endswith("log_threshold_F"):
                tensor.sub_(1.0)
        change(crosscoder)
    normalizer = Normalizer.from_statistics(MemorySource(activations()[:, : len(layers)]).statistics, config.normalization)
    since_F = torch.zeros(NUM_FEATURES, dtype=torch.int64)
    part = crosscoder_part(crosscoder, normalizer, since_F, config, {"layers": layers, **FACTS})
    checkpoint_files.write(directory / "checkpoints", 7, {"crosscoder": part, "training": Part({"counter": torch.zeros(1)}, {})})
    return directory
