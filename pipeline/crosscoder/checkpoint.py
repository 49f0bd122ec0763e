"""A crosscoder as training left it, on raw activations: what evaluation, steering and export start from.

Shapes: B positions in a batch, L layers, D model width, F features.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import records
from pipeline.activations.source import Provenance
from pipeline.config.crosscoder import CrosscoderConfig, Relu
from pipeline.config.errors import UserError
from pipeline.config.schema import build
from pipeline.crosscoder import checkpoint_files
from pipeline.crosscoder.checkpoint_files import Part
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.normalizer import Normalizer

FACTS = ("dead_window_tokens", "batch_positions", "activations_id")
"""What the record of a crosscoder says of its training, besides step, tokens, layers and the activations' provenance."""

_NAMES_BEFORE_0_2 = {
    "W_enc_LDF": "parameterization.W_enc_LDF",
    "W_dec_FLD": "parameterization.W_dec_FLD",
    "threshold": "activation_function.threshold",
    "num_threshold_updates": "activation_function.num_threshold_updates",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedCrosscoder:
    """Takes and gives activations in the language model's units; weights are float32 and carry no gradient."""

    config: CrosscoderConfig
    layers: list[str]
    """Module paths of the blocks whose residual streams it reads and writes, in the order of the L axis."""
    crosscoder: Crosscoder
    normalizer: Normalizer
    step: int
    tokens_trained: int
    tokens_since_fired_F: Tensor
    """Training tokens since each feature last fired, int64."""
    dead_window_tokens: int
    identity: str
    """sha256 over configuration, layers and weights: by content, wherever the checkpoint lies."""
    activations_id: str
    """Data id of the activations that it was trained on."""
    provenance: Provenance
    """What those activations come from."""
    batch_positions: int
    """Positions of a training batch."""

    @property
    def num_features(self) -> int:
        return self.config.num_features

    @property
    def d_model(self) -> int:
        return self.crosscoder.b_dec_LD.shape[1]

    @property
    def dead_F(self) -> Tensor:
        """True for features that did not fire in the last `dead_window_tokens` of training."""
        return self.tokens_since_fired_F >= self.dead_window_tokens

    @torch.no_grad()
    def encode(self, raw_BLD: Tensor, *, as_trained: bool = False) -> Tensor:
        """features_BF, float32. With `as_trained` they fire as in training, where TopK judges them against each other."""
        acts_BLD = self.normalizer.normalize(raw_BLD)
        return self.crosscoder.encode_as_trained(acts_BLD) if as_trained else self.crosscoder.encode(acts_BLD)

    @torch.no_grad()
    def decode(self, features_BF: Tensor, raw_BLD: Tensor | None = None) -> Tensor:
        """The reconstruction in the language model's units, [B, L, D] float32; a dense path needs the activations too."""
        acts_BLD = None if raw_BLD is None else self.normalizer.normalize(raw_BLD)
        return self.normalizer.denormalize(self.crosscoder.decode(features_BF, acts_BLD))


def crosscoder_part(
    crosscoder: Crosscoder, normalizer: Normalizer, tokens_since_fired_F: Tensor, config: CrosscoderConfig, facts: dict[str, Any]
) -> Part:
    """The shard of a checkpoint that `load_crosscoder` reads. `facts`: step, tokens, layers, all of `FACTS` and of a provenance."""
    tensors = dict(crosscoder.state_dict())
    tensors |= {"mean_LD": normalizer.mean_LD, "scale_L": normalizer.scale_L, "tokens_since_fired_F": tokens_since_fired_F}
    return Part(tensors, {"config": config.resolved(), **facts})


def load_crosscoder(path: Path, device: torch.device | str = "cpu") -> TrainedCrosscoder:
    """The crosscoder in a checkpoint, or in the newest whole checkpoint of a run directory."""
    checkpoint = _checkpoint_of(path)
    part = checkpoint_files.read_part(checkpoint, "crosscoder")
    facts, tensors = part.facts, {_NAMES_BEFORE_0_2.get(name, name): tensor for name, tensor in part.tensors.items()}
    config = build(CrosscoderConfig, facts["config"], str(checkpoint / "crosscoder.json"))
    tokens_since_fired_F = tensors.pop("tokens_since_fired_F").to(device)
    normalizer = Normalizer(tensors.pop("mean_LD"), tensors.pop("scale_L"), center=config.normalization.center).to(device)
    crosscoder = Crosscoder(config, layers=facts["layers"], d_model=normalizer.mean_LD.shape[1])
    if isinstance(config.activation_function, Relu):  # before 0.2 it had a threshold that nothing used
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("activation_function.")}
    crosscoder.load_state_dict(tensors)
    return TrainedCrosscoder(
        config=config,
        layers=facts["layers"],
        crosscoder=crosscoder.to(device).requires_grad_(False).eval(),
        normalizer=normalizer,
        step=facts["step"],
        tokens_trained=facts["tokens"],
        tokens_since_fired_F=tokens_since_fired_F,
        identity=records.data_id([facts]),
        provenance=Provenance.from_facts(facts),
        **{name: facts[name] for name in FACTS},
    )


def _checkpoint_of(path: Path) -> Path:
    if (path / "crosscoder.json").exists():
        return path
    checkpoint = checkpoint_files.newest_whole(path / "checkpoints", logger.warning)
    if checkpoint is None:
        state = "does not exist" if not path.exists() else "holds no whole checkpoint"
        raise UserError(f"{path} {state}; name the directory of a training run, or of one of its checkpoints")
    return checkpoint
