"""Which rows a generation has, and where in it each lies, on disk and streamed: from a few numbers and without storing it.

All contexts of a token set stand in one computed permutation. `contexts_per_generation` of them in a row form a generation;
its kept positions, context by context, are its rows as harvested, and a permutation of its own gives each its place in the
generation; `epoch_order` says when an epoch takes which of them. For example, contexts 2 0 3 1 in generations of two, three
kept positions each: generation 0 is the six positions of contexts 2 and 0, shuffled.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config.activation_source import Harvest
from pipeline.config.errors import UserError
from pipeline.permutation import Permutation

_CONTEXTS_AT_A_TIME = 1 << 20

Numbers = npt.NDArray[np.int64]


class ModelBatch(NamedTuple):
    """Contexts that go through the language model together; everything of them that is kept."""

    contexts_B: Numbers
    kept_B: Numbers
    """Positions kept of each context: its first so many that are not dropped."""

    @property
    def num_rows(self) -> int:
        return int(self.kept_B.sum())


class Order:
    """The order in which `settings` take positions out of contexts of the given lengths."""

    def __init__(self, lengths: Numbers, settings: Harvest, *, drop_positions: list[int] | None = None) -> None:
        """`drop_positions` takes the place of the setting where more is left out than it says."""
        self.settings = settings
        dropped = np.array(sorted(settings.drop_positions if drop_positions is None else drop_positions), np.int64)
        self.kept_positions = np.setdiff1d(np.arange(settings.context_tokens), dropped)
        """Positions that a full context keeps."""
        self._contexts, self._kept = _take(lengths, dropped, settings)
        first_of_generation = np.arange(0, len(self._contexts), settings.contexts_per_generation)
        self.rows: Numbers = np.add.reduceat(self._kept, first_of_generation) if len(self._kept) else np.empty(0, np.int64)
        """Positions of each generation: its rows, and those left out for what stands there (see `left_out`)."""
        self.num_positions = int(self.rows.sum())
        if self.num_positions == 0:
            raise UserError(f"{settings.tokens} has no position left when {dropped.tolist()} of each context are dropped")

    @property
    def num_generations(self) -> int:
        return len(self.rows)

    @property
    def num_contexts(self) -> int:
        return len(self._contexts)

    def context_range(self, generation: int) -> tuple[int, int]:
        """First and one past the last place in the order of contexts that the generation covers."""
        first = generation * self.settings.contexts_per_generation
        return first, min(first + self.settings.contexts_per_generation, self.num_contexts)

    def model_batches(self, generation: int) -> list[ModelBatch]:
        """The generation's contexts as they go through the model."""
        first, last = self.context_range(generation)
        size = self.settings.model_batch_contexts
        starts = range(first, last, size)
        return [
            ModelBatch(self._contexts[start : min(start + size, last)], self._kept[start : min(start + size, last)]) for start in starts
        ]

    def places(self, generation: int, device: torch.device) -> Tensor:
        """Where in the generation each of its rows goes, in the order of harvesting."""
        return Permutation(int(self.rows[generation]), seed=self.settings.seed, stream=2 * generation + 1).all(device)


def _take(lengths: Numbers, dropped: Numbers, settings: Harvest) -> tuple[Numbers, Numbers]:
    """The contexts in their order, as far as `max_tokens` reaches, and the number of positions kept of each."""
    permutation = Permutation(len(lengths), seed=settings.seed, stream=0)
    left = settings.max_tokens if settings.max_tokens is not None else int(lengths.sum())
    contexts, kept = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, len(lengths), _CONTEXTS_AT_A_TIME):
        if left == 0:
            break
        chunk = permutation(torch.arange(start, min(start + _CONTEXTS_AT_A_TIME, len(lengths)))).numpy()
        counts = lengths[chunk] - np.searchsorted(dropped, lengths[chunk], side="left")
        counts = np.minimum(counts, np.maximum(left - (np.cumsum(counts) - counts), 0))
        needed = min(int(np.searchsorted(np.cumsum(counts), left, side="left")) + 1, len(chunk))
        contexts.append(chunk[:needed])
        kept.append(counts[:needed])
        left -= int(counts.sum())
    return np.concatenate(contexts), np.concatenate(kept)
