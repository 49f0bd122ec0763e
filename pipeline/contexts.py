"""Contexts: the windows of a token set that a language model reads.

Consecutive windows of `context_tokens` ids of each shard, separators included; a shard's last window is shorter, so no
id is skipped and none read twice. With windows of 4, `5 6 7 65535 8 65535` gives [5, 6, 7, end] and [8, end].

B contexts in a batch, S positions in a context.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.config.errors import UserError
from pipeline.tokens import TokenSet


class ContextBatch(NamedTuple):
    tokens_BS: npt.NDArray[np.int64]
    """Separators and the padding on the right are the end-of-text id; a causal model sees no padding before it."""
    lengths_B: npt.NDArray[np.int64]
    """Positions that are not padding."""
    documents_BS: npt.NDArray[np.uint32]
    """Index of each position's document in the set; a separator belongs to the document that it ends, padding to the last."""


class Contexts:
    """The contexts of `tokens`, numbered through all shards in order."""

    def __init__(self, tokens: TokenSet, context_tokens: int) -> None:
        self.tokens = tokens
        self.context_tokens = context_tokens
        per_shard = [-(-len(shard.ids) // context_tokens) for shard in tokens.shards]
        self._first_of_shard = np.concatenate([[0], np.cumsum(per_shard)]).astype(np.int64)
        self.lengths: npt.NDArray[np.int64] = np.full(int(self._first_of_shard[-1]), context_tokens, np.int64)
        for shard, count, last in zip(tokens.shards, per_shard, self._first_of_shard[1:] - 1, strict=True):
            if count:
                self.lengths[last] = len(shard.ids) - (count - 1) * context_tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, indices: npt.NDArray[np.int64]) -> ContextBatch:
        """The contexts numbered `indices`, in that order, padded on the right to `context_tokens`."""
        indices_B = np.asarray(indices, np.int64)
        if len(indices_B) and not 0 <= indices_B.min() <= indices_B.max() < len(self):
            raise IndexError(f"contexts {indices_B.min()} to {indices_B.max()} of {len(self)}")
        lengths_B = self.lengths[indices_B]
        tokens_BS = np.full((len(indices_B), self.context_tokens), self.tokens.end_of_text_id, np.int64)
        first_documents_B = np.zeros(len(indices_B), np.int64)
        shards_B = np.searchsorted(self._first_of_shard, indices_B, side="right") - 1
        for row, (index, number, length) in enumerate(zip(indices_B, shards_B, lengths_B, strict=True)):
            shard = self.tokens.shards[number]
            start = int(index - self._first_of_shard[number]) * self.context_tokens
            tokens_BS[row, :length] = shard.ids[start : start + int(length)]
            first_documents_B[row] = shard.first_document + np.searchsorted(shard.ends, np.uint64(start), side="right") - 1
        batch = ContextBatch(*_replace_separators(tokens_BS, lengths_B, first_documents_B, self.tokens))
        if batch.tokens_BS.size and batch.tokens_BS.max() >= self.tokens.vocab_size:
            # A model would read beyond its embeddings: an obscure error on a CPU, the end of the process on a GPU.
            raise UserError(
                f"{self.tokens.directory} holds id {batch.tokens_BS.max():,}, its vocabulary has {self.tokens.vocab_size:,}: a file is "
                f"damaged; `crosscoder verify {self.tokens.directory}` says which"
            )
        return batch


def _replace_separators(
    tokens_BS: npt.NDArray[np.int64], lengths_B: npt.NDArray[np.int64], first_documents_B: npt.NDArray[np.int64], tokens: TokenSet
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """The tokens with end-of-text for separators, the lengths, and each position's document: the first plus the separators before it."""
    is_separator_BS = tokens_BS == tokens.separator
    documents_BS = first_documents_B[:, None] + np.cumsum(is_separator_BS, axis=1) - is_separator_BS
    last_documents_B = np.take_along_axis(documents_BS, lengths_B[:, None] - 1, axis=1)
    tokens_BS[is_separator_BS] = tokens.end_of_text_id
    return tokens_BS, lengths_B, np.minimum(documents_BS, last_documents_B).astype(np.uint32)
