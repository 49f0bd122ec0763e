"""The parts of a token set that an evaluation reads, and which of their positions and predictions count.

- A position is encoded, compared and replaced if it is not position 0 of its context, not padding and its token was not left out of
  training (`exclude_token_ids`): as in training, where
  the end-of-text id that stands for a separator is a position like any other. Outliers are taken away from these later.
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
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.activations.outliers import LEADING_TOKENS
from pipeline.config.errors import UserError
from pipeline.contexts import Contexts
from pipeline.interventions import replaceable
from pipeline.permutation import Permutation

Indices = npt.NDArray[np.int64]


class HeldOutBatch(NamedTuple):
    tokens_BS: Tensor
    replaced_BS: Tensor
    """The positions that count."""
    targets_BS: Tensor
    """The token after each position."""
    counted_BS: Tensor
    """The predictions that count."""
    indices_B: Indices
    """Numbers of the contexts in the token set, on the CPU."""
    num_excluded: int
    """Positions that don't count for their token alone."""


class HeldOut:
    """Some contexts of a token set, in the order of `indices`, whatever the batches are."""

    def __init__(
        self, contexts: Contexts, indices: Indices, *, batch_contexts: int, device: torch.device, exclude_token_ids: list[int] | None = None
    ) -> None:
        """exclude_token_ids : tokens whose positions don't count, since training left them out."""
        self._excluded = torch.tensor(exclude_token_ids or [], dtype=torch.int64)
        self._contexts = contexts
        self._batch_contexts = batch_contexts
        self._device = device
        self.indices = indices
        self.num_tokens = int(contexts.lengths[indices].sum())

    def batches(self) -> Iterator[HeldOutBatch]:
        for start in range(0, len(self.indices), self._batch_contexts):
            yield self._batch(self.indices[start : start + self._batch_contexts])

    def _batch(self, indices_B: Indices) -> HeldOutBatch:
        read = self._contexts.read(indices_B)
        longest = int(read.lengths_B.max())
        tokens_BS = torch.from_numpy(read.tokens_BS[:, :longest])
        documents_BS = torch.from_numpy(read.documents_BS[:, :longest].astype(np.int64))
        text_BS = replaceable(torch.from_numpy(read.lengths_B), longest)
        replaced_BS = text_BS & ~torch.isin(tokens_BS, self._excluded)
        num_excluded = int(text_BS.sum() - replaced_BS.sum())
        counted_BS = torch.zeros_like(replaced_BS)
        counted_BS[:, :-1] = replaced_BS[:, :-1] & text_BS[:, 1:] & (documents_BS[:, :-1] == documents_BS[:, 1:])
        tensors = (tokens_BS, replaced_BS, tokens_BS.roll(-1, dims=1), counted_BS)
        tokens_BS, replaced_BS, targets_BS, counted_BS = (tensor.to(self._device) for tensor in tensors)
        return HeldOutBatch(tokens_BS, replaced_BS, targets_BS, counted_BS, indices_B, num_excluded)


class Parts(NamedTuple):
    """What is read of a held-out set, in whole contexts."""

    measured: HeldOut
    leading: HeldOut
    """Some of the measured ones, for medians."""
    fitted: HeldOut
    """What baselines are fitted on."""
    num_there: int
    """Tokens of the held-out set that could have been measured, separators and beginnings of text counted."""


def divide(
    contexts: Contexts,
    training: Contexts | None,
    *,
    max_tokens: int | None,
    fit_tokens: int,
    seed: int,
    batch_contexts: int,
    device: torch.device,
    exclude_token_ids: list[int] | None = None,
) -> Parts:
    """Draws the contexts that are measured, and those that baselines are fitted on: of the training text, else of the same set.

    In the second case they are taken away from the measured ones, where the set doesn't hold enough for both; a quarter at most.
    Raises `UserError` where too little is left to measure.
    """
    total = int(contexts.lengths.sum())
    kept_back = min(fit_tokens, max(total // 4, int(contexts.lengths.max(initial=0)))) if training is None else 0
    limit = total - kept_back if max_tokens is None else min(max_tokens, total - kept_back)
    measured, following = draw(contexts.lengths, [limit, kept_back], seed)
    fitted = following if training is None else draw(training.lengths, [fit_tokens], seed)[0]
    beside = f" and {len(following):,} to fit baselines on" if training is None else ""
    check_measurable(contexts, measured, max_tokens, beside)
    if not len(fitted):
        raise UserError(
            f"{(training or contexts).tokens.directory} gives no context of at most {contexts.context_tokens:,} tokens for "
            f"fit_tokens {fit_tokens:,}: baselines could not be fitted; allow more tokens, or name training_tokens"
        )
    settings = {"batch_contexts": batch_contexts, "device": device, "exclude_token_ids": exclude_token_ids}
    return Parts(
        HeldOut(contexts, np.sort(measured), **settings),  # type: ignore[arg-type]
        HeldOut(contexts, leading(contexts, measured), **settings),  # type: ignore[arg-type]
        HeldOut(training or contexts, fitted, **settings),  # type: ignore[arg-type]
        total - kept_back,
    )


def check_measurable(contexts: Contexts, measured: Indices, max_tokens: int | None, beside: str = "") -> None:
    """Raises `UserError` where no context of those drawn has a position that counts and a token after it."""
    if not len(measured) or int(contexts.lengths[measured].max()) < 3:
        raise UserError(
            f"{contexts.tokens.directory} gives {len(measured):,} contexts of at most {contexts.context_tokens:,} tokens to "
            f"measure{beside} for max_tokens {max_tokens}, none of 3 tokens or more: nothing could be measured; allow more tokens or take "
            "another set"
        )


def leading(contexts: Contexts, measured: Indices) -> Indices:
    """The first of the contexts drawn: about `LEADING_TOKENS`, one at least."""
    return measured[: max(1, int(np.searchsorted(np.cumsum(contexts.lengths[measured]), LEADING_TOKENS, side="right")))]


def draw(lengths: Indices, budgets: list[int], seed: int) -> list[Indices]:
    """Contexts in an order drawn by `seed`: as many as the first budget of tokens lets through, of the following the second, and so on.

    Only as much of the order is computed as is needed: a training set can have 300 million contexts.
    """
    permutation = Permutation(len(lengths), seed=seed)
    count = min(len(lengths), 2 * sum(budgets) // int(lengths.max(initial=1)) + len(budgets) + 1)
    while True:
        order = permutation(torch.arange(count)).numpy()
        ends = np.cumsum(lengths[order])
        if count == len(lengths) or ends[-1] > sum(budgets):
            break
        count = min(len(lengths), 2 * count)
    chosen, first, used = list[Indices](), 0, 0
    for budget in budgets:
        last = int(np.searchsorted(ends, used + budget, side="right"))
        chosen.append(order[first:last])
        first, used = last, int(ends[last - 1]) if last else 0
    return chosen
