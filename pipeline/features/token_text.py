"""Each token of a vocabulary as text, for people to read."""

from typing import Any


def token_texts(tokenizer: Any, vocab_size: int) -> list[str]:
    """The text of each id of a transformers tokenizer; `<7>` of an id 7 that it doesn't have.

    A token of a part of a letter's bytes has the replacement character. A space that stands before a word is kept: tokenizers that
    mark it by `▁` drop it from the front of what they decode.
    """
    known = min(len(tokenizer), vocab_size)
    names = tokenizer.convert_ids_to_tokens(list(range(known)))
    texts = tokenizer.batch_decode([[number] for number in range(known)], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    spaced = [
        f" {text}" if name is not None and name.startswith("▁") and not text.startswith(" ") else text
        for name, text in zip(names, texts, strict=True)
    ]
    return spaced + [f"<{number}>" for number in range(known, vocab_size)]
