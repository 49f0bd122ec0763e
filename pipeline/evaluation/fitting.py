"""The pass over the rows that baselines are fitted on.

Shapes: N positions that count in a batch, L layers, D model width.
"""

import torch
from torch import Tensor

from pipeline.activations.outliers import OutlierLimits
from pipeline.config.errors import UserError
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.crosscoder.metrics import FiringCounts
from pipeline.evaluation.approximations import FEATURES_AT_A_TIME
from pipeline.evaluation.baselines import Fit
from pipeline.evaluation.covariances import Covariances
from pipeline.evaluation.held_out import HeldOut
from pipeline.language_models import Models
from pipeline.run import Run

SAMPLE_POSITIONS = 8192
"""So many of the rows are kept: thresholds and least-squares factors of single numbers need no more."""
SAMPLE_NUMBERS = 1 << 27
"""At most so many numbers: 512 MiB."""
FEW_POSITIONS_A_DIMENSION = 10
"""With fewer rows for each number that a map takes in, the map is weaker than it could be."""


@torch.inference_mode()
def fit(trained: TrainedCrosscoder, models: Models, fitted: HeldOut, limits: OutlierLimits, run: Run) -> Fit:
    """Covariances of all rows, outliers left out, the first of them, and the crosscoder's L0 on these."""
    covariances = Covariances(trained.normalizer.mean_LD)
    most = min(SAMPLE_POSITIONS, max(1, SAMPLE_NUMBERS // trained.normalizer.mean_LD.numel()))
    sample, done = list[Tensor](), 0
    for batch in fitted.batches():
        run.check_stop()
        acts_NLD = models.activations(batch.tokens_BS, trained.layers)[batch.replaced_BS].float()
        acts_NLD = acts_NLD[~limits.are_outliers(acts_NLD)]
        sample.append(acts_NLD[: max(0, most - covariances.num_positions)])
        covariances.add(acts_NLD)
        done += len(batch.tokens_BS)
        run.report("fit baselines", done, len(fitted.indices), unit="contexts")
    if covariances.num_positions == 0:
        raise UserError("no position is left to fit baselines on; allow more fit_tokens, or a larger outlier_norm_ratio")
    sample_NLD = torch.cat(sample)
    return Fit(covariances, sample_NLD, _l0(trained, sample_NLD))


def _l0(trained: TrainedCrosscoder, sample_NLD: Tensor) -> float:
    firing = FiringCounts(trained.num_features, sample_NLD.device)
    for part_NLD in torch.split(sample_NLD, max(1, FEATURES_AT_A_TIME // trained.num_features)):
        firing.add(trained.encode(part_NLD))
    return firing.l0 or 0.0
