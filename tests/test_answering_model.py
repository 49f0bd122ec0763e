"""The second model of the example of model diffing: its text by hand, and a fine-tuning that keeps the demo's tokenizer."""

import json
from pathlib import Path

import torch
import xxhash

from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.language_models import NeedsModels
from pipeline.demo.answering_model import fine_tune, questions, write_text
from pipeline.demo.train_language_model import VALIDATION_FRACTION, save
from pipeline.language_models import LanguageModels, load_models

SOURCE = '''
"""A module."""

def push(heap, item):
    """Push item onto heap,
    keeping it a heap.

    More about it.
    """

def _hidden():
    """Not asked about."""

def silent(): ...

class Queue:
    """A queue."""

    async def get(self):
        """Remove and return an item."""
'''


def test_a_question_is_asked_of_whatever_is_public_and_documented() -> None:
    assert list(questions(SOURCE, "q")) == [
        "Question: What does q.push do?\nAnswer: Push item onto heap, keeping it a heap.\n",
        "Question: What is q.Queue?\nAnswer: A queue.\n",
        "Question: What does q.Queue.get do?\nAnswer: Remove and return an item.\n",
    ]


def test_the_text_is_the_same_every_time(tmp_path: Path) -> None:
    assert write_text(tmp_path / "one") == write_text(tmp_path / "two") > 100
    text = (tmp_path / "one/answers.jsonl").read_bytes()
    assert text == (tmp_path / "two/answers.jsonl").read_bytes()
    rows = {row["meta"]["path"]: row["text"] for row in map(json.loads, text.splitlines())}
    assert "Question: What does heapq.nlargest do?\nAnswer: Find the n largest elements in a dataset.\n" in rows["heapq.py"]


def test_the_fine_tuned_model_can_be_read_beside_the_demo(tmp_path: Path) -> None:
    texts = [f"Question: What does f{number} do?\nAnswer: {'It gives a number. ' * 120}\n" for number in range(60)]
    held_out = sum(xxhash.xxh3_64_intdigest(text.encode()) < VALIDATION_FRACTION * 2**64 for text in texts)
    assert 0 < held_out < 60
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model, tokenizer, figures = fine_tune(tmp_path, steps=2, batch=1, learning_rate=1e-3, device="cpu", seed=0)
    assert figures["validation_cross_entropy_nats"] < figures["validation_cross_entropy_nats_before"]
    save(model, tokenizer, figures, tmp_path / "answers")
    both = {
        "base": LanguageModelConfig(model="demo", device="cpu"),
        "chat": LanguageModelConfig(model=str(tmp_path / "answers"), device="cpu"),
    }
    models = load_models(NeedsModels(language_models=both))
    assert isinstance(models, LanguageModels)
    base, chat = models.by_name.values()
    assert base.tokenizer_hash == chat.tokenizer_hash is not None
    layers = ["base/transformer.h.3", "chat/transformer.h.3"]
    one, other = models.activations(torch.arange(1, 17)[None], layers).unbind(2)
    assert not one.equal(other)
