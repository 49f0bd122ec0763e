"""The stage `train` on a real, tiny language model: from disk and from the stream."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_token_set
from toy_activations import VARIANTS

from pipeline.config.cache_activations import CacheConfig
from pipeline.config.errors import UserError
from pipeline.config.schema import build
from pipeline.config.train_crosscoder import TrainConfig
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.run import Run, Stopped
from pipeline.stages import cache_activations, train_crosscoder

SHUFFLE = {"shuffle_generations": 3, "shuffle_positions": 256}
LAYERS = ["transformer.h.0", "transformer.h.1"]


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is read of which language model, as both kinds of source take it."""
    directory = tmp_path_factory.mktemp("inputs")
    tiny_token_set(directory / "tokens", num_documents=60)
    model = {"model": str(tiny_gpt2(directory / "model")), "device": "cpu"}
    sizes = {"context_tokens": 16, "contexts_per_generation": 24, "model_batch_contexts": 8}
    return {"tokens": str(directory / "tokens"), "language_model": model, "layers": LAYERS, **sizes}


def config(activations: dict[str, Any], variant: str = "batch_topk") -> TrainConfig:
    course = {"epochs": 2, "batch_positions": 100, "dead_window_tokens": 300, "log_every_steps": 5, "device": "cpu"}
    values = {"stage": "train", "name": "toy", "activations": activations, **VARIANTS[variant], **course}
    return build(TrainConfig, values, "train.yaml")


def stream(harvest: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "stream", **harvest, **SHUFFLE, "statistics_contexts": 10_000}


def disk(harvest: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    values = {"stage": "cache", "name": "toy", "output": str(tmp_path / "activations"), **harvest}
    cache_activations.run(build(CacheConfig, values, "cache.yaml"), Run(tmp_path / "cache", stage="cache"))
    return {"kind": "disk", "path": str(tmp_path / "activations"), **SHUFFLE}


@pytest.mark.parametrize("variant", ["relu", "batch_topk"])
def test_training_from_disk_and_from_the_stream_gives_the_same_crosscoder(variant: str, harvest: dict[str, Any], tmp_path: Path) -> None:
    results, weights = {}, {}
    for kind, activations in (("disk", disk(harvest, tmp_path)), ("stream", stream(harvest))):
        run = Run(tmp_path / kind, stage="train")
        results[kind] = train_crosscoder.run(config(activations, variant), run)
        trained = load_crosscoder(run.directory)
        weights[kind] = trained.crosscoder.state_dict()
        assert (trained.layers, trained.d_model) == (LAYERS, 16)
    assert results["disk"]["tokens"] == results["stream"]["tokens"] > 1000
    assert results["disk"]["loss"] == pytest.approx(results["stream"]["loss"], rel=1e-5)
    for name, tensor in weights["disk"].items():
        torch.testing.assert_close(tensor, weights["stream"][name], rtol=1e-4, atol=1e-6)


def test_inputs_are_bound_to_the_run(harvest: dict[str, Any], tmp_path: Path) -> None:
    train_crosscoder.run(config(stream(harvest)), Run(tmp_path, stage="train"))
    trained = load_crosscoder(tmp_path)
    inputs = json.loads((tmp_path / "inputs.json").read_text())
    assert inputs["tokens"]["data_id"] == trained.provenance.tokens_id
    assert inputs["language_model"]["data_id"] == trained.provenance.language_model_hash


def test_a_run_stopped_while_the_stream_computes_ends_as_one_that_was_not(harvest: dict[str, Any], tmp_path: Path) -> None:
    class StopsItself(Run):
        """Asks itself to stop at the fourth report of training."""

        left = 4

        def report(self, phase: str, *arguments: Any, **keywords: Any) -> None:
            super().report(phase, *arguments, **keywords)
            self.left -= phase == "train"
            if self.left == 0:
                self.request_stop("test")

    with pytest.raises(Stopped):
        train_crosscoder.run(config(stream(harvest)), StopsItself(tmp_path / "stopped", stage="train"))
    for name in ("stopped", "whole"):
        train_crosscoder.run(config(stream(harvest)), Run(tmp_path / name, stage="train"))
    stopped, whole = (max((tmp_path / name / "checkpoints").iterdir()) for name in ("stopped", "whole"))
    assert stopped.name == whole.name
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == {path.name: path.read_bytes() for path in whole.iterdir()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_gpu_that_is_not_there_is_asked_for_in_vain() -> None:
    with pytest.raises(UserError, match="device is cuda, but torch finds no GPU here"):
        train_crosscoder.chosen_device("cuda")
