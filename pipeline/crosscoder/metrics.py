"""What a crosscoder loses, measured over a whole held-out set from sums that are added up a batch at a time.

x is the raw activation of a position, x_hat its reconstruction, e = x - x_hat. Every sum is float64 and runs over all
positions that are added, so no result depends on how they are divided into batches. `DEFINITIONS` says what each number is.

B positions, S positions in a context, L layers, D model width, F features, V vocabulary; C = L + 1 columns: the layers, and
the *joint* one, which is all layers' activations side by side, each layer multiplied by its normalization scale; T terms.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DENSE_FRACTION = 0.1
CHUNK_NUMBERS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""At most so many numbers of a batch are turned to float64, or into log-probabilities, at a time: 32 MiB stay near a core's
cache; a GPU takes 1 GiB at once, since with a vocabulary of 50,257 the smaller chunks are 83 positions, too few to fill it."""

DEFINITIONS = {
    "explained_variance": "1 - sum |e|^2 / sum |x - mean|^2, both sums and the mean over all held-out positions",
    "fraction_unexplained": "1 - explained_variance",
    "explained_variance_legacy": "mean over positions of 1 - |e|^2 / |x - mean|^2; a position with x = mean is left out",
    "explained_variance_of_residual": "1 - sum |e - mean e|^2 / sum |x - mean|^2: a constant error costs nothing",
    "explained_norm": "1 - sum |e|^2 / sum |x|^2: against predicting zero instead of the mean",
    "best_scalar": "the a for which sum |x - a x_hat|^2 is least: above 1, the reconstruction is shrunk",
    "norm_ratio": "sqrt(sum |x_hat|^2 / sum |x|^2)",
    "median_error": "median |e| / median |x|, each median over positions and good to 0.05 %",
    "mean_squared_error": "mean over positions of |e|^2",
    "joint": "all layers side by side, each multiplied by its normalization scale: numerators and denominators are summed over layers",
    "mean_over_layers": "mean of the layers' own values",
    "l0": "mean number of features with f > 0 at a position, with the inference activation function (BatchTopK: its threshold)",
    "l0_as_trained": "the same with BatchTopK taken over groups of as many held-out positions as a training batch has; null for others",
    "num_features": "size of the dictionary; `dead_fraction` and the like are shares of it",
    "step": "training steps behind the checkpoint",
    "tokens_trained": "training positions behind the checkpoint",
    "dead_window_tokens": "training positions without firing after which a feature is dead",
    "dead": "features that did not fire in the last `dead_window_tokens` training tokens",
    "dead_eval": "features that fire on no held-out position",
    "dense": "features that fire on over 10 % of the held-out positions",
    "clean_cross_entropy": "cross_entropy of the unchanged model",
    "cross_entropy": "mean of -log p(next token) in nats over the counted predictions",
    "difference": "cross_entropy minus the clean model's, in nats",
    "kl": "mean over the counted predictions of KL(clean model || changed model), in nats",
    "recovered_against_zero": "(cross-entropy with zeros - cross_entropy) / (cross-entropy with zeros - clean), same layers replaced",
    "recovered_against_mean": "the same against mean ablation: the held-out mean in place of zeros",
    "crosscoder": "a layer's activations replaced by their reconstructions; `all`: every layer at once, from one encode of the clean run",
    "mean": "the layer's mean over the held-out positions in place of its activations",
    "zero": "zeros in place of a layer's activations",
    "other_layer": "another layer's activation of the clean run taken as it is",
    "other_layer_matched": "mean_l + (x_m - mean_m) * sqrt(sum |x_l - mean_l|^2 / sum |x_m - mean_m|^2) for layer m in place of layer l",
    "contexts": "held-out contexts that the language model reads",
    "tokens": "ids in them, separators counted",
    "positions": "held-out positions that are encoded and replaced: all but position 0 of each context and padding; separators count",
    "predictions": "next-token predictions made at replaced positions; the first token of a document is not predicted from the one before",
}
"""Every name in `metrics.json`."""


def ratio(numerator: float, denominator: float) -> float | None:
    """Their quotient, or None where it is not defined."""
    return numerator / denominator if denominator != 0 else None


def _chunks(num_rows: int, numbers_per_row: int, device: torch.device) -> list[slice]:
    rows = max(1, CHUNK_NUMBERS[device.type] // numbers_per_row)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


class LayerMoments:
    """Mean and centered squared norm of each layer's activations, over all that was added."""

    def __init__(self, num_layers: int, d_model: int, device: torch.device) -> None:
        self.num_positions = 0
        self._sum_LD = torch.zeros(num_layers, d_model, dtype=torch.float64, device=device)
        self._squares_L = torch.zeros(num_layers, dtype=torch.float64, device=device)

    def add(self, acts_BLD: Tensor) -> None:
        for part in _chunks(len(acts_BLD), self._sum_LD.numel(), acts_BLD.device):
            acts = acts_BLD[part].double()
            self._sum_LD += acts.sum(0)
            self._squares_L += acts.square().sum((0, 2))
        self.num_positions += len(acts_BLD)

    @property
    def mean_LD(self) -> Tensor:
        return self._sum_LD / self.num_positions

    @property
    def mean_squared_centered_norm_L(self) -> Tensor:
        return (self._squares_L / self.num_positions - self.mean_LD.square().sum(-1)).clamp(min=0)


class Medians:
    """The median of each of C streams of values from 0 on, to 0.05 % of its value, from counts in buckets.

    A bucket is 1/1,024 of the way from one power of two to the next: the upper bits of a float32. Values under 2^-32 count as
    0, those over 2^32 as 2^32. Of an even number of values it is the lower one of the middle two.
    """

    BUCKETS = 64 * 1024
    _SHIFT = 13
    _FIRST = (127 - 32) << 10

    def __init__(self, num_columns: int, device: torch.device) -> None:
        self._counts_CK = torch.zeros(num_columns, self.BUCKETS, dtype=torch.int64, device=device)

    def add(self, values_BC: Tensor) -> None:
        num_columns = self._counts_CK.shape[0]
        bucket_BC = (values_BC.float().view(torch.int32) >> self._SHIFT) - self._FIRST
        bucket_BC = bucket_BC.clamp(0, self.BUCKETS - 1).long()
        offset_C = torch.arange(num_columns, device=values_BC.device) * self.BUCKETS
        counts = torch.bincount((bucket_BC + offset_C).flatten(), minlength=num_columns * self.BUCKETS)
        self._counts_CK += counts.view(num_columns, self.BUCKETS)

    def values(self) -> list[float]:
        """The medians; 0 where nothing was added."""
        running_CK = self._counts_CK.cumsum(1)
        half_C1 = (running_CK[:, -1:] + 1) // 2
        buckets = (running_CK < half_C1).sum(1).tolist()
        return [self._middle(bucket) for bucket in buckets]

    def _middle(self, bucket: int) -> float:
        octave, step = divmod(bucket, 1024)
        return math.ldexp(1 + (step + 0.5) / 1024, octave - 32) if bucket > 0 else 0.0


class ReconstructionMetrics(NamedTuple):
    """Of one layer, or of all jointly; see `DEFINITIONS`. None where a denominator is zero."""

    explained_variance: float | None
    fraction_unexplained: float | None
    explained_variance_legacy: float | None
    explained_variance_of_residual: float | None
    explained_norm: float | None
    best_scalar: float | None
    norm_ratio: float | None
    median_error: float | None
    mean_squared_error: float | None


class Reconstruction:
    """How well an approximation of the activations of some layers does, from what is added batch by batch.

    Parameters
    ----------
    mean_LD : the layers' means over the very positions that will be added.
    scale_L : the factors by which the layers are multiplied to be put side by side in the joint column.
    """

    def __init__(self, mean_LD: Tensor, scale_L: Tensor) -> None:
        columns, device = len(mean_LD) + 1, mean_LD.device
        self.num_positions = 0
        self._mean_LD = mean_LD.double()
        self._weight_L = scale_L.to(device).double().square()
        self._error_sum_LD = torch.zeros_like(self._mean_LD)
        self._sums_TC = torch.zeros(len(_Sums._fields), columns, dtype=torch.float64, device=device)
        self._error_median = Medians(columns, device)
        self._norm_median = Medians(columns, device)

    def add(self, acts_BLD: Tensor, approximations_BLD: Tensor) -> None:
        for part in _chunks(len(acts_BLD), self._mean_LD.numel(), acts_BLD.device):
            self._add_chunk(acts_BLD[part].double(), approximations_BLD[part].double())
        self.num_positions += len(acts_BLD)

    def _add_chunk(self, acts_BLD: Tensor, approximations_BLD: Tensor) -> None:
        error_BLD = acts_BLD - approximations_BLD
        self._error_sum_LD += error_BLD.sum(0)
        error_BC = self._columns(error_BLD.square())
        centered_BC = self._columns((acts_BLD - self._mean_LD).square())
        norm_BC = self._columns(acts_BLD.square())
        approximation_BC = self._columns(approximations_BLD.square())
        product_BC = self._columns(acts_BLD * approximations_BLD)
        varies_BC = centered_BC > 0
        ratio_BC = torch.where(varies_BC, error_BC / centered_BC.where(varies_BC, 1.0), 0.0)
        terms = (error_BC, centered_BC, norm_BC, approximation_BC, product_BC, ratio_BC, varies_BC.double())
        self._sums_TC += torch.stack([term_BC.sum(0) for term_BC in terms])
        self._error_median.add(error_BC.sqrt())
        self._norm_median.add(norm_BC.sqrt())

    def _columns(self, products_BLD: Tensor) -> Tensor:
        """Summed over the width, with the joint column (layers weighted by their squared scale) added at the end."""
        sums_BL = products_BLD.sum(-1)
        return torch.cat([sums_BL, (sums_BL * self._weight_L).sum(-1, keepdim=True)], dim=-1)

    def layers(self) -> list[ReconstructionMetrics]:
        return self._all()[:-1]

    def joint(self) -> ReconstructionMetrics:
        return self._all()[-1]

    def mean_over_layers(self) -> ReconstructionMetrics:
        """Of each number the mean of the layers' values, None if a layer has none."""
        return ReconstructionMetrics(*[_mean(values) for values in zip(*self.layers(), strict=True)])

    def _all(self) -> list[ReconstructionMetrics]:
        mean_error_LD = self._error_sum_LD / max(1, self.num_positions)
        constant_C = self._columns(mean_error_LD.square()[None])[0] * self.num_positions
        medians = zip(self._error_median.values(), self._norm_median.values(), strict=True)
        columns = zip(self._sums_TC.T.tolist(), constant_C.tolist(), medians, strict=True)
        return [self._metrics(_Sums(*terms), constant, *pair) for terms, constant, pair in columns]

    def _metrics(self, sums: "_Sums", constant_error: float, error_median: float, norm_median: float) -> ReconstructionMetrics:
        unexplained = ratio(sums.error, sums.centered)
        squared_norm_ratio = ratio(sums.approximation, sums.norm)
        return ReconstructionMetrics(
            explained_variance=_one_minus(unexplained),
            fraction_unexplained=unexplained,
            explained_variance_legacy=_one_minus(ratio(sums.ratios, sums.num_ratios)),
            explained_variance_of_residual=_one_minus(ratio(sums.error - constant_error, sums.centered)),
            explained_norm=_one_minus(ratio(sums.error, sums.norm)),
            best_scalar=ratio(sums.product, sums.approximation),
            norm_ratio=None if squared_norm_ratio is None else math.sqrt(squared_norm_ratio),
            median_error=ratio(error_median, norm_median),
            mean_squared_error=ratio(sums.error, self.num_positions),
        )


class _Sums(NamedTuple):
    """Over positions, of one column; the order of the rows of `Reconstruction._sums_TC`."""

    error: float  # |e|^2
    centered: float  # |x - mean|^2
    norm: float  # |x|^2
    approximation: float  # |x_hat|^2
    product: float  # x . x_hat
    ratios: float  # |e|^2 / |x - mean|^2
    num_ratios: float  # positions where that is defined


def _one_minus(value: float | None) -> float | None:
    return None if value is None else 1.0 - value


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


class FiringCounts:
    """On how many positions each feature fires (f > 0)."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        self.num_positions = 0
        self.counts_F = torch.zeros(num_features, dtype=torch.int64, device=device)

    def add(self, features_BF: Tensor) -> None:
        self.counts_F += (features_BF > 0).sum(0)
        self.num_positions += len(features_BF)

    @property
    def l0(self) -> float | None:
        return ratio(int(self.counts_F.sum()), self.num_positions)

    @property
    def num_silent(self) -> int:
        return int((self.counts_F == 0).sum())

    @property
    def num_dense(self) -> int:
        return int((self.counts_F > DENSE_FRACTION * self.num_positions).sum())


class Predictions:
    """Cross-entropy of next-token predictions, and their divergence from the clean model's, in nats."""

    def __init__(self, device: torch.device) -> None:
        self.num_predictions = 0
        self._sums_2 = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, logits_BSV: Tensor, targets_BS: Tensor, counted_BS: Tensor, clean_logits_BSV: Tensor) -> None:
        """Adds the positions where `counted_BS` is true; `targets_BS` holds the token that follows each position."""
        rows = counted_BS.flatten().nonzero().squeeze(1)
        logits_NV, clean_NV, targets_N = logits_BSV.flatten(0, 1), clean_logits_BSV.flatten(0, 1), targets_BS.flatten()
        for part in _chunks(len(rows), logits_NV.shape[-1], logits_NV.device):
            chosen = rows[part]
            log_p = logits_NV[chosen].float().log_softmax(-1)
            clean_log_p = clean_NV[chosen].float().log_softmax(-1)
            loss_N = -log_p.gather(1, targets_N[chosen, None]).squeeze(1)
            divergence_N = (clean_log_p.exp() * (clean_log_p - log_p)).sum(-1)
            self._sums_2 += torch.stack([loss_N.double().sum(), divergence_N.double().sum()])
        self.num_predictions += len(rows)

    @property
    def cross_entropy(self) -> float:
        return self._sums_2[0].item() / self.num_predictions

    @property
    def kl(self) -> float:
        return self._sums_2[1].item() / self.num_predictions


def recovered(*, ablated: float, spliced: float, clean: float) -> float | None:
    """The share of an ablation's damage to the cross-entropy that the splice does not do; None if the ablation does none."""
    return ratio(ablated - spliced, ablated - clean)
