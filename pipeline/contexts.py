"""Contexts: the windows of a token set that a language model reads.

Consecutive windows of ids of each shard, separators included; a shard's last window is shorter, so no id is skipped and none read
twice. With contexts of 4, `5 6 7 65535 8 65535` gives [5, 6, 7, end] and [8, end]; with beginning-of-text in front, which is one of
the 4, [bos, 5, 6, 7], [bos, end, 8, end].

B contexts in a batch, S positions in a context.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.config.beginning_of_text import is_wanted
from pipeline.config.errors import UserError
from pipeline.tokens import TokenSet


class ContextBatch(NamedTuple):
    tokens_BS: npt.NDArray[np.int64]
    """Separators and the padding on the right are the end-of-text id; a causal model sees no padding before it."""
    lengths_B: npt.NDArray[np.int64]
    """Positions that are not padding."""
    documents_BS: npt.NDArray[np.uint32]
    """Index of each position's document in the set; a separator belongs to the document that it ends, padding to the last, and
    beginning-of-text to that of the context's first id."""


class Contexts:
    """The contexts of `tokens`, numbered through all shards in order.

    Parameters
    ----------
    context_tokens : the longest context, beginning-of-text included.
    beginning_of_text_id : what every context begins with, at position 0; None: with the text.
    """

    def __init__(self, tokens: TokenSet, context_tokens: int, *, beginning_of_text_id: int | None = None) -> None:
        if beginning_of_text_id is not None and context_tokens < 2:
            raise UserError(f"context_tokens is {context_tokens}: a context that begins with beginning-of-text needs 2 or more")
        self.tokens = tokens
        self.context_tokens = context_tokens
        self.beginning_of_text_id = beginning_of_text_id
        self._num_leading = 0 if beginning_of_text_id is None else 1
        self._ids_each = context_tokens - self._num_leading
        per_shard = [-(-len(shard.ids) // self._ids_each) for shard in tokens.shards]
        self._first_of_shard = np.concatenate([[0], np.cumsum(per_shard)]).astype(np.int64)
        self.lengths: npt.NDArray[np.int64] = np.full(int(self._first_of_shard[-1]), context_tokens, np.int64)
        for shard, count, last in zip(tokens.shards, per_shard, self._first_of_shard[1:] - 1, strict=True):
            if count:
                self.lengths[last] = len(shard.ids) - (count - 1) * self._ids_each + self._num_leading

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
        leading = self._num_leading
        for row, (index, number, length) in enumerate(zip(indices_B, shards_B, lengths_B, strict=True)):
            shard = self.tokens.shards[number]
            start = int(index - self._first_of_shard[number]) * self._ids_each
            tokens_BS[row, leading:length] = shard.ids[start : start + int(length) - leading]
            first_documents_B[row] = shard.first_document + np.searchsorted(shard.ends, np.uint64(start), side="right") - 1
        if self.beginning_of_text_id is not None:
            tokens_BS[:, 0] = self.beginning_of_text_id
        batch = ContextBatch(*_replace_separators(tokens_BS, lengths_B, first_documents_B, self.tokens))
        self._check_ids(batch.tokens_BS)
        return batch

    def _check_ids(self, tokens_BS: npt.NDArray[np.int64]) -> None:
        """A model would read a greater id than the records name, which it was checked for, from beyond its embeddings.

        That is an obscure error on a CPU and the end of the process on a GPU.
        """
        known = max(self.tokens.max_id, self.tokens.end_of_text_id, self.beginning_of_text_id or 0)
        if tokens_BS.size and tokens_BS.max() > known:
            raise UserError(
                f"{self.tokens.directory} holds id {tokens_BS.max():,}, but its records name {self.tokens.max_id:,} as the greatest: a "
                f"file is damaged; `crosscoder verify {self.tokens.directory}` says which"
            )


class Beginning(NamedTuple):
    """What contexts begin with."""

    token_id: int | None
    """None: with the text itself."""
    remark: str
    """A sentence for the log."""


def beginning_of_text(setting: Literal["auto", True, False], tokens: TokenSet) -> Beginning:
    """What contexts of `tokens` begin with under this setting. Raises `UserError` if it asks for a token that the set does not name."""
    known = tokens.beginning_of_text
    again = "to have it recorded, run tokenize again: with nothing left to tokenize it writes the manifest alone"
    if is_wanted(setting, is_added=known.is_added):
        if known.id is None:
            why = f"{tokens.directory} was made before it was recorded; {again}" if known.is_added is None else "the tokenizer has none"
            raise UserError(f"beginning_of_text is true, but no such token is known: {why}")
        return Beginning(known.id, f"every context begins with beginning-of-text, id {known.id:,}{_as_its_call(setting, known.is_added)}")
    if known.is_added is None and setting == "auto":
        return Beginning(None, f"contexts begin without beginning-of-text: whether the tokenizer's call adds one was not recorded; {again}")
    return Beginning(None, f"contexts begin without beginning-of-text{_as_its_call(setting, known.is_added)}")


def _as_its_call(setting: Literal["auto", True, False], is_added: bool | None) -> str:
    if is_added is None:
        return ""
    does = "adds it" if is_added else "adds none"
    return f", as the tokenizer's own call {does}" if setting in ("auto", is_added) else f"; the tokenizer's own call {does}"


def _replace_separators(
    tokens_BS: npt.NDArray[np.int64], lengths_B: npt.NDArray[np.int64], first_documents_B: npt.NDArray[np.int64], tokens: TokenSet
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """The tokens with end-of-text for separators, the lengths, and each position's document: the first plus the separators before it."""
    is_separator_BS = tokens_BS == tokens.separator
    documents_BS = first_documents_B[:, None] + np.cumsum(is_separator_BS, axis=1) - is_separator_BS
    last_documents_B = np.take_along_axis(documents_BS, lengths_B[:, None] - 1, axis=1)
    tokens_BS[is_separator_BS] = tokens.end_of_text_id
    return tokens_BS, lengths_B, np.minimum(documents_BS, last_documents_B).astype(np.uint32)
