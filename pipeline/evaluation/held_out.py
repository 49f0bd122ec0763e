"""The part of a held-out token set that is measured, and which of its positions and predictions count.

- A position is encoded, compared and replaced if it is not position 0 of its context and not padding: as in training, where
  the end-of-text id that stands for a separator is a position like any other.
- A prediction counts if it is made at such a position and the token that follows is of the same document. So the end of a
  document is to be predicted from its last token, and the first token of the next document is not: nothing before it tells.

Contexts that begin with beginning-of-text have it at position 0: it is left as it is, and what is predicted at it does not count, since
no replacement changes that. So every id of the text is a position, and every prediction is one of a token of the text.

For one context of 8 that holds the documents [5, 6] and [7, 8, 9], `e` being end-of-text and `.` padding:

    tokens      5 6 e 7 8 9 e .
    replaced    - x x x x x x -
    counted     - x - x x x - -       made at 6 (e follows), 7, 8 and 9; not at 5, which stays, nor at the first e (7 follows)

B contexts in a batch, S positions in a context.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config.errors import UserError
from pipeline.contexts import Contexts
from pipeline.interventions import replaceable
from pipeline.permutation import Permutation


class HeldOutBatch(NamedTuple):
    tokens_BS: Tensor
    replaced_BS: Tensor
    """The positions that count."""
    targets_BS: Tensor
    """The token after each position."""
    counted_BS: Tensor
    """The predictions that count."""


class HeldOut:
    """The contexts that are measured: all of a token set, or whole contexts drawn by a seed up to `max_tokens`."""

    def __init__(self, contexts: Contexts, *, max_tokens: int | None, seed: int, batch_contexts: int, device: torch.device) -> None:
        self._contexts = contexts
        self._batch_contexts = batch_contexts
        self._device = device
        self.indices = np.arange(len(contexts))
        self.num_there = int(contexts.lengths.sum())
        """Tokens of the whole set, separators and beginnings of text counted."""
        if max_tokens is not None and self.num_there > max_tokens:
            drawn = Permutation(len(contexts), seed=seed).all().numpy()
            num_fitting = int(np.searchsorted(np.cumsum(contexts.lengths[drawn]), max_tokens, side="right"))
            self.indices = np.sort(drawn[:num_fitting])
        self.num_tokens = int(contexts.lengths[self.indices].sum())
        if not len(self.indices) or int(contexts.lengths[self.indices].max()) < 3:
            raise UserError(
                f"{contexts.tokens.directory} gives {len(self.indices):,} contexts of at most {contexts.context_tokens:,} tokens for "
                f"max_tokens {max_tokens}, none of 3 tokens or more: nothing could be measured; allow more tokens or take another set"
            )

    def batches(self) -> Iterator[HeldOutBatch]:
        for start in range(0, len(self.indices), self._batch_contexts):
            yield self._batch(self.indices[start : start + self._batch_contexts])

    def _batch(self, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> HeldOutBatch:
        read = self._contexts.read(indices)
        longest = int(read.lengths_B.max())
        tokens_BS = torch.from_numpy(read.tokens_BS[:, :longest])
        documents_BS = torch.from_numpy(read.documents_BS[:, :longest].astype(np.int64))
        replaced_BS = replaceable(torch.from_numpy(read.lengths_B), longest)
        counted_BS = torch.zeros_like(replaced_BS)
        counted_BS[:, :-1] = replaced_BS[:, :-1] & replaced_BS[:, 1:] & (documents_BS[:, :-1] == documents_BS[:, 1:])
        batch = HeldOutBatch(tokens_BS, replaced_BS, tokens_BS.roll(-1, dims=1), counted_BS)
        return HeldOutBatch(*[tensor.to(self._device) for tensor in batch])
