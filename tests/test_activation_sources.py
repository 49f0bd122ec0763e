"""Disk and stream give the same batches, every position once an epoch, from any point on."""

import hashlib
import itertools
import json
import shutil

import activation_pieces
import numpy as np
import pytest
import torch
from activation_pieces import CPU, SHUFFLE, harvest_settings, order_of, read

from pipeline.activations.epoch_order import EpochOrder
from pipeline.activations.opening import open_source
from pipeline.config.activation_source import DiskActivations, StreamedActivations
from pipeline.config.cache_activations import CacheConfig
from pipeline.contexts import Contexts
from pipeline.language_model import LanguageModel
from pipeline.run import Run, Stopped
from pipeline.stages import cache_activations
from pipeline.tokens import TokenSet

inputs, pair = activation_pieces.inputs, activation_pieces.pair


def joined(batches):
    return [torch.cat(columns) for columns in zip(*batches, strict=True)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(batch, other, strict=True))


def places(batches):
    """Which rows came, as sorted (document, position, token, first activation) tuples."""
    acts, tokens, documents, positions = joined(batches)
    return sorted(zip(documents.tolist(), positions.tolist(), tokens.tolist(), acts[:, 0, 0].tolist(), strict=True))


@pytest.mark.parametrize("pair", [(12, 5), (1, 1), (1000, 7)], ids=["several", "a-context-each", "all-in-one"], indirect=True)
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_disk_and_stream_give_the_same_batches(pair, epoch):
    disk, streamed = pair
    assert disk.num_positions == streamed.num_positions
    for batch_positions in (1, 50, 10_000) if epoch == 0 else (33,):
        assert_same(read(disk, batch_positions=batch_positions, epoch=epoch), read(streamed, batch_positions=batch_positions, epoch=epoch))


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_every_position_comes_exactly_once_an_epoch(pair, inputs, kind):
    source = pair[kind]
    contexts = Contexts(TokenSet.open(inputs / "tokens"), 16)
    read_all = contexts.read(np.arange(len(contexts)))
    kept = (np.arange(16) < read_all.lengths_B[:, None]) & (np.arange(16) > 0)
    positions = np.broadcast_to(np.arange(16), kept.shape)
    expected = sorted(zip(read_all.documents_BS[kept].tolist(), positions[kept].tolist(), read_all.tokens_BS[kept].tolist(), strict=True))
    epochs = [places(read(source, epoch=epoch)) for epoch in range(3)]
    assert [row[:3] for row in epochs[0]] == expected
    assert len(expected) == source.num_positions
    assert epochs[0] == epochs[1] == epochs[2]


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_epochs_have_orders_of_their_own(pair, kind):
    first, second, again = (joined(read(pair[kind], epoch=epoch)) for epoch in (0, 1, 1))
    assert not first[1].equal(second[1])
    assert second[1].equal(again[1])


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_resumed_at_any_cursor_is_the_same_as_uninterrupted(pair, kind):
    source = pair[kind]
    whole = read(source, batch_positions=30, epoch=1)
    for number in range(len(whole) + 1):
        cursor = min(30 * number, source.num_positions)
        assert_same(read(source, batch_positions=30, epoch=1, cursor=cursor), whole[number:])
    rows = joined(whole)
    for cursor in (1, 29, 31, source.num_positions - 1):
        rest = joined(read(source, batch_positions=64, epoch=1, cursor=cursor))
        assert all(a[cursor:].equal(b) for a, b in zip(rows, rest, strict=True))


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_batches_are_full_but_for_the_last(pair, kind):
    sizes = [len(batch.tokens_B) for batch in read(pair[kind], batch_positions=50)]
    assert set(sizes[:-1]) == {50}
    assert sum(sizes) == pair[kind].num_positions


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_batches_can_be_trained_on(pair, kind):
    weight = torch.ones(2, 16, requires_grad=True)
    (read(pair[kind])[0].acts_BLD * weight).sum().backward()
    assert weight.grad is not None


def count_passes(monkeypatch):
    passes = []
    forward = LanguageModel.activations
    monkeypatch.setattr(LanguageModel, "activations", lambda self, *args: passes.append(1) or forward(self, *args))
    return passes


@pytest.mark.parametrize("pair", [(6, 1)], ids=["a-context-a-pass"], indirect=True)
def test_the_stream_computes_the_next_strip_while_this_one_is_consumed(pair, monkeypatch):
    passes = count_passes(monkeypatch)
    counts = [len(passes) for _ in pair[1].batches(batch_positions=10, epoch=0, cursor=0)]
    # A strip is at most 3 generations of 6 contexts of up to 15 kept positions, in 6 passes each; here 2 strips of 2 and 3 of them.
    # The buffer has room for the larger strip; then 10 rows leave room for one or two passes.
    assert 12 <= counts[0] <= 20
    steps = [after - before for before, after in itertools.pairwise(counts)]
    assert max(steps) <= 3
    assert counts[-1] == order_of(pair[1]).num_contexts


def test_resuming_the_stream_computes_at_most_one_strip_again(pair, monkeypatch):
    source, order = pair[1], order_of(pair[1])
    last = EpochOrder(order.rows, source.settings, seed=7, epoch=0).strips[-1]
    assert last.first > 0
    passes = count_passes(monkeypatch)
    list(source.batches(batch_positions=1000, epoch=0, cursor=last.first + 1))
    assert len(passes) == sum(len(order.model_batches(generation)) for generation in last.generations)


def test_the_identity_of_a_stream_follows_what_decides_its_rows(inputs, tmp_path):
    def data_id(**changes):
        settings = StreamedActivations(kind="stream", **harvest_settings(inputs, **changes))
        return open_source(settings, Run(tmp_path / str(len(list(tmp_path.iterdir())))), CPU).data_id

    original = data_id()
    assert original == data_id(statistics_contexts=3)
    shutil.copytree(inputs / "model", tmp_path / "model")
    assert original == data_id(language_model={"model": str(tmp_path / "model"), "device": "auto"})
    changes = [{"seed": 8}, {"layers": ["transformer.h.0"]}, {"drop_positions": []}, {"max_tokens": 9}, {"model_batch_contexts": 3}]
    assert len({original, *(data_id(**change) for change in changes)}) == 1 + len(changes)


def test_identities_are_those_of_before_contexts_could_begin_with_a_token_and_positions_be_left_out(inputs, tmp_path):
    settings = harvest_settings(inputs, outlier_norm_ratio=None)
    source = open_source(StreamedActivations(kind="stream", **settings), Run(tmp_path / "stream"), CPU)
    rows = {key: settings[key] for key in ("layers", "context_tokens", "contexts_per_generation", "model_batch_contexts", "seed")}
    rows |= {"drop_positions": [0], "max_tokens": None}
    rows["language_model"] = {"dtype": "float32", "random_weights": False, "random_weights_seed": 0}
    model = LanguageModel.load(StreamedActivations(kind="stream", **settings).language_model)
    made_from = [rows, TokenSet.open(inputs / "tokens").data_id, model.hash]
    assert source.data_id == hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    cache_activations.run(CacheConfig(name="test", output=tmp_path / "set", **settings), Run(tmp_path / "cache"))
    for name in ("recipe.json", "000000.json", "manifest.json"):
        text = (tmp_path / "set" / name).read_text()
        assert not [word for word in ('"beginning_of_text', '"outlier', '"exclude', '"left_out') if word in text]


def test_a_stop_reaches_into_the_filling_of_the_buffer(inputs, tmp_path):
    run = Run(tmp_path / "run")
    source = open_source(StreamedActivations(kind="stream", **harvest_settings(inputs)), run, CPU)
    batches = source.batches(batch_positions=10, epoch=0, cursor=0)
    next(batches)
    run.request_stop("time is up")
    with pytest.raises(Stopped):
        list(batches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_too_disk_and_stream_give_the_same_batches(inputs, tmp_path):
    settings = harvest_settings(inputs, language_model={"model": str(inputs / "model"), "dtype": "bfloat16"})
    cache_activations.run(CacheConfig(name="test", output=tmp_path / "set", **settings), Run(tmp_path / "cache"))
    gpu = torch.device("cuda")
    disk = open_source(DiskActivations(path=tmp_path / "set", **SHUFFLE), Run(tmp_path / "disk"), gpu)
    streamed = open_source(StreamedActivations(kind="stream", **settings, **SHUFFLE), Run(tmp_path / "stream"), gpu)
    assert_same(read(disk, batch_positions=33, epoch=1), read(streamed, batch_positions=33, epoch=1))
