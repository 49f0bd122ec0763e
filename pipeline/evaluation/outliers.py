"""What outliers hold of a held-out set, and above which norm a position is one there (see `pipeline.activations.outliers`).

Shapes: N positions, L layers, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.activations.outliers import OutlierLimits, limits_from, norms
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.crosscoder.metrics import LayerMoments
from pipeline.evaluation.held_out import HeldOut
from pipeline.language_models import Models
from pipeline.run import Run

FEW = 0.001
"""So small a share of the positions is called few."""
MUCH = 0.2
"""So large a share of the variance is called much. Of Gaussian activations 0.1 % of the positions hold little more than 0.1 %."""


class LayerOutliers(NamedTuple):
    """The outliers at one layer; see `pipeline.evaluation.definitions`."""

    layer: str
    norm_limit: float | None
    share_of_squared_norm: float
    share_of_variance: float
    share_of_few: float
    """Of the variance without outliers, what the `FEW` positions farthest from the mean hold."""


@torch.inference_mode()
def outlier_limits(trained: TrainedCrosscoder, models: Models, leading: HeldOut, ratio: float | None, run: Run) -> OutlierLimits:
    """Those of the training, else `ratio` times each layer's median norm over the leading held-out contexts."""
    if ratio is None:
        return OutlierLimits(None, "off")
    known = trained.provenance.outlier_norms
    if known is not None:
        return OutlierLimits(torch.tensor(known, dtype=torch.float64, device=models.device), "training")
    found, done = list[Tensor](), 0
    for batch in leading.batches():
        run.check_stop()
        acts_NLD = models.activations(batch.tokens_BS, trained.layers)[batch.replaced_BS]
        found.append(norms(acts_NLD))
        done += len(batch.tokens_BS)
        run.report("norms", done, len(leading.indices), unit="contexts")
    return OutlierLimits(limits_from(torch.cat(found), ratio), "held_out")


class HeldOutMoments(NamedTuple):
    """Of the measured positions, with and without outliers."""

    inliers: LayerMoments
    everything: LayerMoments
    outliers: LayerMoments

    def by_layer(self, layers: list[str], limits: OutlierLimits, share_of_few_L: list[float]) -> list[LayerOutliers]:
        """What the outliers hold at each layer."""
        everything = self.everything
        norms_L = [None] * len(layers) if limits.norms_L is None else limits.norms_L.tolist()
        squares_L = self.outliers.squares_L / everything.squares_L.clamp(min=torch.finfo(torch.float64).tiny)
        distances_L = self.outliers.squared_distance_to(everything.mean_LD)
        variance_L = distances_L / everything.spread_L.clamp(min=torch.finfo(torch.float64).tiny)
        columns = (layers, norms_L, squares_L.tolist(), variance_L.tolist(), share_of_few_L)
        return [LayerOutliers(*row) for row in zip(*columns, strict=True)]


@torch.inference_mode()
def held_out_moments(models: Models, layers: list[str], measured: HeldOut, limits: OutlierLimits, run: Run) -> HeldOutMoments:
    """Mean and spread of each layer's activations over the positions that count, the outliers' apart."""
    moments = [LayerMoments(len(layers), models.d_model, models.device) for _ in range(2)]
    done = 0
    for batch in measured.batches():
        run.check_stop()
        acts_NLD = models.activations(batch.tokens_BS, layers)[batch.replaced_BS]
        outlier_N = limits.are_outliers(acts_NLD)
        moments[0].add(acts_NLD[~outlier_N])
        moments[1].add(acts_NLD[outlier_N])
        done += len(batch.tokens_BS)
        run.report("means", done, len(measured.indices), unit="contexts")
    inliers, outliers = moments
    return HeldOutMoments(inliers, inliers.with_those_of(outliers), outliers)
