"""Tiny activations for tests: a model and tokens, and the same activations from disk and as a stream."""

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_token_set

from pipeline.activations.opening import open_source
from pipeline.config.activation_source import DiskActivations, StreamedActivations
from pipeline.config.cache_activations import CacheConfig
from pipeline.run import Run
from pipeline.stages import cache_activations

CPU = torch.device("cpu")
SHUFFLE = {"shuffle_generations": 3, "shuffle_positions": 40}
"""Blocks of three rows, pools of a few dozen."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    tiny_gpt2(directory / "model")
    tiny_token_set(directory / "tokens", num_documents=12)
    return directory


def harvest_settings(inputs, **changes):
    settings = {
        "tokens": inputs / "tokens",
        "language_model": {"model": str(inputs / "model"), "device": "cpu"},
        "layers": ["transformer.h.1", "transformer.h.0"],
        "context_tokens": 16,
        "contexts_per_generation": 6,
        "model_batch_contexts": 4,
        "seed": 7,
    }
    return settings | changes


@pytest.fixture
def pair(inputs, tmp_path, request):
    """The same activations from disk and as a stream; parametrized by generation size and model batch size."""
    contexts_per_generation, model_batch_contexts = getattr(request, "param", (6, 4))
    sizes = {"contexts_per_generation": contexts_per_generation, "model_batch_contexts": model_batch_contexts}
    settings = harvest_settings(inputs, **sizes)
    cache_activations.run(CacheConfig(name="test", output=tmp_path / "set", **settings), Run(tmp_path / "cache"))
    disk = open_source(DiskActivations(path=tmp_path / "set", **SHUFFLE), Run(tmp_path / "disk"), CPU)
    streamed = open_source(StreamedActivations(kind="stream", **settings, **SHUFFLE), Run(tmp_path / "stream"), CPU)
    return disk, streamed


def read(source, *, batch_positions=50, epoch=0, cursor=0):
    return list(source.batches(batch_positions=batch_positions, epoch=epoch, cursor=cursor))


def order_of(source):
    return source._harvester.order
