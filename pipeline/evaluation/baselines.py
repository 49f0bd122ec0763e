"""What a crosscoder is held against: simpler things that may stand in for a layer's activations, fitted on rows of their own.

Each is an `Approximation` that gives all of the crosscoder's layers from the activations of these same layers.

Shapes: N positions, L layers of the crosscoder, D model width, C = L D, R rank, F features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.evaluation.approximations import FEATURES_AT_A_TIME, Approximation, Give
from pipeline.evaluation.covariances import Covariances

RIDGE = 1e-6
"""Added to the diagonal of the normal equations, times its mean: enough to solve them, too little to weaken the map."""
WIDEST_JOINT = 4096
"""Principal directions over all layers are computed up to this many dimensions: the time grows with their cube."""


class Fit(NamedTuple):
    """What the rows that baselines are fitted on gave."""

    covariances: Covariances
    sample_NLD: Tensor
    """The first of them, for what can't be had from covariances."""
    l0: float
    """Of the crosscoder on the sample: the rank and the sparsity that baselines get."""


def fitted_baselines(fit: Fit, trained: TrainedCrosscoder, *, seed: int) -> list[Approximation]:
    """All baselines that are fitted, in the order in which tables show them."""
    layers = trained.layers
    found = [*_from_other_layers(fit.covariances, layers), *_principal(fit.covariances, ranks_of(fit))]
    found.append(_random_dictionary(fit, trained.num_features, seed=seed))
    return [baseline._replace(give=_of_first(len(layers), baseline.give)) for baseline in found]


def _of_first(num_layers: int, give: Give) -> Give:
    """Of what is read, the crosscoder's layers come first; others' may follow."""
    return lambda acts_NXD: give(acts_NXD[:, :num_layers])


def ranks_of(fit: Fit) -> dict[str, int]:
    """How many principal directions the baselines have: as many as features fire, if there are so many."""
    rank, covariances = max(1, round(fit.l0)), fit.covariances
    return {"pca": min(rank, covariances.d_model), "pca_joint": min(rank, covariances.num_layers * covariances.d_model)}


# -- from the other layers ----------------------------------------------------------------------------------------------------


def _from_other_layers(covariances: Covariances, layers: list[str]) -> list[Approximation]:
    """Each layer from the one other layer that explains most of it: by an affine map, matched, and as it is; and from all others."""
    if len(layers) == 1:
        return []
    found = []
    for by, choose in {"affine": _affine, "other_layer_matched": _matched, "other_layer": _as_it_is}.items():
        maps = [max((choose(covariances, layer, [other]) for other in covariances.neighbours(layer)), key=_explains)
                for layer in range(len(layers))]  # fmt: skip
        found.append(_by_maps(by, maps, [layers[chosen.sources[0]] for chosen in maps]))
    if len(layers) > 2 and covariances.has_all_pairs:
        maps = [_affine(covariances, layer, covariances.neighbours(layer)) for layer in range(len(layers))]
        found.insert(1, _by_maps("affine_all", maps, [None] * len(layers)))
    return found


class LayerMap(NamedTuple):
    """x_target is about offset + the sources, side by side, times weight; float64."""

    sources: list[int]
    weight: Tensor
    """[S, D], or a number where it is a multiple of the identity."""
    offset_D: Tensor
    explained_variance: float
    """On the rows that it was fitted on."""

    def __call__(self, acts_NLD: Tensor) -> Tensor:
        source_NS = acts_NLD[:, self.sources].flatten(1).double()
        return self.offset_D + (source_NS @ self.weight if self.weight.dim() else source_NS * self.weight)


def _explains(found: LayerMap) -> float:
    return found.explained_variance


def _affine(covariances: Covariances, target: int, sources: list[int]) -> LayerMap:
    """Least squares with a small ridge: the normal equations of all rows."""
    among_SS, with_target_SD = covariances.block(sources, sources), covariances.block(sources, [target])
    ridge = RIDGE * float(among_SS.trace()) / len(among_SS)
    lower_SS = torch.linalg.cholesky(among_SS + (ridge + torch.finfo(torch.float64).tiny) * torch.eye(len(among_SS)).to(among_SS))
    weight_SD = torch.cholesky_solve(with_target_SD, lower_SS)
    unexplained = covariances.between(target, target).trace() - 2 * (weight_SD * with_target_SD).sum()
    unexplained += (weight_SD * (among_SS @ weight_SD)).sum()
    mean_LD = covariances.mean_LD
    return _layer_map(covariances, target, sources, weight_SD, mean_LD[target] - mean_LD[sources].flatten() @ weight_SD, unexplained)


def _matched(covariances: Covariances, target: int, sources: list[int]) -> LayerMap:
    """The other layer moved and scaled to this one's mean and spread."""
    variance_L, mean_LD = covariances.variance_L, covariances.mean_LD
    gain = torch.where(variance_L[sources[0]] > 0, (variance_L[target] / variance_L[sources[0]]).sqrt(), 0.0)
    return _scaled(covariances, target, sources, gain, mean_LD[target] - gain * mean_LD[sources[0]])


def _as_it_is(covariances: Covariances, target: int, sources: list[int]) -> LayerMap:
    one = covariances.mean_LD.new_ones(())
    return _scaled(covariances, target, sources, one, torch.zeros_like(covariances.mean_LD[target]))


def _scaled(covariances: Covariances, target: int, sources: list[int], gain: Tensor, offset_D: Tensor) -> LayerMap:
    source, mean_LD = sources[0], covariances.mean_LD
    constant = (mean_LD[target] - gain * mean_LD[source] - offset_D).square().sum()
    varying = covariances.variance_L[target] + gain.square() * covariances.variance_L[source]
    unexplained = constant + varying - 2 * gain * covariances.between(target, source).trace()
    return _layer_map(covariances, target, sources, gain, offset_D, unexplained)


def _layer_map(
    covariances: Covariances, target: int, sources: list[int], weight: Tensor, offset_D: Tensor, unexplained: Tensor
) -> LayerMap:
    return LayerMap(sources, weight, offset_D, _share_explained(unexplained, covariances.variance_L[target]))


def _share_explained(unexplained: Tensor, variance: Tensor) -> float:
    return float(1 - unexplained / variance) if float(variance) > 0 else 0.0


def _by_maps(by: str, maps: list[LayerMap], sources: Sequence[str | None]) -> Approximation:
    def give(acts_NLD: Tensor) -> Tensor:
        return torch.stack([layer_map(acts_NLD) for layer_map in maps], dim=1)

    return Approximation(by, list(sources), list(range(len(maps))), give, [found.explained_variance for found in maps])


# -- the best of a rank -------------------------------------------------------------------------------------------------------


def _principal(covariances: Covariances, ranks: dict[str, int]) -> list[Approximation]:
    """The principal directions of each layer alone, and of all of them side by side, each scaled to the same spread."""
    num_layers, mean_LD, variance_L = covariances.num_layers, covariances.mean_LD, covariances.variance_L
    alone = [Directions(covariances.between(layer, layer), ranks["pca"]) for layer in range(num_layers)]
    fitted = [_share_explained(directions.unexplained_C.sum(), directions.all_C.sum()) for directions in alone]
    projectors = [directions.basis_CR @ directions.basis_CR.T for directions in alone]

    def give(acts_NLD: Tensor) -> Tensor:
        centered_LND = (acts_NLD.double() - mean_LD).float().unbind(1)
        return mean_LD + torch.stack([part_ND @ onto_DD for part_ND, onto_DD in zip(centered_LND, projectors, strict=True)], dim=1)

    found = [Approximation("pca", [None] * num_layers, list(range(num_layers)), give, fitted)]
    if num_layers > 1 and covariances.has_all_pairs and mean_LD.numel() <= WIDEST_JOINT:
        found.append(_principal_joint(covariances, ranks["pca_joint"], _inverse_root(variance_L)))
    return found


def _principal_joint(covariances: Covariances, rank: int, scale_L: Tensor) -> Approximation:
    num_layers, mean_LD = covariances.num_layers, covariances.mean_LD
    scale_C = scale_L.repeat_interleave(covariances.d_model)
    layers = list(range(num_layers))
    joint = Directions(covariances.block(layers, layers) * scale_C[:, None] * scale_C, rank)
    by_layer = zip(joint.unexplained_C.view(num_layers, -1).sum(1), joint.all_C.view(num_layers, -1).sum(1), strict=True)
    back_L = torch.where(scale_L > 0, 1 / scale_L, 0.0)

    def give(acts_NLD: Tensor) -> Tensor:
        centered_NC = ((acts_NLD.double() - mean_LD) * scale_L[:, None]).flatten(1).float()
        kept_NLD: Tensor = (centered_NC @ joint.basis_CR @ joint.basis_CR.T).view_as(acts_NLD)
        return mean_LD + kept_NLD * back_L[:, None]

    return Approximation("pca_joint", [None] * num_layers, layers, give, [_share_explained(*pair) for pair in by_layer])


class Directions:
    """The `rank` principal directions of a covariance."""

    def __init__(self, covariance_CC: Tensor, rank: int) -> None:
        values_C, vectors_CC = torch.linalg.eigh(covariance_CC)
        kept_CR, values_R = vectors_CC[:, -rank:], values_C[-rank:]
        self.basis_CR = kept_CR.float()
        self.all_C = covariance_CC.diagonal()
        self.unexplained_C = self.all_C - (kept_CR.square() * values_R).sum(1)


def rank_that_explains(covariances: Covariances, layer: int, share: float) -> int:
    """The least rank at which a layer's principal directions explain so much of its variance; its width if none does."""
    if share <= 0:
        return 0
    values_D = torch.linalg.eigvalsh(covariances.between(layer, layer)).flip(0).clamp(min=0)
    explained_D = values_D.cumsum(0) / values_D.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return min(int((explained_D < share).sum()) + 1, len(values_D))


def _inverse_root(values_L: Tensor) -> Tensor:
    """1 / sqrt, and 0 of 0."""
    root_L: Tensor = torch.where(values_L > 0, values_L.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    return root_L


# -- a dictionary that nobody trained -----------------------------------------------------------------------------------------


def _random_dictionary(fit: Fit, num_features: int, *, seed: int) -> Approximation:
    """Random directions over all layers: those fire whose product with the activations is over one threshold for all.

    The threshold gives the crosscoder's L0 on the sample; a factor and an offset a layer are the least-squares ones there.
    """
    covariances = fit.covariances
    num_layers, d_model = covariances.num_layers, covariances.d_model
    mean_LD, scale_L = covariances.mean_LD, _inverse_root(covariances.variance_L)
    drawn_FC = torch.randn(num_features, num_layers * d_model, generator=Generator().manual_seed(seed))
    decoder_FC = torch.nn.functional.normalize(drawn_FC, dim=1).to(mean_LD.device)
    rows_at_a_time = max(1, FEATURES_AT_A_TIME // num_features)

    def products(acts_NLD: Tensor) -> Tensor:
        return ((acts_NLD.double() - mean_LD) * scale_L[:, None]).flatten(1).float() @ decoder_FC.T

    def decoded(acts_NLD: Tensor, threshold: Tensor) -> Tensor:
        parts = [torch.empty_like(acts_NLD[:0])]
        for part_NLD in torch.split(acts_NLD, rows_at_a_time):
            products_NF = products(part_NLD)
            parts.append((torch.where(products_NF > threshold, products_NF, 0.0) @ decoder_FC).view_as(part_NLD))
        return torch.cat(parts)

    threshold = _threshold(products, fit, rows_at_a_time)
    decoded_NLD = decoded(fit.sample_NLD, threshold).double()
    offset_LD, factor_L, fitted = _least_squares(decoded_NLD, fit.sample_NLD.double())

    def give(acts_NLD: Tensor) -> Tensor:
        return offset_LD + decoded(acts_NLD, threshold).double() * factor_L[:, None]

    return Approximation("random_dictionary", [None] * num_layers, list(range(num_layers)), give, fitted)


def _threshold(products: Give, fit: Fit, rows_at_a_time: int) -> Tensor:
    """What `l0` products a position are above, over the whole sample; at least 0."""
    wanted = max(1, round(fit.l0 * len(fit.sample_NLD)))
    highest = fit.sample_NLD.new_empty(0)
    for part_NLD in torch.split(fit.sample_NLD, rows_at_a_time):
        candidates = torch.cat([highest, products(part_NLD).flatten()])
        highest = torch.topk(candidates, min(wanted + 1, len(candidates)), sorted=False).values
    return highest.min().clamp(min=0)


def _least_squares(decoded_NLD: Tensor, acts_NLD: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """offset_LD and factor_L for which offset + factor * decoded is nearest to the activations, and how much that explains."""
    decoded_mean_LD, mean_LD = decoded_NLD.mean(0), acts_NLD.mean(0)
    centered_NLD, target_NLD = decoded_NLD - decoded_mean_LD, acts_NLD - mean_LD
    squares_L, products_L = centered_NLD.square().sum((0, 2)), (centered_NLD * target_NLD).sum((0, 2))
    factor_L = torch.where(squares_L > 0, products_L / squares_L.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    unexplained_L, spread_L = (target_NLD - factor_L[:, None] * centered_NLD).square().sum((0, 2)), target_NLD.square().sum((0, 2))
    fitted = [_share_explained(*pair) for pair in zip(unexplained_L, spread_L, strict=True)]
    return mean_LD - factor_L[:, None] * decoded_mean_LD, factor_L, fitted
