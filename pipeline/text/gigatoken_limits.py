"""Which tokenizers gigatoken shares with `tokenizers`, as their definitions say.

Found by comparing the ids of both on random texts under random definitions (gigatoken 0.10.0 and tokenizers 0.23.3; the test of this
module does it again with a seed). What gigatoken refuses by itself is not repeated here. These it takes, and gives other ids:

    single_word, lstrip, rstrip     it does not know the first; it strips the others after a match, tokenizers when all are found
    normalized                      it looks for every added token in the text as it is; tokenizers looks for these in the normalized
                                    text, after the others
    pre-tokenizers                  of a sequence it takes the regular expression and passes over the rest; it always works on bytes
    dropout, parts of words         it passes over them

Kinds that were not compared count as not shared.
"""

import functools
import json
import unicodedata
from collections.abc import Iterable
from typing import Any

Json = dict[str, Any]

_SPACE_TO_BAR = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_BAR_IN_FRONT = {"type": "Prepend", "prepend": "▁"}
# Gemma's: its normalizer leaves no space to split at.
_SPLIT_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def unshared(backend_json: str) -> str | None:
    """What of the definition gigatoken is known or suspected to read otherwise, in words; None where it gives the same ids."""
    definition: Json = json.loads(backend_json)
    model, added_tokens = definition["model"], definition["added_tokens"]
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, not BPE"
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            return f"its model has {setting} {model[setting]!r}"
    normalizers = _flat(definition["normalizer"], "normalizers")
    pre_tokenizers = _flat(definition["pre_tokenizer"], "pretokenizers")
    splits_fault = _sentencepiece_fault if model.get("byte_fallback") else _byte_level_fault
    return splits_fault(normalizers, pre_tokenizers) or _added_tokens_fault(added_tokens, normalizers, pre_tokenizers)


def _flat(part: Json | None, inner: str) -> list[Json]:
    """The steps of a normalizer or pre-tokenizer, sequences within sequences resolved."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for entry in part[inner] for step in _flat(entry, inner)]
    return [part]


def _byte_level_fault(normalizers: list[Json], pre_tokenizers: list[Json]) -> str | None:
    for normalizer in normalizers:
        if normalizer["type"] != "NFC":
            return f"its normalizer is {normalizer['type']}"
    *splits, last = pre_tokenizers or [{"type": "no pre-tokenizer"}]
    if last["type"] != "ByteLevel":
        return f"its pre-tokenizer ends with {last['type']}, not with ByteLevel"
    # With a regular expression in front ByteLevel must not split again; alone it must.
    if bool(splits) == last.get("use_regex", True) or (splits and last["add_prefix_space"]):
        return "its pre-tokenizer is a ByteLevel with unusual settings"
    for split in splits:
        form = (split["type"], "Regex" in split.get("pattern", {}), split.get("behavior"), split.get("invert"))
        if form not in (("Split", True, "Isolated", False), ("Split", True, "Removed", True)):
            return f"its pre-tokenizer has a {split['type']} beside ByteLevel"
    return None


def _sentencepiece_fault(normalizers: list[Json], pre_tokenizers: list[Json]) -> str | None:
    if normalizers not in ([], [_SPACE_TO_BAR], [_BAR_IN_FRONT, _SPACE_TO_BAR]):
        return f"its normalizer is {' and '.join(normalizer['type'] for normalizer in normalizers)}"
    known = not pre_tokenizers or (pre_tokenizers == [_SPLIT_AT_SPACES] and _SPACE_TO_BAR in normalizers)
    known = known or (len(pre_tokenizers) == 1 and pre_tokenizers[0]["type"] == "Metaspace" and not normalizers)
    return None if known else f"its pre-tokenizer is {' and '.join(step['type'] for step in pre_tokenizers)} after such a normalizer"


def _added_tokens_fault(added_tokens: list[Json], normalizers: list[Json], pre_tokenizers: list[Json]) -> str | None:
    for token in added_tokens:
        if token["single_word"]:
            return f"its added token {token['content']!r} matches whole words only"
    stripping = [token for token in added_tokens if token["lstrip"] or token["rstrip"]]
    spaced = [token for token in added_tokens if token["content"].strip() != token["content"]]
    if stripping and spaced:
        return f"its added token {stripping[0]['content']!r} takes white space beside it, and {spaced[0]['content']!r} has some at its edge"
    if spaced and any(step.get("add_prefix_space") for step in pre_tokenizers):
        return f"its pre-tokenizer puts a space in front of a text, and its added token {spaced[0]['content']!r} has one at its edge"
    normalized = [token["content"] for token in added_tokens if token["normalized"]]
    exact = [token["content"] for token in added_tokens if not token["normalized"]]
    for content in normalized if normalizers else []:
        if normalizers[0]["type"] != "NFC" or not is_untouched_by_nfc(content):
            return f"its added token {content!r} is looked for in the normalized text"
    for content in exact if normalizers and normalizers[0]["type"] == "NFC" else []:
        if not set(content).isdisjoint(_nfc_gives()):
            return f"its added token {content!r} can come about by normalizing"
    overlapping = first_overlap(normalized, exact)
    if overlapping is not None:
        return f"its added token {overlapping!r} shares text with another, and only one of the two is looked for in the normalized text"
    return None


def first_overlap(ones: Iterable[str], others: Iterable[str]) -> str | None:
    """The first of `ones` that contains, is contained in, or can stand half over one of `others`; None if none does."""
    known = set(others)
    beginnings = {other[:end] for other in known for end in range(1, len(other) + 1)}
    ends = {other[start:] for other in known for start in range(len(other))}
    within = {other[start:end] for other in known for start in range(len(other)) for end in range(start + 1, len(other) + 1)}
    for one in ones:
        pieces = {one[start:end] for start in range(len(one)) for end in range(start + 1, len(one) + 1)}
        one_ends, one_beginnings = {one[start:] for start in range(len(one))}, {one[:end] for end in range(1, len(one) + 1)}
        if pieces & known or one in within or one_ends & beginnings or one_beginnings & ends:
            return one
    return None


def is_untouched_by_nfc(text: str) -> bool:
    """Whether NFC leaves every occurrence of `text` where it is and makes no new one, whatever stands around it."""
    return all(unicodedata.combining(char) == 0 and char not in _composable() for char in text)


@functools.cache
def _composable() -> frozenset[str]:
    """Characters that a canonical decomposition consists of, and those that have one."""
    return frozenset(char for pair in _decompositions() for char in pair[0] + pair[1])


@functools.cache
def _nfc_gives() -> frozenset[str]:
    """Characters that NFC can put where others stood: é for e with an accent after it, K for the sign of the unit kelvin."""
    return frozenset(char for pair in _decompositions() for form in pair for char in unicodedata.normalize("NFC", form) if form != char)


@functools.cache
def _decompositions() -> tuple[tuple[str, str], ...]:
    """Each character that has a canonical decomposition, and the decomposition."""
    pairs = ((char, unicodedata.normalize("NFD", char)) for char in map(chr, range(0x110000)))
    return tuple(pair for pair in pairs if pair[0] != pair[1])
