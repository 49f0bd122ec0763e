"""The choice of the next token."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.config.generate_text import Sampling


class NextToken:
    """Chooses tokens one after another. Two of one seed draw the same numbers, so that texts differ by what the model gives alone."""

    def __init__(self, sampling: Sampling, seed: int | Sequence[int]) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(seed)

    def choose(self, log_p_V: Tensor) -> int:
        """The next token of these log-probabilities: the most probable one, or one drawn.

        Of several that are equally probable, the one of the smallest id. Drawn is by the inverse of the distribution function over
        the tokens in falling order of probability: a small change of the model changes few draws.
        """
        if self._sampling.temperature == 0.0:
            return int(log_p_V.argmax())
        p_V = (log_p_V.double() / self._sampling.temperature).softmax(-1)
        sorted_V, ids_V = p_V.sort(descending=True, stable=True)
        below_V = sorted_V.cumsum(0) - sorted_V
        kept_V = torch.where(below_V < self._sampling.top_p, sorted_V, 0.0)
        reached_V = kept_V.cumsum(0)
        drawn = self._random.random() * float(reached_V[-1])
        place = int((reached_V <= drawn).sum())
        return int(ids_V[min(place, int((kept_V > 0).sum()) - 1)])
