"""What the tests of the token stages share: a tiny tokenizer, JSON-lines files in every form, and a run of the stage."""

import gzip
import json
import random
from pathlib import Path

import tokenizers
import zstandard

from pipeline.config.schema import build
from pipeline.config.tokenize_text import TokenizeConfig
from pipeline.run import Run
from pipeline.stages import tokenize_text

END_OF_TEXT = "<|endoftext|>"
WORDS = ["the", "of", "and", "a", "to", "in", "café", "naïve", "你好", "😀", "def", "return", "42", "it's", END_OF_TEXT]


def make_tokenizer(path: Path, *, vocab_size: int = 400) -> Path:
    """A byte-level BPE with one special token, in a tokenizer.json without anything beside it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(50, seed=1), trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def make_texts(number: int, *, seed: int = 0, words: int = 40) -> list[str]:
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(1, words))) + f" {seed}-{i}" for i in range(number)]


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "meta": {"n": i}}).encode() + b"\n" for i, text in enumerate(texts))


def compressed(content: bytes, ending: str) -> bytes:
    """`content` as three gzip members or zstd frames, or as it is."""
    thirds = [content[i * len(content) // 3 : (i + 1) * len(content) // 3] for i in range(3)]
    if ending == ".gz":
        return b"".join(gzip.compress(third) for third in thirds)
    if ending == ".zst":
        return b"".join(zstandard.ZstdCompressor().compress(third) for third in thirds)
    return content


def tokenize(directory: Path, *, task: int = 0, num_tasks: int = 1, run: Run | None = None, **settings):
    """Runs the stage over `directory`/*.jsonl* into `directory`/tokens, and gives its result."""
    values = {
        "stage": "tokenize",
        "name": "test",
        "sources": [str(directory / "*.jsonl*")],
        "output": str(directory / "tokens"),
        "tokenizer": {"name": str(directory / "tokenizer.json"), **settings.pop("tokenizer", {})},
        "processes": 1,
        "encoder": "tokenizers",
        "validation_fraction": 0.2,
        **settings,
    }
    config = build(TokenizeConfig, values, "test")
    return tokenize_text.run(config, run or Run(directory / f"run-{task}", stage="tokenize", task=task, num_tasks=num_tasks))


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file under a directory, by relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
