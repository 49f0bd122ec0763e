"""The terms of a crosscoder's loss.

Shapes: B positions in a batch, L layers, D model width, F features, J dead features.

Squared errors are summed over width and layers and averaged over positions, so with the default normalization the loss
of a crosscoder that outputs zeros is L * D. All reductions give float32, whatever the precision of the matrix products.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.config.train_crosscoder import DecoderNormL1, NoPenalty
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.sparsity import decoder_norms


def squared_norms_L(vectors_BLD: Tensor) -> Tensor:
    """Sum over positions and width of the squares, for each layer; float32."""
    return vectors_BLD.float().square().sum(dim=(0, 2))


def decoder_norm_l1(features_BF: Tensor, W_dec_FLD: Tensor) -> Tensor:
    """Mean over positions of each feature's activation times the sum over layers of its decoder norms.

    The sparsity term of Lindsey et al. 2024 ("Sparse Crosscoders"). Scalar, float32, in the activations' unit.
    Scaling a feature up and its decoder down leaves it unchanged, so the model can't cheat it.
    """
    # Features are never negative, so their sum is their L1 norm; summing positions first avoids a float32 copy of [B, F].
    return torch.dot(features_BF.sum(dim=0, dtype=torch.float32), decoder_norms(W_dec_FLD)) / features_BF.shape[0]


def _no_penalty(features_BF: Tensor, W_dec_FLD: Tensor) -> Tensor:
    return W_dec_FLD.new_zeros(())


PENALTIES: dict[type[Config], Callable[[Tensor, Tensor], Tensor]] = {DecoderNormL1: decoder_norm_l1, NoPenalty: _no_penalty}
"""(features_BF, W_dec_FLD) to a scalar, which the sparsity coefficient multiplies."""


def auxk(crosscoder: Crosscoder, pre_BF: Tensor, residual_BLD: Tensor, dead_J: Tensor, k: int) -> Tensor:
    """The share of the residual that its best reconstruction from dead features leaves: |e - e_hat|^2 / |e|^2 over the batch.

    The auxiliary loss of Gao et al. 2024 ("Scaling and evaluating sparse autoencoders", appendix A.2): the `k` strongest of
    the features `dead_J` (indices) at each position, by activation times decoder norms, model the residual
    e = x - x_hat, which carries no gradient. Scalar, float32; 0 where there is no residual.
    """
    # index_select rather than indexing: the backward of indexing sorts the indices first.
    W_dead_JLD = torch.index_select(crosscoder.W_dec_FLD, 0, dead_J)
    features_BJ = torch.relu(torch.index_select(pre_BF, 1, dead_J))
    if k < dead_J.numel():
        with torch.no_grad():
            norms_J = decoder_norms(W_dead_JLD)
            strongest_BK = torch.topk(features_BJ * norms_J.to(features_BJ.dtype), k, dim=-1, sorted=False).indices
        chosen_BK = torch.gather(features_BJ, 1, strongest_BK)
        features_BJ = torch.zeros_like(features_BJ).scatter(1, strongest_BK, chosen_BK)
    residual_BLD = residual_BLD.detach().float()
    error_BC = (features_BJ @ W_dead_JLD.flatten(1)).float() - residual_BLD.flatten(1)
    squared_residual = residual_BLD.square().sum()
    return torch.where(squared_residual > 0, error_BC.square().sum() / squared_residual.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
