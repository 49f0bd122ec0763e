"""Prompts: texts to the token ids that a language model reads, as it read contexts in the crosscoder's training, and back."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.errors import UserError
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.language_model import LanguageModel
from pipeline.text.tokenizer import load_transformers_tokenizer


class Prompts:
    """The tokenizer beside a language model, with the beginning-of-text that a crosscoder was trained with."""

    def __init__(self, tokenizer: Any, *, beginning_of_text_id: int | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.beginning_of_text_id = beginning_of_text_id
        self._vocab_size = vocab_size

    @classmethod
    def of(
        cls, language_model: LanguageModel, trained: TrainedCrosscoder, *, revision: str | None = None, check_tokenizer: bool = True
    ) -> "Prompts":
        """Raises `UserError` where the model comes without a tokenizer, or with another than the crosscoder's training read."""
        known, beside = trained.provenance.tokenizer_hash, language_model.tokenizer_hash
        if check_tokenizer and known and beside is not None and beside != known:
            raise UserError(
                f"the tokenizer beside {language_model.name} has hash {beside[:12]}, the one of the crosscoder's training {known[:12]}: "
                "prompts would be other tokens; language_model.check_tokenizer=false does without this check"
            )
        tokenizer = load_transformers_tokenizer(language_model.name, revision)
        return cls(tokenizer, beginning_of_text_id=trained.provenance.beginning_of_text_id, vocab_size=language_model.vocab_size)

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt. Raises `UserError` for one without any, or with an id beyond the model's embeddings."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids if self.beginning_of_text_id is None else [self.beginning_of_text_id, *ids]
        if not ids:
            raise UserError(f"the prompt {text!r} has no tokens for this language model's tokenizer; give a longer one")
        if (greatest := max(ids)) >= self._vocab_size:
            raise UserError(f"the prompt {text[:40]!r} has id {greatest:,}, but the language model has embeddings for {self._vocab_size:,}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens as they are written."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def decode_behind(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text of `ids` as it goes on behind a prompt: tokenizers that mark spaces drop the first of what they decode alone."""
        before, whole = self.decode(prompt), self.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: the `text` of each line of a `.jsonl` file, else each line that is not empty."""
    if not path.is_file():
        raise UserError(f"prompts_file is {path}, where there is no file; name one with a prompt a line, or one of JSON lines")
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    prompts = lines if path.suffix != ".jsonl" else [_text_of(line, path, number) for number, line in enumerate(lines, 1)]
    if not prompts:
        raise UserError(f"prompts_file is {path}, which holds no prompt; write one a line")
    return prompts


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f'{path}, line {number} is not JSON ({error}); expected {{"text": "..."}}') from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise UserError(f'{path}, line {number} has no text under `text`; expected {{"text": "..."}}')
    return str(value["text"])
