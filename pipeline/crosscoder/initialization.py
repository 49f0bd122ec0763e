"""A crosscoder's weights before the first step.

Shapes: L layers, D model width, F features, N positions. Drawn on the CPU in float32, so that one seed gives one start on any
device. A new way to draw is a function here, an entry in `DIRECTIONS`, and its name in `pipeline.config.crosscoder.Initialization`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from pipeline.config.crosscoder import Initialization
from pipeline.config.errors import UserError
from pipeline.crosscoder.weights import Weights


class Drawing(NamedTuple):
    """What a way to draw may use."""

    settings: Initialization
    num_layers: int
    d_model: int
    num_features: int
    generator: Generator
    data_NLD: Tensor | None
    """Normalized activations; given where `needs_data` says so."""


def random_directions(drawing: Drawing, *, encoder: bool) -> Tensor:
    """[F, L, D] Gaussian vectors."""
    return torch.randn(drawing.num_features, drawing.num_layers, drawing.d_model, generator=drawing.generator)


def same_direction(drawing: Drawing, *, encoder: bool) -> Tensor:
    """[F, L, D]: one Gaussian vector a feature, the same in every layer."""
    vectors_FD = torch.randn(drawing.num_features, drawing.d_model, generator=drawing.generator)
    return vectors_FD[:, None].repeat(1, drawing.num_layers, 1)


def kaiming_uniform(drawing: Drawing, *, encoder: bool) -> Tensor:
    """[F, L, D], uniform between plus and minus gain * sqrt(3 / fan_in) (He et al. 2015)."""
    settings, (layers, width, features) = drawing.settings, (drawing.num_layers, drawing.d_model, drawing.num_features)
    if settings.kaiming_fan_in == "inputs":
        fan_in = layers * width if encoder else features
    else:  # torch takes the second axis times all that follow it: of [L, D, F], or of [F, L, D]
        fan_in = width * features if encoder else layers * width
    by_role = math.sqrt(2.0) if encoder else 1.0
    gain = by_role if settings.kaiming_gain == "by_role" else math.sqrt(2.0 / (1.0 + 5.0))
    bound = gain * math.sqrt(3.0 / fan_in)
    return (torch.rand(features, layers, width, generator=drawing.generator) * 2.0 - 1.0) * bound


def data_points(drawing: Drawing, *, encoder: bool) -> Tensor:
    """[F, L, D]: the centered activations of positions drawn at random, without repetition while there are enough."""
    assert drawing.data_NLD is not None
    data_NLD = drawing.data_NLD.float().cpu()
    centered_NLD = data_NLD - data_NLD.mean(dim=0)
    repeats = -(-drawing.num_features // len(centered_NLD))
    order = torch.cat([torch.randperm(len(centered_NLD), generator=drawing.generator) for _ in range(repeats)])
    return centered_NLD[order[: drawing.num_features]]


DIRECTIONS: dict[str, Callable[..., Tensor]] = {
    "random_directions": random_directions,
    "same_direction": same_direction,
    "kaiming_uniform": kaiming_uniform,
    "data_points": data_points,
}


def needs_data(settings: Initialization) -> bool:
    """Whether `initial_weights` must be given activations."""
    return settings.decoder == "data_points"


def initial_weights(
    settings: Initialization, num_layers: int, d_model: int, num_features: int, seed: int, data_NLD: Tensor | None = None
) -> Weights:
    """W_enc_LDF and W_dec_FLD as the crosscoder begins with them."""
    if needs_data(settings) and data_NLD is None:
        raise UserError("initialization.decoder data_points needs activations to draw from, and none were given")
    drawing = Drawing(settings, num_layers, d_model, num_features, Generator().manual_seed(seed), data_NLD)
    W_dec_FLD = _with_norm(DIRECTIONS[settings.decoder](drawing, encoder=False), settings.decoder_norm)
    if settings.encoder == "transposed_decoder":
        W_enc_FLD = W_dec_FLD
    else:
        W_enc_FLD = DIRECTIONS[settings.encoder](drawing, encoder=True)
        if settings.encoder == "random_directions":
            W_enc_FLD = _with_norm(W_enc_FLD, settings.decoder_norm)
    W_enc_FLD = _with_norm(W_enc_FLD, settings.encoder_norm)
    return Weights(W_enc_FLD.permute(1, 2, 0).contiguous(), W_dec_FLD)


def _with_norm(vectors_FLD: Tensor, norm: float | None) -> Tensor:
    """Each layer's vector of each feature scaled to the Euclidean norm `norm`; as they are where that is None."""
    if norm is None:
        return vectors_FLD
    norms_FL1: Tensor = torch.linalg.vector_norm(vectors_FLD, dim=-1, keepdim=True)
    return vectors_FLD * (norm / norms_FL1.clamp(min=torch.finfo(torch.float32).tiny))
