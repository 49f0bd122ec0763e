"""The ids of a fast encoder held to the reference's all through a run, for a small share of the time.

In every batch a place is drawn, each character as likely as any other, and both encoders get a slice around it, as a text of its
own. What slices leave over is saved until it covers the longest document met, and then one is checked whole, by the ids that it was
really given. The first texts are all checked.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.config.errors import UserError

# 2.8 to 3.5 % of the processor time of a whole tokenization of 302 MB with GPT-2's tokenizer (bench/running_check.py, 2026-11): beside
# gigatoken, which fills the processor's caches, the reference takes up to 0.9 us a character, and all else together takes 15 ns.
CHECKED_SHARE = 1 / 2048
FIRST_CHARACTERS = 20_000
SLICE_CHARACTERS = 256
MAX_GOAL_CHARACTERS = 100_000
"""So much is saved at most before a document is checked whole."""

Ids = npt.NDArray[np.uint32]


class EncoderDiffers(UserError):
    """A fast encoder gave other ids than the tokenizer itself."""


class Drawn(NamedTuple):
    """What of a batch is checked."""

    whole: list[int]
    """Numbers of documents."""
    slices: list[str]


class RunningCheck:
    """Draws what of each batch is checked, and compares it.

    Parameters
    ----------
    reference : gives the ids of one text.
    tokenizer : its name in messages.
    """

    def __init__(self, reference: Callable[[str], Ids], tokenizer: str) -> None:
        self._reference, self._tokenizer = reference, tokenizer
        self._first = FIRST_CHARACTERS
        self._saved, self._goal = 0.0, 0
        self._random = random.Random(0)

    def draw(self, texts: list[str]) -> Drawn:
        """What to check of a batch that holds at least one text."""
        drawn = Drawn(self._first_ones(texts), [])
        ends = np.cumsum([len(text) for text in texts])
        total = int(ends[-1])
        self._saved += total * CHECKED_SHARE
        if total:
            place = self._random.randrange(total)
            number = int(np.searchsorted(ends, place, side="right"))
            text = texts[number]
            if self._saved >= max(len(text), self._goal):
                self._saved -= len(text)
                self._goal = 0
                drawn.whole.append(number)
            elif self._saved >= SLICE_CHARACTERS:
                # Else short documents would use up all that is saved, and no long one would ever be checked whole.
                self._goal = min(max(self._goal, len(text)), MAX_GOAL_CHARACTERS)
                self._saved -= SLICE_CHARACTERS
                start = max(place - int(ends[number]) + len(text) - SLICE_CHARACTERS // 2, 0)
                drawn.slices.append(text[start : start + SLICE_CHARACTERS])
        return drawn

    def _first_ones(self, texts: list[str]) -> list[int]:
        chosen = []
        for number, text in enumerate(texts):
            if self._first <= 0:
                break
            if len(text) <= self._first:
                chosen.append(number)
            self._first -= max(len(text), 1)
        return chosen

    def compare(self, text: str, found: Ids) -> None:
        """Raises `EncoderDiffers` if the reference gives other ids."""
        if not np.array_equal(found, self._reference(text)):
            raise EncoderDiffers(f"gigatoken gives other ids than {self._tokenizer} itself for the text that begins {text[:60]!r}")
