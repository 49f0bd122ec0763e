"""Texts on which two ways to the ids of one tokenizer are compared."""

from collections.abc import Sequence

# On these tokenizers and their fast forms are known to part ways: white space, control characters, scripts without spaces,
# combining marks, emoji joined to sequences, contractions, long runs.
PROBES = [
    "Hello world",
    "  two  spaces\tand\ttabs \n\n\n new lines\r\n \u00a0\u2003\u3000 wide\u200b ones ",
    "don't DON'T we'll I'M they\u2019re",
    "def f(x):\n    return x**2  # caf\u00e9 na\u00efve e\u0301",
    "1234567890 3.14159 1,000,000 \u00bd \u0663\u0664 \u2460",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uc548\ub155 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f3fd \U0001f1e9\U0001f1ea \ufffd \ufeff \x00 \x07 \U0010ffff",
    "a" * 300 + " " * 300 + "ab" * 300 + "=" * 300 + "\n" * 50,
]


def added_token_probes(added_tokens: Sequence[str]) -> list[str]:
    """Two texts for each added token: inside and outside a word, beside white space, beside itself and beside another one."""
    others = [*added_tokens[1:], *added_tokens[:1]]
    pairs = list(zip(added_tokens, others, strict=True))
    inside = [f"a{token}b {token}. c{token}1 \u00e9{token}\u0301" for token in added_tokens]
    beside = [f"{token}{token} {other}{token}{other}  {token}\n\n{token}\t{other}\u00a0 {token} " for token, other in pairs]
    return [*inside, *beside]
