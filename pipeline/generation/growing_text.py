"""Forward passes over a text that grows by a token at a time: only what is new is read, where the model has a key-value cache.

Shapes: S positions of the text, N of them that a pass reads, L layers, D model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline import model_trial
from pipeline.interventions import CleanRun, clean_run
from pipeline.language_model import LanguageModel, Replacements


class GrowingText:
    """One text, and what the passes over it remember. Every pass is given the whole text so far."""

    def __init__(self, language_model: LanguageModel, *, is_cached: bool) -> None:
        """is_cached : what `can_be_cached` says of the model; without, every pass reads the text from its beginning."""
        self._language_model = language_model
        self._cache = DynamicCache(config=language_model.model.config) if is_cached else None
        self._num_read = 0

    @property
    def first(self) -> int:
        """The position of the first token that the next pass reads."""
        return 0 if self._cache is None else self._num_read

    def read_clean(self, tokens_1S: Tensor, layers: Sequence[str]) -> CleanRun:
        """hidden_1ND and acts_1NLD of the positions from `first` on, nothing changed."""
        read = clean_run(self._language_model, self._new(tokens_1S), layers, cache=self._cache)
        self._num_read = tokens_1S.shape[1]
        return read

    def read_changed(self, tokens_1S: Tensor, replace: Replacements) -> Tensor:
        """hidden_1ND of the positions from `first` on; `replace` sees those alone."""
        hidden_1ND = self._language_model.before_head(self._new(tokens_1S), replace, cache=self._cache)
        self._num_read = tokens_1S.shape[1]
        return hidden_1ND

    def _new(self, tokens_1S: Tensor) -> Tensor:
        return tokens_1S[:, self.first :]


@torch.inference_mode()
def can_be_cached(language_model: LanguageModel) -> bool:
    """Whether a text read in pieces, with the key-value cache, gives the predictions of the text read at once; tried on 8 tokens.

    Models whose memory is another one (Mamba, RWKV, RecurrentGemma) or that ignore the cache show it here.
    """
    tokens_1S = model_trial.trial_tokens(language_model.model)[0][None]
    num_tokens = tokens_1S.shape[1]
    whole_1SV = language_model.logits(tokens_1S).float()
    try:
        cache = DynamicCache(config=language_model.model.config)
        ends = [num_tokens - num_tokens // 2, num_tokens - 1, num_tokens]
        starts = [0, *ends[:-1]]
        pieces = [language_model.logits(tokens_1S[:, a:b], cache=cache) for a, b in zip(starts, ends, strict=True) if b > a]
        num_cached = cache.get_seq_length()
    except Exception:  # what a model raises that can't is its own affair
        return False
    if num_cached != num_tokens:
        return False
    difference = (torch.cat(pieces, 1).float() - whole_1SV).abs().max() / whole_1SV.abs().max().clamp(min=1e-30)
    # Kernels round differently for other shapes: a few roundings of the dtype. A state that is lost gives 0.02 (Jamba) and more.
    return float(difference) <= max(1e-3, 16 * torch.finfo(language_model.dtype).eps)
