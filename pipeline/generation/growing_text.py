"""Forward passes over a text that grows by a token at a time: only what is new is read, where the model has a key-value cache.

Shapes: S positions of the text, N of them that a pass reads, L layers, D model width.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline import model_trial
from pipeline.interventions import CleanRun, clean_run
from pipeline.language_model import LanguageModel, Replacements
from pipeline.language_models import in_its_model, sites_of


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


class CleanRead(NamedTuple):
    """What one step read of a text in which nothing is changed."""

    hidden_1ND: Tensor
    """What the head of the model that writes is given."""
    acts_NLD: Tensor
    """Of all of the crosscoder's sites, in their order."""
    first: int
    """The position of the first of them."""


class CleanText:
    """One text, read by every model that the crosscoder has sites in."""

    def __init__(self, models: Mapping[str, LanguageModel], sites: Sequence[str], *, written_by: str, is_cached: bool) -> None:
        self._sites, self._written_by = list(sites), written_by
        self._own = {name: sites_of(name, self._sites) for name in models}
        self._texts = {name: GrowingText(model, is_cached=is_cached) for name, model in models.items() if self._own[name]}

    def read(self, tokens_1S: Tensor) -> CleanRead:
        """The positions that are new, or all of them without a cache."""
        first = self._texts[self._written_by].first
        found = {name: text.read_clean(tokens_1S, list(map(in_its_model, self._own[name]))) for name, text in self._texts.items()}
        by_site = {site: found[name].acts_BSLD[0, :, at] for name in found for at, site in enumerate(self._own[name])}
        return CleanRead(found[self._written_by].hidden_BSD, torch.stack([by_site[site] for site in self._sites], dim=1), first)


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
