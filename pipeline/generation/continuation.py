"""The continuation of a text by a language model, changed or not, and what the clean model says of it.

At every step two passes read the same text, each with its own key-value cache: one in which nothing is changed, and the changed one,
whose prediction the next token is chosen from. So of each token it is known what the clean model would have predicted in its place.

Shapes: S positions of the text, N of them that a pass reads, L layers, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.errors import UserError
from pipeline.config.generate_text import Sampling
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.generation.growing_text import CleanText, GrowingText, can_be_cached
from pipeline.generation.sampling import NextToken
from pipeline.generation.splicing import Intervention, Splicer
from pipeline.language_models import Models, each


@dataclass(frozen=True)
class Continuation:
    """The tokens behind a prompt, one entry each in all lists."""

    token_ids: list[int]
    kl: list[float]
    """KL divergence of the changed model's prediction from the clean model's of the same text, KL(clean || changed), in nats; 0 of the
    model's own continuation. At temperature 1, whatever tokens were drawn at."""
    cross_entropies: list[float]
    """-log of the clean model's probability of the token, in nats."""
    has_ended: bool
    """Whether the last token is the model's end of text."""

    @property
    def kl_per_token(self) -> float:
        return sum(self.kl) / len(self.kl)

    @property
    def cross_entropy(self) -> float:
        """Mean over tokens, in nats."""
        return sum(self.cross_entropies) / len(self.cross_entropies)

    def repeated_share(self, ngram: int) -> float:
        """Share of its n-grams of tokens that stood in it before; 0 where it is too short for two."""
        grams = [tuple(self.token_ids[start : start + ngram]) for start in range(len(self.token_ids) - ngram + 1)]
        return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


class Writer:
    """A language model that writes, and a trained crosscoder that its passes can be changed by."""

    def __init__(self, models: Models, trained: TrainedCrosscoder, *, written_by: str = "") -> None:
        """written_by : of several models, the name of the one that writes. The others read what it writes, for the crosscoder.

        Raises `UserError` for a model that there is none of, or of which the crosscoder writes no layer.
        """
        self._models = each(models)
        if written_by not in self._models:
            raise UserError(f"written_by is {written_by!r}, but the models are {', '.join(self._models)}; name the one that writes")
        self._written_by, self._language_model = written_by, self._models[written_by]
        self.splicer = Splicer(trained, written_by)
        if not self.splicer.written:
            raise UserError(f"the crosscoder writes no layer of {self._language_model.name}; choose another model in written_by")
        self.is_cached = all(can_be_cached(model) for model in self._models.values())
        """Whether a pass reads new tokens alone; else every pass reads the whole text again."""

    @torch.inference_mode()
    def continue_text(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        intervention: Intervention | None = None,
        *,
        seed: int | Sequence[int] = 0,
        on_token: Callable[[], None] = lambda: None,
    ) -> Continuation:
        """The continuation of the token ids `prompt`; without an intervention the model's own. `on_token` is called after each token.

        Raises `UserError` for an intervention at a layer that the crosscoder doesn't write, or by a feature that it doesn't have.
        """
        if intervention is not None:
            self.splicer.check(intervention.layers, () if intervention.edit is None else intervention.edit.features)
        clean = CleanText(self._models, self.splicer.layers, written_by=self._written_by, is_cached=self.is_cached)
        changed = GrowingText(self._language_model, is_cached=self.is_cached)
        next_token = NextToken(sampling, seed)
        token_ids, kl, cross_entropies = list(prompt), list[float](), list[float]()
        ends = set(self._language_model.end_of_text_ids)
        while len(kl) < sampling.max_new_tokens and not (kl and token_ids[-1] in ends):
            tokens_1S = torch.tensor([token_ids], device=self._language_model.device)
            read = clean.read(tokens_1S)
            clean_log_p_V = log_p_V = self._log_p(read.hidden_1ND)
            if intervention is not None:
                replace = self.splicer.replacements(intervention, read.acts_NLD, read.first)
                log_p_V = self._log_p(changed.read_changed(tokens_1S, replace))
            if bool(log_p_V.isnan().any()):
                what = "the language model's predictions" if intervention is None else "predictions of the changed model"
                raise UserError(f"{what} are not numbers (NaN) behind {len(token_ids):,} tokens; use a smaller strength, or float32")
            token_ids.append(next_token.choose(log_p_V))
            # A token that the model rules out (-inf, by both) adds nothing.
            p_V = clean_log_p_V.exp()
            kl.append(float(torch.where(p_V > 0, p_V * (clean_log_p_V - log_p_V), 0.0).sum()))
            cross_entropies.append(-float(clean_log_p_V[token_ids[-1]]))
            on_token()
        return Continuation(token_ids[len(prompt) :], kl, cross_entropies, token_ids[-1] in ends)

    def _log_p(self, hidden_1ND: Tensor) -> Tensor:
        """log_p_V of the token behind the last position, float32."""
        return self._language_model.head.logits(hidden_1ND[0, -1:])[0].log_softmax(-1)
