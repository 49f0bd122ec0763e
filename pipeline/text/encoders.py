"""Texts to ids: the tokenizer's own library as the reference, and a faster one that has to agree with it.

`tokenizers` is Hugging Face's library, and `transformers` stands in for tokenizers that exist in Python only. `gigatoken`
gives the same ids 17 to 48 times as fast for the tokenizers it knows; it is used only for those that it shares by their definition,
after it agreed with the reference on the probes and on the beginning of the text, and keeps being checked as it works.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.config.errors import UserError
from pipeline.model_files import tokenizer_files
from pipeline.text.gigatoken_limits import unshared
from pipeline.text.probes import PROBES, added_token_probes
from pipeline.text.running_check import RunningCheck
from pipeline.text.tokenizer import TokenizerDefinition, backend_tokenizer, load_transformers_tokenizer, transformers_ids

EncoderName = Literal["gigatoken", "tokenizers", "transformers"]

# The library's own results take some 450 bytes a token until they are dropped (1.9 GB for one text of 14 MB), so it gets a
# little text at a time.
REFERENCE_BATCH_CHARACTERS = 1 << 18
# gigatoken 0.10 remembers every word it ever met: up to 8 MB a megabyte of random letters. Building it anew takes 0.1 s.
MAX_CACHE_GROWTH_BYTES = 512 << 20


class EncodedTexts(NamedTuple):
    ids: npt.NDArray[np.uint32]
    """Of all texts, one after the other."""
    lengths: npt.NDArray[np.int64]
    """Ids of each text."""

    def each(self) -> list[npt.NDArray[np.uint32]]:
        """The ids of each text."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1])


class Encoder(Protocol):
    def encode(self, texts: list[str]) -> EncodedTexts: ...


class ReferenceEncoder:
    """The library `tokenizers`, in this thread alone unless TOKENIZERS_PARALLELISM says otherwise."""

    def __init__(self, definition: TokenizerDefinition) -> None:
        if definition.backend_json is None:
            raise UserError(f"tokenizer: {definition.name} exists in Python only; set encoder to auto or transformers")
        # Else each of the processes that share a machine's cores would start a thread a core.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._backend = backend_tokenizer(definition.backend_json, definition.special_text)

    def encode(self, texts: list[str]) -> EncodedTexts:
        arrays = []
        for batch in _batches(texts, REFERENCE_BATCH_CHARACTERS):
            arrays += [np.array(e.ids, np.uint32) for e in self._backend.encode_batch_fast(batch, add_special_tokens=False)]
        return _joined(arrays)


class TransformersEncoder:
    """The tokenizer as transformers runs it, a text at a time: for those that exist in Python only."""

    def __init__(self, definition: TokenizerDefinition) -> None:
        self._tokenizer = load_transformers_tokenizer(definition.name, definition.revision)
        if tokenizer_files(definition.name, definition.revision) != definition.files:
            raise UserError(f"tokenizer {definition.name} was changed while it was used; put back what it was, or submit a new run")
        self._special_text = definition.special_text

    def encode(self, texts: list[str]) -> EncodedTexts:
        return _joined([np.array(transformers_ids(self._tokenizer, text, self._special_text), np.uint32) for text in texts])


class GigatokenEncoder:
    """gigatoken's in-memory batches, in this thread alone, with its growing memory of words thrown away in time."""

    def __init__(self, definition: TokenizerDefinition) -> None:
        if definition.backend_json is None:
            raise UserError(f"tokenizer: {definition.name} exists in Python only; set encoder to auto or transformers")
        self._definition = definition
        self._json = _without_special_tokens(definition) if definition.special_text == "text" else definition.backend_json
        reference = ReferenceEncoder(definition)
        self._check = RunningCheck(lambda text: reference.encode([text]).ids, definition.name)
        self._renew()

    def encode(self, texts: list[str]) -> EncodedTexts:
        if not texts:
            return _joined([])
        drawn = self._check.draw(texts)
        encoded = self._encode([*texts, *drawn.slices])
        ends = np.cumsum(encoded.lengths)
        slices = range(len(texts), len(texts) + len(drawn.slices))
        for number, text in [*((number, texts[number]) for number in drawn.whole), *zip(slices, drawn.slices, strict=True)]:
            self._check.compare(text, encoded.ids[int(ends[number] - encoded.lengths[number]) : int(ends[number])])
        if resident_bytes() - self._resident_when_new > MAX_CACHE_GROWTH_BYTES:
            self._renew()
        return EncodedTexts(encoded.ids[: int(ends[len(texts) - 1])], encoded.lengths[: len(texts)])

    def _encode(self, texts: list[str]) -> EncodedTexts:
        layout = self._tokenizer.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return EncodedTexts(ids, np.diff(offsets).astype(np.int64))

    def _renew(self) -> None:
        import gigatoken

        self._tokenizer = gigatoken.Tokenizer.from_json(self._json)
        self._resident_when_new = resident_bytes()


def make_encoder(definition: TokenizerDefinition, name: EncoderName) -> Encoder:
    made: dict[str, Callable[[TokenizerDefinition], Encoder]] = {
        "gigatoken": GigatokenEncoder,
        "tokenizers": ReferenceEncoder,
        "transformers": TransformersEncoder,
    }
    return made[name](definition)


def choose_encoder(
    definition: TokenizerDefinition,
    wanted: Literal["auto"] | EncoderName,
    sample: Iterable[str],
    say: Callable[[str], None],
    *,
    known_difference: str | None = None,
) -> EncoderName:
    """The encoder to use for `wanted`; says why where it is not the fast one.

    sample : text to try it on.
    known_difference : what a run into the same set found, if it found gigatoken wrong.
    """
    if wanted in ("tokenizers", "transformers"):
        return wanted
    if wanted == "auto" and definition.backend_json is None:
        say(f"encoder: transformers, since {definition.name} exists in Python only; expect some 0.1 MB of text a second and process")
        return "transformers"
    fault = known_difference or _gigatoken_fault(definition, sample)
    if fault is None:
        return "gigatoken"
    if wanted == "gigatoken":
        raise UserError(f"encoder: gigatoken can't be used: {fault}; set encoder: auto or tokenizers")
    say(f"encoder: tokenizers, 17 to 48 times slower than gigatoken was measured to be: {fault}")
    return "tokenizers"


def _gigatoken_fault(definition: TokenizerDefinition, sample: Iterable[str]) -> str | None:
    """Why gigatoken can't stand in for the tokenizer, whatever text comes; None if it can."""
    if definition.backend_json is None:
        raise UserError(f"tokenizer: {definition.name} exists in Python only; set encoder to auto or transformers")
    by_definition = unshared(definition.backend_json)
    if by_definition is not None:
        return f"{by_definition}; of such tokenizers gigatoken may give other ids"
    try:
        fast = GigatokenEncoder(definition)
    except ImportError as error:
        return f"it is not installed ({error}); pip install 'crosscoder-pipeline[fast]'"
    except Exception as error:  # what the library raises for a tokenizer it does not know is not documented
        return f"it does not know this kind of tokenizer ({str(error).partition(chr(10))[0]})"
    reference = ReferenceEncoder(definition)
    texts = [*PROBES, *added_token_probes(definition.added_tokens), *sample]
    for text, found, wanted in zip(texts, fast._encode(texts).each(), reference.encode(texts).each(), strict=True):
        if not np.array_equal(found, wanted):
            return f"its ids differ for the text that begins {text[:60]!r}"
    return None


def _without_special_tokens(definition: TokenizerDefinition) -> str:
    """The definition with no special token to be found in a text."""
    value = json.loads(definition.backend_json or "{}")
    value["added_tokens"] = [token for token in value["added_tokens"] if not token["special"]]
    return json.dumps(value, ensure_ascii=False)


def _batches(texts: list[str], max_characters: int) -> Iterable[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= max_characters:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _joined(arrays: list[npt.NDArray[np.uint32]]) -> EncodedTexts:
    ids = np.concatenate(arrays) if arrays else np.empty(0, np.uint32)
    return EncodedTexts(ids, np.array([len(array) for array in arrays], np.int64))


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
