"""A tiny language model, held-out token set and crosscoder checkpoint for tests of evaluation; weights are random or exact."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_gpt2

from pipeline import records
from pipeline.activations.source import LayerStatistics
from pipeline.config.crosscoder import BatchTopk, CrosscoderConfig, Relu
from pipeline.config.evaluate_crosscoder import EvaluateConfig
from pipeline.config.language_model import LanguageModelConfig
from pipeline.crosscoder import checkpoint_files
from pipeline.crosscoder.checkpoint import crosscoder_part
from pipeline.crosscoder.checkpoint_files import Part
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.normalizer import Normalizer
from pipeline.language_model import LanguageModel
from pipeline.run import Run
from pipeline.stages import evaluate_crosscoder
from pipeline.tokens import TokenSet, write_token_set

Json = dict[str, Any]

LAYERS = ["transformer.h.0", "transformer.h.2"]
CONTEXT_TOKENS = 12
D_MODEL = 16


def held_out_tokens(directory: Path, *, num_documents: int = 14, tokenizer_hash: str = "tokenizer", seed: int = 0) -> TokenSet:
    """Two shards of documents of 1 to 20 ids of a vocabulary of 300, end-of-text being id 0."""
    generator = np.random.default_rng(seed)
    documents = [generator.integers(1, 300, length).tolist() for length in generator.integers(1, 21, num_documents)]
    half = num_documents // 2
    shards = {"a-000": documents[:half], "b-000": documents[half:]}
    return write_token_set(directory, shards, vocab_size=300, end_of_text_id=0, tokenizer_hash=tokenizer_hash)


def random_crosscoder(config: CrosscoderConfig, num_layers: int = 2, d_model: int = D_MODEL) -> Crosscoder:
    crosscoder = Crosscoder(config, layers=[f"layer.{index}" for index in range(num_layers)], d_model=d_model, seed=0)
    for name, buffer in crosscoder.named_buffers():
        if name.endswith(".threshold"):
            buffer.fill_(0.02)
    return crosscoder


def exact_crosscoder() -> tuple[CrosscoderConfig, Crosscoder]:
    """A crosscoder that gives its input back: a feature for the positive and one for the negative part of each number."""
    size = len(LAYERS) * D_MODEL
    config = CrosscoderConfig(num_features=2 * size, activation_function=Relu())
    crosscoder = Crosscoder(config, layers=LAYERS, d_model=D_MODEL, seed=0)
    one_LDC = torch.eye(size).view(len(LAYERS), D_MODEL, size)
    with torch.no_grad():
        crosscoder.W_enc_LDF.copy_(torch.cat([one_LDC, -one_LDC], dim=-1))
        crosscoder.W_dec_FLD.copy_(crosscoder.W_enc_LDF.permute(2, 0, 1))
    return config, crosscoder


def batch_topk_config(k: int = 3, num_features: int = 24) -> CrosscoderConfig:
    return CrosscoderConfig(num_features=num_features, activation_function=BatchTopk(k=k))


class Pieces:
    """Everything that an evaluation reads, under one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model_directory = tiny_gpt2(directory / "model")
        self.language_model = LanguageModel.load(self.language_model_config())
        self.tokens = held_out_tokens(directory / "tokens")
        self.training_tokens = held_out_tokens(directory / "training-tokens", num_documents=60, seed=1)

    def language_model_config(self) -> LanguageModelConfig:
        return LanguageModelConfig(model=str(self.model_directory), device="cpu")

    def write_crosscoder(self, config: CrosscoderConfig, crosscoder: Crosscoder, *, run: str = "train-run", **facts: Any) -> Path:
        """A checkpoint in a run directory; gives the run directory. `facts` replace what the checkpoint would say."""
        mean_LD = torch.full(crosscoder.b_dec_LD.shape, 0.02, dtype=torch.float64)
        statistics = LayerStatistics(mean_LD, torch.linspace(0.5, 0.6, len(mean_LD), dtype=torch.float64), 1000)
        normalizer = Normalizer.from_statistics(statistics, config.normalization)
        since_F = torch.zeros(config.num_features, dtype=torch.int64)
        since_F[:2] = 500
        known: dict[str, Any] = {"layers": LAYERS, "step": 7, "tokens": 7000, "dead_window_tokens": 100, "activations_id": "a" * 64}
        known |= {"language_model_hash": self.language_model.hash, "tokenizer_hash": "tokenizer", "tokens_id": self.training_tokens.data_id}
        known |= {"batch_positions": 16, "context_tokens": CONTEXT_TOKENS, "drop_positions": [0]}
        part = crosscoder_part(crosscoder, normalizer, since_F, config, known | facts)
        training = Part({"counter": torch.zeros(1)}, {})
        return checkpoint_files.write(self.directory / run / "checkpoints", 7, {"crosscoder": part, "training": training}).parent.parent

    def config(self, crosscoder: Path, **changes: Any) -> EvaluateConfig:
        settings: dict[str, Any] = {"name": "test", "crosscoder": crosscoder, "tokens": self.tokens.directory}
        settings |= {"training_tokens": self.training_tokens.directory, "language_model": self.language_model_config()}
        settings |= {"context_tokens": CONTEXT_TOKENS, "batch_contexts": 4, "spliced_baselines": 9}
        return EvaluateConfig(**(settings | changes))


def evaluated(pieces: Pieces, crosscoder: Path, directory: Path, **changes: Any) -> Json:
    """What `metrics.json` holds after an evaluation."""
    evaluate_crosscoder.run(pieces.config(crosscoder, **changes), Run(directory, output=io.StringIO()))
    return dict(records.read_json(directory / "metrics.json"))


def reconstruction_row(document: Json, layer: str, by: str, source: str | None = None) -> Json:
    return _row(document["reconstruction"], layer, by, source)


def loss_row(document: Json, layer: str, by: str, source: str | None = None) -> Json:
    return _row(document["replaced"], layer, by, source)


def _row(rows: list[Json], layer: str, by: str, source: str | None) -> Json:
    (found,) = [row for row in rows if (row["layer"], row["by"], row["source"]) == (layer, by, source)]
    return dict(found)


# -- fixtures: a module of tests takes them by their names, `metrics = evaluation_pieces.metrics` --------------------------------


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Pieces:
    return Pieces(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def trained_run(pieces: Pieces) -> Path:
    config = batch_topk_config()
    return pieces.write_crosscoder(config, random_crosscoder(config))


@pytest.fixture(scope="module")
def metrics(pieces: Pieces, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Json:
    return evaluated(pieces, trained_run, tmp_path_factory.mktemp("run"))
