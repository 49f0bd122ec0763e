"""The terms of a crosscoder's loss.

Shapes: B positions in a batch, L layers, D model width, F features, J dead features.

Squared errors are summed over width and layers and averaged over positions, so with the default normalization the loss
of a crosscoder that outputs zeros is L * D. All reductions give float32, whatever the precision of the matrix products.

A new term is a class of settings in `pipeline.config.loss` (a subclass of `Term`, and a field of `Loss`), a function here, and an
entry in `TERMS`. The function takes the term's settings and a `Pass` and gives a scalar without its coefficient; over the parts
of a batch its values and gradients must add up to those of the whole batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.config.loss import L1, Auxk, GatedAuxiliary, L0Target, Orthogonality, PreActivation, Reconstruction, Tanh, Term
from pipeline.crosscoder import straight_through
from pipeline.crosscoder.activation_functions import JumpReluFunction
from pipeline.crosscoder.training_pass import Pass
from pipeline.crosscoder.weights import decoder_norms, layer_norms

ACROSS_LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda norms_FL: norms_FL.sum(dim=-1),
    "l2": lambda norms_FL: torch.linalg.vector_norm(norms_FL, dim=-1),
    "max": lambda norms_FL: norms_FL.amax(dim=-1),
}
TINY = torch.finfo(torch.float32).tiny


def squared_norms_L(vectors_BLD: Tensor) -> Tensor:
    """Sum over positions and width of the squares, for each layer; float32."""
    return vectors_BLD.float().square().sum(dim=(0, 2))


def reconstruction(settings: Reconstruction, p: Pass, residual_L: Tensor) -> Tensor:
    """The squared error, reduced as `settings` say; with prefixes the mean over them and the whole dictionary."""
    error = residual_L.sum() / p.num_positions
    if settings.prefixes:
        errors = [squared_norms_L(residual_BLD).sum() for residual_BLD in _prefix_residuals(settings.prefixes, p)]
        error = (error + torch.stack(errors).sum() / p.num_positions) / (len(errors) + 1)
    return error if settings.reduction == "sum" else error / p.acts_BLD[0].numel()


def _prefix_residuals(prefixes: list[int], p: Pass) -> list[Tensor]:
    """acts_BLD minus the reconstruction from the first n features, for each n."""
    W_dec_FC = p.weights.W_dec_FLD.flatten(1)
    left_BLD = p.acts_BLD - p.crosscoder.b_dec_LD
    if p.crosscoder.dense is not None:
        left_BLD = left_BLD - p.crosscoder.dense_part(p.acts_BLD)
    left_BC, residuals, start = left_BLD.flatten(1), [], 0
    for stop in prefixes:
        left_BC = left_BC - p.fired.features_BF[:, start:stop] @ W_dec_FC[start:stop]
        residuals.append(p.crosscoder.only_written(left_BC.view_as(p.acts_BLD)))
        start = stop
    return residuals


def l1(settings: L1, p: Pass) -> Tensor:
    """Each feature's activation times the norm of its decoder, summed over features, over the positions of the batch.

    With the defaults the sparsity term of Lindsey et al. 2024 ("Sparse Crosscoders"), in the activations' unit: scaling a feature
    up and its decoder down leaves it unchanged, so the model can't cheat it.
    """
    # Penalized activations are never negative, so their sum is their L1 norm; summing positions first avoids a float32 copy of [B, F].
    sums_F = p.fired.penalized_BF.sum(dim=0, dtype=torch.float32)
    if settings.decoder_norms == "absent":
        total = sums_F.sum()
    else:
        norms_F = _norms(settings, p.weights.W_dec_FLD, p.norms_F)
        total = torch.dot(sums_F, norms_F.detach() if settings.decoder_norms == "detached" else norms_F)
    return total if settings.positions == "sum" else total / p.num_positions


def _norms(settings: L1, W_dec_FLD: Tensor, norms_F: Tensor) -> Tensor:
    if settings.norm == "l2" and settings.across_layers == "sum":
        return norms_F
    in_layer_FL = layer_norms(W_dec_FLD) if settings.norm == "l2" else W_dec_FLD.abs().sum(dim=-1)
    norms: Tensor = ACROSS_LAYERS[settings.across_layers](in_layer_FL)
    return norms


def tanh(settings: Tanh, p: Pass) -> Tensor:
    """Mean over positions of the sum over features of tanh(steepness * activation * decoder norm)."""
    return torch.tanh(settings.steepness * p.fired.penalized_BF * p.norms_F).sum(dtype=torch.float32) / p.num_positions


def l0_target(settings: L0Target, p: Pass) -> Tensor:
    """(L0 / target - 1)^2. Its gradient is the step's, by the window around each threshold; the pre-activations get none."""
    assert p.values.bandwidth is not None
    fires_BF = straight_through.step(p.pre_BF.detach(), _thresholds(p), p.values.bandwidth)
    l0 = fires_BF.sum() / p.num_positions
    if p.batch is None:
        return (l0 / settings.target - 1.0).square()
    # A square of a sum: each part has the gradient of the whole with respect to its own summand, and its share of the value.
    whole = p.batch.l0 + (l0 - l0.detach())
    value = (whole / settings.target - 1.0).square()
    return value - (1.0 - p.share) * value.detach()


def pre_activation(settings: PreActivation, p: Pass) -> Tensor:
    """Mean over positions of the sum over features of relu(threshold - pre) * decoder norm; the decoder gets no gradient."""
    below_BF = torch.relu(_thresholds(p) - p.pre_BF)
    return torch.dot(below_BF.sum(dim=0, dtype=torch.float32), p.norms_F.detach()) / p.num_positions


def _thresholds(p: Pass) -> Tensor:
    """[F], in the pre-activation's unit; those that are learned with their gradient."""
    function = p.crosscoder.activation_function
    return function.thresholds() if isinstance(function, JumpReluFunction) else torch.zeros_like(p.norms_F)


def orthogonality(settings: Orthogonality, p: Pass) -> Tensor:
    """Mean over pairs of different sampled features of their decoders' squared cosine, all layers side by side."""
    assert p.values.sample_J is not None
    rows_JC = torch.index_select(p.weights.W_dec_FLD, 0, p.values.sample_J).flatten(1)
    units_JC = rows_JC / torch.linalg.vector_norm(rows_JC, dim=1, keepdim=True).clamp(min=TINY**0.5)
    gram_JJ = (units_JC @ units_JC.T).float()
    num_pairs = max(1, gram_JJ.shape[0] * (gram_JJ.shape[0] - 1))
    of_others: Tensor = gram_JJ.square().sum() - gram_JJ.diagonal().square().sum()
    mean_of_pairs: Tensor = of_others * (p.share / num_pairs)
    return mean_of_pairs


def auxk(settings: Auxk, p: Pass) -> Tensor:
    """The share of the residual that its best reconstruction from dead features leaves, times the batch's variance a position.

    The auxiliary loss of Gao et al. 2024 ("Scaling and evaluating sparse autoencoders", appendix A.2): the k strongest of the dead
    features at each position, by pre-activation times decoder norms, model the residual e = x - x_hat, which carries no
    gradient. Gao et al. divide both terms, the reconstruction by the variance and this one by the residual. Here the first is in
    absolute units, so this one is multiplied by the variance: their ratio is the paper's. 0 where there is no residual or no
    dead feature. The chosen features' gradient goes through the rectifier as if it weren't there, since the encoder of
    one that is negative everywhere would else never learn.
    """
    if p.dead_J is None:
        return p.residual_BLD.new_zeros((), dtype=torch.float32)
    # index_select rather than indexing: the backward of indexing sorts the indices first.
    W_dead_JLD = torch.index_select(p.weights.W_dec_FLD, 0, p.dead_J)
    pre_BJ = torch.index_select(p.pre_BF, 1, p.dead_J)
    k = settings.k or max(1, p.acts_BLD.shape[2] // 2)
    if k < p.dead_J.numel():
        with torch.no_grad():
            rank_BJ = pre_BJ * decoder_norms(W_dead_JLD).to(pre_BJ.dtype)
            strongest_BK = torch.topk(rank_BJ, k, dim=-1, sorted=False).indices
        chosen_BK = straight_through.leaky_gradient_relu(torch.gather(pre_BJ, 1, strongest_BK), 1.0)
        features_BJ = torch.zeros_like(pre_BJ).scatter(1, strongest_BK, chosen_BK)
    else:
        features_BJ = straight_through.leaky_gradient_relu(pre_BJ, 1.0)
    residual_BLD = p.residual_BLD.detach().float()
    error_BC = (features_BJ @ W_dead_JLD.flatten(1)).float() - residual_BLD.flatten(1)
    squared_residual = residual_BLD.square().sum() if p.batch is None else p.batch.squared_residual
    share_left = torch.where(squared_residual > 0, error_BC.square().sum() / squared_residual.clamp(min=TINY), 0.0)
    return share_left * p.variance


def gated(settings: GatedAuxiliary, p: Pass) -> Tensor:
    """The squared error of what the gate's rectified pre-activations decode to, through weights that get no gradient here."""
    W_dec_FC, bias_C = p.weights.W_dec_FLD.detach().flatten(1), p.crosscoder.b_dec_LD.detach().flatten()
    x_BLD = torch.addmm(bias_C, p.fired.penalized_BF, W_dec_FC).view_as(p.acts_BLD)
    if p.crosscoder.dense is not None:
        x_BLD = x_BLD + p.crosscoder.dense_part(p.acts_BLD).detach()
    return squared_norms_L(p.crosscoder.only_written(p.acts_BLD - x_BLD)).sum() / p.num_positions


TERMS: dict[type[Term], Callable[[Any, Pass], Tensor]] = {
    L1: l1,
    Tanh: tanh,
    L0Target: l0_target,
    PreActivation: pre_activation,
    Orthogonality: orthogonality,
    Auxk: auxk,
    GatedAuxiliary: gated,
}
"""By the type of its settings, what gives a term's value without its coefficient."""
