"""What a language model predicts with activations replaced, beside what it predicts by itself.

The hidden states before the model's head are collected for every changed run of a batch; then the head makes logits of a few
thousand positions at a time, for the clean run and all changed ones. So the clean logits are computed once, and never do the
logits of a whole batch exist.

Shapes: N counted predictions of a batch, D model width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.crosscoder.metrics import Predictions, chunks
from pipeline.language_model import LanguageModel

HIDDEN_NUMBERS = 1 << 29
"""At most so many numbers of hidden states are kept at once: 1 GiB in bfloat16."""


class Stand(NamedTuple):
    """What stands in for the activations of a layer; the rows of every table are named by it."""

    layer: str
    """A layer, or `mean_over_layers`; in reconstruction also `joint`, in cross-entropy also `split`."""
    by: str
    """A name that `pipeline.evaluation.definitions` explains: crosscoder, mean, affine ..."""
    source: str | None = None
    """The other layer or the other run, where one is taken."""


class ReplacedPredictions:
    """Adds up the losses of the clean run and of the changed ones."""

    def __init__(self, language_model: LanguageModel) -> None:
        self._head = language_model.head
        self._device = language_model.device
        self.clean = Predictions(self._device)
        self.changed: dict[Stand, Predictions] = {}
        self._waiting: dict[Stand, Tensor] = {}
        self._clean_ND = self._targets_N = torch.empty(0)
        self._clean_is_added = True

    def begin(self, clean_ND: Tensor, targets_N: Tensor) -> None:
        """A new batch: its clean hidden states at the counted predictions, and the tokens that came."""
        self._clean_ND, self._targets_N, self._clean_is_added = clean_ND, targets_N, False

    def add(self, stand: Stand, hidden_ND: Tensor) -> None:
        """The same predictions of a changed run."""
        self._waiting[stand] = hidden_ND
        if sum(waiting.numel() for waiting in self._waiting.values()) > HIDDEN_NUMBERS:
            self.end()

    def end(self) -> None:
        """Takes in what waits; at the latest at the end of the batch."""
        for part in chunks(len(self._targets_N), self._vocabulary_size(self._clean_ND), self._device):
            clean_log_p_NV = self._head.logits(self._clean_ND[part]).log_softmax(-1)
            if not self._clean_is_added:
                self.clean.add(clean_log_p_NV, self._targets_N[part], clean_log_p_NV)
            for stand, hidden_ND in self._waiting.items():
                log_p_NV = self._head.logits(hidden_ND[part]).log_softmax(-1)
                self.changed.setdefault(stand, Predictions(self._device)).add(log_p_NV, self._targets_N[part], clean_log_p_NV)
        self._waiting, self._clean_is_added = {}, True

    def _vocabulary_size(self, hidden_ND: Tensor) -> int:
        return hidden_ND.shape[1] if self._head.linear is None else self._head.linear.out_features
