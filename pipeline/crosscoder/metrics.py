"""What a crosscoder loses, measured over a whole held-out set from sums that are added up a batch at a time.

x is the raw activation of a position, x_hat its reconstruction, e = x - x_hat. Every sum is float64 and runs over all
positions that are added, so no result depends on how they are divided into batches. `pipeline.evaluation.definitions` says
what each number is.

B positions, L layers, D model width, F features, V vocabulary; C = L + 1 columns: the layers, and the *joint* one, which is
all layers' activations side by side, each layer multiplied by a factor of its own; T terms.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DENSE_FRACTION = 0.1
CHUNK_NUMBERS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""At most so many numbers of a batch are turned to float64, or into log-probabilities, at a time: 32 MiB stay near a core's
cache; a GPU takes 1 GiB at once, since with a vocabulary of 50,257 the smaller chunks are 83 positions, too few to fill it."""


def ratio(numerator: float, denominator: float) -> float | None:
    """Their quotient, or None where it is not defined."""
    return numerator / denominator if denominator != 0 else None


def chunks(num_rows: int, numbers_per_row: int, device: torch.device) -> list[slice]:
    """Parts of `num_rows` rows, each of at most `CHUNK_NUMBERS` numbers."""
    rows = max(1, CHUNK_NUMBERS[device.type] // numbers_per_row)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


class LayerMoments:
    """Mean and centered squared norm of each layer's activations, over all that was added."""

    def __init__(self, num_layers: int, d_model: int, device: torch.device) -> None:
        self.num_positions = 0
        self.sum_LD = torch.zeros(num_layers, d_model, dtype=torch.float64, device=device)
        self.squares_L = torch.zeros(num_layers, dtype=torch.float64, device=device)
        """Sum of |x|^2."""

    def add(self, acts_BLD: Tensor) -> None:
        for part in chunks(len(acts_BLD), self.sum_LD.numel(), acts_BLD.device):
            acts = acts_BLD[part].double()
            self.sum_LD += acts.sum(0)
            self.squares_L += acts.square().sum((0, 2))
        self.num_positions += len(acts_BLD)

    def with_those_of(self, other: "LayerMoments") -> "LayerMoments":
        """The moments of what was added to both."""
        together = LayerMoments(self.sum_LD.shape[0], self.sum_LD.shape[1], self.sum_LD.device)
        together.num_positions = self.num_positions + other.num_positions
        together.sum_LD, together.squares_L = self.sum_LD + other.sum_LD, self.squares_L + other.squares_L
        return together

    def squared_distance_to(self, point_LD: Tensor) -> Tensor:
        """[L]: sum of |x - point|^2."""
        products_L = (2 * self.sum_LD - self.num_positions * point_LD).mul(point_LD).sum(-1)
        return (self.squares_L - products_L).clamp(min=0)

    @property
    def mean_LD(self) -> Tensor:
        return self.sum_LD / max(1, self.num_positions)

    @property
    def spread_L(self) -> Tensor:
        """[L]: sum of |x - mean|^2."""
        return self.squared_distance_to(self.mean_LD)


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

    def share_of_greatest(self, fraction: float) -> list[float]:
        """Of each stream, the share of the sum of squares that its greatest values hold, `fraction` of all (one at least)."""
        middles_K = torch.tensor([self._middle(bucket) for bucket in range(self.BUCKETS)], dtype=torch.float64).flip(0)
        shares = []
        for counts_K in self._counts_CK.cpu().flip(1):
            taken = max(1, round(fraction * int(counts_K.sum())))
            greatest_K = torch.minimum(counts_K, (taken - counts_K.cumsum(0) + counts_K).clamp(min=0))
            squares, of_all = ((counts * middles_K.square()).sum().item() for counts in (greatest_K, counts_K))
            shares.append(squares / of_all if of_all > 0 else 0.0)
        return shares

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
    """Of one layer, or of all jointly. None where a denominator is zero."""

    explained_variance: float | None
    explained_variance_with_outliers: float | None
    fraction_unexplained: float | None
    explained_variance_legacy: float | None
    explained_variance_of_residual: float | None
    explained_norm: float | None
    best_scalar: float | None
    norm_ratio: float | None
    median_error: float | None
    mean_squared_error: float | None


class SquaredNorms(NamedTuple):
    """Of each position and layer, float64: what every approximation of the same activations is held against."""

    centered_BL: Tensor
    """|x - mean|^2"""
    raw_BL: Tensor
    """|x|^2"""


def squared_norms(acts_BLD: Tensor, mean_LD: Tensor) -> SquaredNorms:
    """Those of B positions."""
    raw_BL = acts_BLD.new_empty(acts_BLD.shape[:2], dtype=torch.float64)
    centered_BL = torch.empty_like(raw_BL)
    for part in chunks(len(acts_BLD), mean_LD.numel(), acts_BLD.device):
        acts = acts_BLD[part].double()
        raw_BL[part] = acts.square().sum(-1)
        centered_BL[part] = (acts - mean_LD).square_().sum(-1)
    return SquaredNorms(centered_BL, raw_BL)


class Reconstruction:
    """How well an approximation of the activations of some layers does, from what is added batch by batch.

    Parameters
    ----------
    mean_LD : the layers' means over the very positions that will be added.
    scale_L : the factors by which the layers are multiplied to be put side by side in the joint column.
    spread_with_outliers_L : sum of |x - mean|^2 with the outliers, mean and sum over all positions; None where there are none.
    """

    def __init__(self, mean_LD: Tensor, scale_L: Tensor, spread_with_outliers_L: Tensor | None = None) -> None:
        columns, device = len(mean_LD) + 1, mean_LD.device
        self.num_positions = 0
        self._mean_LD = mean_LD.double()
        self._weight_L = scale_L.to(device).double().square()
        self._spread_with_outliers_L = spread_with_outliers_L
        self._error_sum_LD = torch.zeros_like(self._mean_LD)
        self._sums_TC = torch.zeros(len(_Sums._fields), columns, dtype=torch.float64, device=device)
        self._outlier_error_L = torch.zeros(len(mean_LD), dtype=torch.float64, device=device)
        self._error_median = Medians(columns, device)
        self._norm_median = Medians(columns, device)

    def add(self, acts_BLD: Tensor, approximations_BLD: Tensor, norms: SquaredNorms | None = None) -> None:
        """Adds positions that count; `norms` where the caller has them already."""
        norms = norms or squared_norms(acts_BLD, self._mean_LD)
        for part in chunks(len(acts_BLD), self._mean_LD.numel(), acts_BLD.device):
            self._add_chunk(acts_BLD[part].double(), approximations_BLD[part].double(), norms.centered_BL[part], norms.raw_BL[part])
        self.num_positions += len(acts_BLD)

    def add_outliers(self, acts_BLD: Tensor, approximations_BLD: Tensor) -> None:
        """Adds positions that count in `explained_variance_with_outliers` alone."""
        for part in chunks(len(acts_BLD), self._mean_LD.numel(), acts_BLD.device):
            self._outlier_error_L += (acts_BLD[part].double() - approximations_BLD[part].double()).square().sum((0, 2))

    def _add_chunk(self, acts_BLD: Tensor, approximations_BLD: Tensor, centered_BL: Tensor, norm_BL: Tensor) -> None:
        error_BLD = acts_BLD - approximations_BLD
        self._error_sum_LD += error_BLD.sum(0)
        error_BL, approximation_BL = error_BLD.square_().sum(-1), approximations_BLD.square().sum(-1)
        # |x - x_hat|^2 is |x|^2 + |x_hat|^2 - 2 x . x_hat: one pass over the activations less.
        product_BL = (norm_BL + approximation_BL - error_BL) / 2
        columns = [self._columns(sums_BL) for sums_BL in (error_BL, centered_BL, norm_BL, approximation_BL, product_BL)]
        error_BC, centered_BC, norm_BC, _, _ = columns
        varies_BC = centered_BC > 0
        ratio_BC = torch.where(varies_BC, error_BC / centered_BC.where(varies_BC, 1.0), 0.0)
        self._sums_TC += torch.stack([term_BC.sum(0) for term_BC in (*columns, ratio_BC, varies_BC.double())])
        self._error_median.add(error_BC.sqrt())
        self._norm_median.add(norm_BC.sqrt())

    def _columns(self, sums_BL: Tensor) -> Tensor:
        """With the joint column (layers weighted by their squared scale) added at the end."""
        return torch.cat([sums_BL, (sums_BL * self._weight_L).sum(-1, keepdim=True)], dim=-1)

    def layers(self) -> list[ReconstructionMetrics]:
        return self._all()[:-1]

    def joint(self) -> ReconstructionMetrics:
        return self._all()[-1]

    def mean_over_layers(self) -> ReconstructionMetrics:
        """Of each number the mean of the layers' values, None if a layer has none."""
        return ReconstructionMetrics(*[mean(values) for values in zip(*self.layers(), strict=True)])

    def _all(self) -> list[ReconstructionMetrics]:
        mean_error_LD = self._error_sum_LD / max(1, self.num_positions)
        constant_C = self._columns(mean_error_LD.square().sum(-1)[None])[0] * self.num_positions
        spread_C = self._sums_TC[_Sums._fields.index("centered")]
        if self._spread_with_outliers_L is not None:
            spread_C = self._columns(self._spread_with_outliers_L[None])[0]
        outlier_error_C = self._columns(self._outlier_error_L[None])[0]
        medians = zip(self._error_median.values(), self._norm_median.values(), strict=True)
        others = zip(constant_C.tolist(), outlier_error_C.tolist(), spread_C.tolist(), strict=True)
        columns = zip(self._sums_TC.T.tolist(), others, medians, strict=True)
        return [self._metrics(_Sums(*terms), *other, *pair) for terms, other, pair in columns]

    def _metrics(
        self, sums: "_Sums", constant_error: float, outlier_error: float, spread: float, error_median: float, norm_median: float
    ) -> ReconstructionMetrics:
        unexplained = ratio(sums.error, sums.centered)
        squared_norm_ratio = ratio(sums.approximation, sums.norm)
        return ReconstructionMetrics(
            explained_variance=_one_minus(unexplained),
            explained_variance_with_outliers=_one_minus(ratio(sums.error + outlier_error, spread)),
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


def mean(values: Sequence[float | None]) -> float | None:
    """None if there is none, or one of them is None."""
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

    def add(self, log_p_NV: Tensor, targets_N: Tensor, clean_log_p_NV: Tensor) -> None:
        """Adds predictions: the log-probabilities of the changed and the clean model, and the token that came."""
        loss_N = -log_p_NV.gather(1, targets_N[:, None]).squeeze(1)
        divergence_N = (clean_log_p_NV.exp() * (clean_log_p_NV - log_p_NV)).sum(-1)
        self._sums_2 += torch.stack([loss_N.double().sum(), divergence_N.double().sum()])
        self.num_predictions += len(targets_N)

    @property
    def cross_entropy(self) -> float:
        return self._sums_2[0].item() / self.num_predictions

    @property
    def kl(self) -> float:
        return self._sums_2[1].item() / self.num_predictions


def recovered(*, ablated: float, spliced: float, clean: float) -> float | None:
    """The share of an ablation's damage to the cross-entropy that the splice does not do; None if the ablation does none."""
    return ratio(ablated - spliced, ablated - clean)
