"""How features lie to one another and between layers, by their decoders in the crosscoder's own units.

Shapes: F features, L layers, D model width, P pairs of layers, K neighbors.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.crosscoder.weights import layer_norms

NUMBERS_AT_A_TIME = 1 << 26


class Neighbors(NamedTuple):
    features_FK: Tensor
    """Nearest first."""
    cosines_FK: Tensor


def relative_norms(W_dec_FLD: Tensor) -> Tensor:
    """[F, L]: each layer's share of the feature's decoder norms; 0 of a feature that writes nothing."""
    norms_FL = layer_norms(W_dec_FLD)
    return norms_FL / norms_FL.sum(1, keepdim=True).clamp(min=torch.finfo(norms_FL.dtype).tiny)


def layer_cosines(W_dec_FLD: Tensor) -> Tensor:
    """[F, P]: the cosine between the decoders of each two layers, (0, 1), (0, 2), ..., (1, 2), ...; 0 where one writes nothing."""
    unit_FLD = torch.nn.functional.normalize(W_dec_FLD, dim=-1)
    pairs = list(itertools.combinations(range(W_dec_FLD.shape[1]), 2))
    cosines = [(unit_FLD[:, one] * unit_FLD[:, other]).sum(-1) for one, other in pairs]
    return torch.stack(cosines, 1) if pairs else W_dec_FLD.new_zeros(len(W_dec_FLD), 0)


def neighbors(W_dec_FLD: Tensor, count: int) -> Neighbors:
    """The `count` features (fewer, if there are no more) whose decoders, all layers as one vector, have the greatest cosine to each."""
    unit_FC = torch.nn.functional.normalize(W_dec_FLD.flatten(1), dim=-1)
    count, rows = min(count, len(unit_FC) - 1), max(1, NUMBERS_AT_A_TIME // len(unit_FC))
    found = []
    for start in range(0, len(unit_FC), rows):
        cosines = unit_FC[start : start + rows] @ unit_FC.T
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -torch.inf
        found.append(cosines.topk(count))
    return Neighbors(torch.cat([part.indices for part in found]), torch.cat([part.values for part in found]))
