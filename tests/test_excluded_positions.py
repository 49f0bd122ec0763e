"""Positions left out for their norm or token: the same ones from disk and stream, in no batch, no statistics and no measure."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from activation_pieces import CPU, SHUFFLE, harvest_settings, read
from tiny_models import tiny_gpt2, tiny_token_set
from toy_activations import VARIANTS

from pipeline import records
from pipeline.activations import harvest
from pipeline.activations.harvest import Harvester
from pipeline.activations.held_out_rows import held_out_rows
from pipeline.activations.left_out import LeftOut, rows_between
from pipeline.activations.opening import open_source
from pipeline.config.activation_source import DiskActivations, StreamedActivations
from pipeline.config.cache_activations import CacheConfig
from pipeline.config.errors import UserError
from pipeline.config.schema import build
from pipeline.config.train_crosscoder import HeldOut, TrainConfig
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.language_model import LanguageModel
from pipeline.run import Run, Stopped
from pipeline.stages import cache_activations, train_crosscoder
from pipeline.tokens import TokenSet

SINK, EXCLUDED = 118, 7
"""An id whose embedding is 300 times as large, and one whose positions are left out by `exclude_token_ids`."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    tiny_gpt2(directory / "model", vocab_size=150)
    model = transformers.GPT2LMHeadModel.from_pretrained(directory / "model")
    with torch.no_grad():
        model.get_input_embeddings().weight[SINK] *= 300
    model.save_pretrained(directory / "model")
    tiny_token_set(directory / "tokens", num_documents=30, vocab_size=150)
    tiny_token_set(directory / "held-out", num_documents=10, vocab_size=150, seed=3)
    return directory


def opened(inputs, directory, **changes):
    """The activations of these settings on disk and as a stream."""
    settings = harvest_settings(inputs, **changes)
    result = cache_activations.run(CacheConfig(name="test", output=directory / "set", **settings), Run(directory / "cache"))
    disk = open_source(DiskActivations(path=directory / "set", **SHUFFLE), Run(directory / "disk"), CPU)
    return disk, streamed(inputs, directory, **changes), result


def streamed(inputs, directory, **changes):
    config = StreamedActivations(kind="stream", statistics_contexts=10_000, **harvest_settings(inputs, **changes), **SHUFFLE)
    return open_source(config, Run(directory / "stream"), CPU)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The stream of all positions."""
    return streamed(inputs, tmp_path_factory.mktemp("whole"), outlier_norm_ratio=None)


@pytest.fixture(scope="module")
def pair(inputs, tmp_path_factory):
    return opened(inputs, tmp_path_factory.mktemp("pair"), exclude_token_ids=[EXCLUDED])


def limits(source):
    """Ten times the lower median of the norms at each layer, by sorting, of all positions that have another token."""
    (everything,) = read(source, batch_positions=source.num_positions)
    norms_NL = everything.acts_BLD[everything.tokens_B != EXCLUDED].double().norm(dim=-1).sort(0).values
    return 10 * norms_NL[(len(norms_NL) - 1) // 2]


def kept(batch, norms_L):
    """Which rows of a batch of all positions are to be there."""
    return (batch.tokens_B != EXCLUDED) & (batch.acts_BLD.double().norm(dim=-1) <= norms_L).all(1)


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert all(x.equal(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_every_batch_has_the_rows_of_its_positions_but_those_left_out(pair, whole, kind):
    norms_L, source, left_out = limits(whole), pair[kind], 0
    assert source.provenance.outlier_norms == pytest.approx(norms_L.tolist(), rel=1e-6)
    assert source.num_positions == whole.num_positions
    for epoch, batch_positions in ((0, 50), (1, 33), (0, 10_000), (2, 1)):
        found, everything = (read(s, batch_positions=batch_positions, epoch=epoch) for s in (source, whole))
        for batch, of_all in zip(found, everything, strict=True):
            rows_B = kept(of_all, norms_L)
            assert all(column.equal(wanted[rows_B]) for column, wanted in zip(batch, of_all, strict=True))
            left_out += int((~rows_B).sum())
    assert left_out > 0


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_resumed_at_any_cursor_is_the_same_as_uninterrupted(pair, kind):
    source = pair[kind]
    uninterrupted = read(source, batch_positions=30, epoch=1)
    for number in range(len(uninterrupted) + 1):
        rest = read(source, batch_positions=30, epoch=1, cursor=min(30 * number, source.num_positions))
        assert_same(rest, uninterrupted[number:])


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_statistics_are_of_the_rows(pair, kind):
    rows = torch.cat([batch.acts_BLD for batch in read(pair[kind])]).double()
    statistics = pair[kind].statistics
    assert statistics.num_positions == len(rows) < pair[kind].num_positions
    torch.testing.assert_close(statistics.mean_LD, rows.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(statistics.mean_squared_norm_L, rows.square().sum(-1).mean(0), rtol=1e-12, atol=0)


def test_limits_are_of_the_leading_model_batches_alone(inputs, monkeypatch):
    monkeypatch.setattr(harvest, "LEADING_TOKENS", 100)
    settings = StreamedActivations(kind="stream", **harvest_settings(inputs))
    model = LanguageModel.load(settings.language_model)
    harvester = Harvester(TokenSet.open(inputs / "tokens"), model, settings, lambda: None)
    batches = [made.rows.acts_BLD for generation in range(3) for made in harvester.rows(generation)]
    before = [sum(map(len, batches[:number])) for number in range(len(batches))]
    leading = [batch for batch, num_before in zip(batches, before, strict=True) if num_before < 100]
    assert 1 < len(leading) < len(batches)
    norms_NL = torch.cat(leading).double().norm(dim=-1).sort(0).values
    passes, said = [], []
    monkeypatch.setattr(harvester, "_check_stop", lambda: passes.append(1))
    assert harvester.measured_norms(said.append) == pytest.approx((10 * norms_NL[(len(norms_NL) - 1) // 2]).tolist(), rel=1e-6)
    assert (len(passes), len(said)) == (len(leading), 1)


def test_records_count_what_is_left_out_and_what_it_holds(pair, whole):
    disk, _, result = pair
    (everything,) = read(whole, batch_positions=whole.num_positions)
    excluded = everything.tokens_B == EXCLUDED
    outliers = ~kept(everything, limits(whole)) & ~excluded
    manifest = records.read_manifest(disk.directory)
    assert (manifest["left_out"]["by_token"], manifest["left_out"]["by_norm"]) == (int(excluded.sum()), int(outliers.sum()))
    assert 0 < int(outliers.sum()) == int((everything.tokens_B == SINK).sum())
    held_L = everything.acts_BLD[outliers].double().square().sum((0, 2))
    assert manifest["left_out"]["sum_squared_norm"] == pytest.approx(held_L.tolist(), rel=1e-12)
    assert (manifest["outlier_norms"], manifest["exclude_token_ids"]) == (disk.provenance.outlier_norms, [EXCLUDED])
    assert result["left_out"] == int(excluded.sum() + outliers.sum()) == whole.num_positions - result["positions"]
    assert records.read_recipe(disk.directory)["inputs"]["outlier_norms"] == disk.provenance.outlier_norms
    for path in sorted(disk.directory.glob("*.safetensors")):
        columns = safetensors.numpy.load_file(path)
        record = records.read_json(path.with_suffix(".json"))
        assert len(columns.get("left_out", [])) == record["left_out"]["by_token"] + record["left_out"]["by_norm"]
        assert len(columns["token"]) == record["num_positions"]
        assert not set(columns["token"].tolist()) & {SINK, EXCLUDED}


def test_the_log_says_what_is_left_out_and_what_it_holds(inputs, tmp_path, whole, capsys):
    opened(inputs, tmp_path)
    said = capsys.readouterr().out
    (everything,) = read(whole, batch_positions=whole.num_positions)
    squares_NL, sink_N = everything.acts_BLD.double().square().sum(-1), everything.tokens_B == SINK
    first, second = (100 * squares_NL[sink_N].sum(0) / squares_NL.sum(0)).tolist()
    held = f"of |x|^2 they hold {first:.3g} % at transformer.h.1, {second:.3g} % at transformer.h.0"
    wanted = f"{int(sink_N.sum()):,} of {whole.num_positions:,} positions left out for their norm; {held}"
    assert said.count(f"leading contexts: {wanted}\n") == 2, "of disk and stream"
    assert said.count(f"\n{wanted}\n") == 1, "once the set is sealed"
    limits_L = [f"{norm:,.4g}" for norm in (10 * squares_NL.sqrt().sort(0).values[(len(squares_NL) - 1) // 2]).tolist()]
    assert f"positions whose norm is over {limits_L[0]} at transformer.h.1, {limits_L[1]} at transformer.h.0 (10 times the median)" in said


def test_a_shard_made_again_has_the_same_bytes_by_the_limits_of_the_recipe(inputs, tmp_path, monkeypatch):
    settings = CacheConfig(name="test", output=tmp_path / "set", **harvest_settings(inputs))
    first = cache_activations.run(settings, Run(tmp_path / "one"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").glob("*.safetensors")}
    for name in ("000001.json", "000001.safetensors", "manifest.json"):
        (tmp_path / "set" / name).unlink()
    # As on a machine that rounds otherwise.
    monkeypatch.setattr(Harvester, "measured_norms", lambda *_: [1e-9, 1e-9])
    assert cache_activations.run(settings, Run(tmp_path / "two"))["data_id"] == first["data_id"]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "set").glob("*.safetensors")}


def test_a_stream_that_goes_on_keeps_the_limits_that_it_began_with(inputs, tmp_path, monkeypatch):
    first = streamed(inputs, tmp_path)
    monkeypatch.setattr(Harvester, "measured_norms", lambda *_: [1e-9, 1e-9])
    assert streamed(inputs, tmp_path).provenance == first.provenance
    assert_same(read(streamed(inputs, tmp_path)), read(first))


def test_a_stream_that_goes_on_has_the_statistics_that_it_began_with_and_computes_none(inputs, tmp_path, monkeypatch):
    first = streamed(inputs, tmp_path).statistics
    others = {"seed": 8}, {"outlier_norm_ratio": None}
    recomputed = [streamed(inputs, tmp_path / f"other-{number}", **change).statistics for number, change in enumerate(others)]
    monkeypatch.setattr(Harvester, "rows", lambda *_: pytest.fail("the model was run"))
    again = streamed(inputs, tmp_path).statistics
    assert again.to_json() == first.to_json()
    assert all(statistics.to_json() != first.to_json() for statistics in recomputed)
    with pytest.raises(pytest.fail.Exception, match="the model was run"):  # what lies there is of other rows
        _ = streamed(inputs, tmp_path, seed=8).statistics


def test_settings_of_what_is_left_out_are_part_of_the_identity(inputs, tmp_path):
    changes = [{}, {"outlier_norm_ratio": 9.0}, {"outlier_norm_ratio": None}, {"exclude_token_ids": [1]}]
    ids = {streamed(inputs, tmp_path / str(number), **change).data_id for number, change in enumerate(changes)}
    assert len(ids) == len(changes)


def test_an_id_that_the_model_does_not_have_is_refused(inputs, tmp_path):
    with pytest.raises(UserError, match=r"exclude_token_ids\[1\] is 150, but .* has the ids 0 to 149"):
        streamed(inputs, tmp_path, exclude_token_ids=[3, 150])


def test_where_every_token_is_excluded_nothing_could_be_read(inputs, tmp_path):
    with pytest.raises(UserError, match="no position left when those of exclude_token_ids are left out"):
        streamed(inputs, tmp_path, exclude_token_ids=list(range(150)))


def test_held_out_positions_are_left_out_by_the_same_limits(inputs, tmp_path, pair):
    disk = pair[0]
    settings = harvest_settings(inputs)
    held_out = build(
        HeldOut, {"tokens": str(inputs / "held-out"), "language_model": settings["language_model"], "positions": 10_000}, "train.yaml"
    )
    rows = held_out_rows(held_out, disk, Run(tmp_path / "run"), CPU, seed=0)
    assert EXCLUDED not in rows.tokens_B
    assert SINK not in rows.tokens_B
    norms_L = torch.tensor(disk.provenance.outlier_norms)
    assert bool((rows.acts_BLD.norm(dim=-1) <= norms_L).all())
    everything = records.read_manifest(inputs / "held-out")["tokens"]
    assert len(rows.tokens_B) > 0.8 * everything


def test_places_and_rows_by_hand():
    left_out = LeftOut(np.array([0, 3, 4]), 1, 2, [1.0])
    assert [rows_between(left_out.places, *ends) for ends in ((0, 6), (1, 3), (3, 5), (5, 6))] == [(0, 3), (0, 2), (2, 2), (2, 3)]
    assert [left_out.kept_between(*ends).tolist() for ends in ((0, 6), (1, 3), (3, 5), (2, 6))] == [[1, 2, 5], [0, 1], [], [0, 3]]


# -- training on them -----------------------------------------------------------------------------------------------------------


def training(activations, **changes):
    course = {"epochs": 2, "batch_positions": 50, "dead_window_tokens": 300, "log_every_steps": 1, "device": "cpu"}
    values = {"stage": "train", "name": "toy", "activations": activations, **VARIANTS["batch_topk"], **course}
    return build(TrainConfig, values | changes, "train.yaml")


def stream_settings(inputs, **changes):
    settings = harvest_settings(inputs, exclude_token_ids=[EXCLUDED], **changes)
    return {"kind": "stream", **settings, **SHUFFLE, "tokens": str(inputs / "tokens"), "statistics_contexts": 10_000}


class StoppedAfter(Run):
    """A run that is asked to stop after so many reports of training."""

    num_left = 7

    def report(self, phase, *rest, **more):
        super().report(phase, *rest, **more)
        if phase == "train":
            self.num_left -= 1
            if self.num_left == 0:
                self.request_stop("test")


def test_training_is_the_same_from_disk_from_the_stream_and_after_a_stop(inputs, tmp_path, pair):
    disk = {"kind": "disk", "path": str(pair[0].directory), **SHUFFLE}
    found = {}
    for kind, activations in (("disk", disk), ("stream", stream_settings(inputs))):
        found[kind] = train_crosscoder.run(training(activations), Run(tmp_path / kind, stage="train"))
    stopped = StoppedAfter(tmp_path / "stopped", stage="train")
    with pytest.raises(Stopped):
        train_crosscoder.run(training(stream_settings(inputs)), stopped)
    found["stopped"] = train_crosscoder.run(training(stream_settings(inputs)), Run(tmp_path / "stopped", stage="train"))
    manifest = records.read_manifest(pair[0].directory)
    left_out = 2 * (manifest["left_out"]["by_token"] + manifest["left_out"]["by_norm"])
    assert {kind: result["left_out"] for kind, result in found.items()} == dict.fromkeys(found, left_out)
    weights = {kind: load_crosscoder(tmp_path / kind).crosscoder.state_dict() for kind in found}
    for name, tensor in weights["disk"].items():
        assert weights["stream"][name].equal(weights["stopped"][name]), name
        torch.testing.assert_close(weights["stream"][name], tensor, rtol=1e-4, atol=1e-6)
    provenance = load_crosscoder(tmp_path / "stream").provenance
    assert (provenance.outlier_norms, provenance.exclude_token_ids) == (pair[0].provenance.outlier_norms, [EXCLUDED])


def test_a_batch_without_a_row_changes_nothing_but_the_step(inputs, tmp_path):
    others = [token for token in range(150) if token % 2]
    activations = stream_settings(inputs) | {"exclude_token_ids": others, "max_tokens": 40}
    run = Run(tmp_path / "run", stage="train")
    result = train_crosscoder.run(training(activations, batch_positions=1, epochs=1, dead_window_tokens=1000), run)
    assert result["steps"] == result["tokens"] == 40
    assert 0 < result["left_out"] < 40
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 40 - result["left_out"]
    # Every row is of one position, so that each has the 2 features that TopK over the batch lets through, at most.
    assert all(row["l0"] <= 2 for row in rows)
    since_F = load_crosscoder(run.directory).tokens_since_fired_F
    assert int(since_F.max()) <= 40 - result["left_out"]
