"""A crosscoder's weights before the first step.

Shapes: L layers, D model width, F features. Drawn on the CPU in float32, so that one seed gives one start on any device.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from pipeline.config.crosscoder import Initialization


def random_directions(num_layers: int, d_model: int, num_features: int, norm: float, generator: Generator) -> Tensor:
    """[F, L, D] Gaussian vectors, each layer's of each feature scaled to the Euclidean norm `norm`."""
    vectors_FLD = torch.randn(num_features, num_layers, d_model, generator=generator)
    return vectors_FLD.mul_(norm / vectors_FLD.norm(dim=-1, keepdim=True))


DECODERS: dict[str, Callable[[int, int, int, float, Generator], Tensor]] = {"random_directions": random_directions}


def initial_weights(settings: Initialization, num_layers: int, d_model: int, num_features: int, seed: int) -> tuple[Tensor, Tensor]:
    """W_enc_LDF and W_dec_FLD; biases begin at zero."""
    generator = Generator().manual_seed(seed)
    W_dec_FLD = DECODERS[settings.decoder](num_layers, d_model, num_features, settings.decoder_norm, generator)
    source_FLD = W_dec_FLD
    if settings.encoder != "transposed_decoder":
        source_FLD = DECODERS[settings.encoder](num_layers, d_model, num_features, settings.decoder_norm, generator)
    return source_FLD.permute(1, 2, 0).contiguous(), W_dec_FLD
