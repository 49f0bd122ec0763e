"""What the features of a crosscoder do over contexts of held-out text, gathered in one pass in bounded memory; parts of it merge.

Position 0 of a context, padding and outliers count as in an evaluation: not at all. There a feature's activation is taken as 0.

Shapes: B contexts in a batch, S positions in a context, R rows (positions that follow one another in a context), L layers,
D model width, F features, N firings.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.activations.outliers import OutlierLimits
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.evaluation.driving import Driving
from pipeline.features.best_firings import BestFirings, sample_keys, strongest_keys

NUMBERS_AT_A_TIME = 1 << 26
"""At most so many numbers of features_RF exist at once, a few times over: 256 MiB each."""


class Kept(NamedTuple):
    """How much is kept of each feature."""

    top: int
    sample: int
    window_tokens: int
    window_after: int


class Firings:
    """Adds up over contexts; see `pipeline.features.store` for what each of it becomes."""

    def __init__(self, trained: TrainedCrosscoder, kept: Kept, *, context_tokens: int, seed: int) -> None:
        self._trained, self._kept, self._context_tokens, self._seed = trained, kept, context_tokens, seed
        device = trained.normalizer.mean_LD.device
        self.driving = Driving(trained, trained.normalizer.mean_LD)
        window = {"window_tokens": kept.window_tokens, "window_after": kept.window_after}
        self.top = BestFirings(trained.num_features, kept.top, **window, device=device)
        self.sample = BestFirings(trained.num_features, kept.sample, **window, device=device)
        self.num_positions, self.num_outliers = 0, 0

    def add(self, acts_BSLD: Tensor, counted_BS: Tensor, first_context: int, limits: OutlierLimits) -> None:
        """Adds a batch; `first_context` numbers its contexts among all that are read."""
        for number, (acts_SLD, counted_S) in enumerate(zip(acts_BSLD, counted_BS, strict=True), first_context):
            length = int(counted_S.nonzero().max()) + 1 if bool(counted_S.any()) else 0
            inlier_S = counted_S[:length] & ~limits.are_outliers(acts_SLD[:length])
            self.num_positions += int(inlier_S.sum())
            self.num_outliers += int(counted_S.sum()) - int(inlier_S.sum())
            for rows, with_windows in self._chunks(length):
                self._add_rows(acts_SLD, inlier_S, rows, with_windows, number)

    def _chunks(self, length: int) -> Iterator[tuple[range, range]]:
        """Rows that are added at a time, and the rows that their windows reach."""
        after = self._kept.window_after
        before = self._kept.window_tokens - 1 - after
        most = max(self._kept.window_tokens, NUMBERS_AT_A_TIME // self._trained.num_features)
        for first in range(0, length, most):
            last = min(first + most, length)
            yield range(first, last), range(max(0, first - before), min(length, last + after))

    def _add_rows(self, acts_SLD: Tensor, inlier_S: Tensor, rows: range, reached: range, context: int) -> None:
        span = slice(reached.start, reached.stop)
        acts_RLD, inlier_R = acts_SLD[span], inlier_S[span]
        features_RF = self._trained.encode(acts_RLD) * inlier_R[:, None]
        own_R = torch.arange(reached.start, reached.stop, device=inlier_R.device)
        own_R = inlier_R & (own_R >= rows.start) & (own_R < rows.stop)
        self.driving.add(acts_RLD[own_R], features_RF[own_R])
        rows_N, features_N = ((features_RF > 0) & own_R[:, None]).nonzero(as_tuple=True)
        places_N = context * self._context_tokens + reached.start + rows_N
        self.top.add(features_N, strongest_keys(features_RF[rows_N, features_N], places_N), rows_N, features_RF)
        keys_N = sample_keys(features_N, places_N, num_features=self._trained.num_features, seed=self._seed)
        self.sample.add(features_N, keys_N, rows_N, features_RF)

    def tensors(self) -> dict[str, Tensor]:
        """All that was gathered but the number of positions, on the CPU."""
        driving = self.driving
        columns = {
            "firings_F": driving.firings_F,
            "sum_activation_F": driving.sum_activation_F,
            "max_activation_F": driving.max_activation_F,
            "alone_FL": driving.alone_FL,
            "drop_FL": driving.drop_FL,
            "top_keys_FK": self.top.keys_FK,
            "top_windows_FKW": self.top.windows_FKW,
            "sample_keys_FK": self.sample.keys_FK,
            "sample_windows_FKW": self.sample.windows_FKW,
        }
        return {name: column.cpu().contiguous() for name, column in columns.items()}

    def merge(self, tensors: dict[str, Tensor], num_positions: int, num_outliers: int) -> None:
        """Adds what was gathered over other contexts."""
        found = {name: tensor.to(self.top.keys_FK.device) for name, tensor in tensors.items()}
        driving = self.driving
        driving.firings_F += found["firings_F"]
        driving.sum_activation_F += found["sum_activation_F"]
        driving.max_activation_F = torch.maximum(driving.max_activation_F, found["max_activation_F"])
        driving.alone_FL += found["alone_FL"]
        driving.drop_FL += found["drop_FL"]
        self.top.merge(found["top_keys_FK"], found["top_windows_FKW"])
        self.sample.merge(found["sample_keys_FK"], found["sample_windows_FKW"])
        self.num_positions += num_positions
        self.num_outliers += num_outliers
