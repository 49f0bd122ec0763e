"""Means and norms of activations: alike from disk and stream, and from parts."""

import activation_pieces
import pytest
import torch
from activation_pieces import CPU, harvest_settings, order_of

from pipeline.activations import layer_sums
from pipeline.activations.halves import Halves
from pipeline.activations.opening import open_source
from pipeline.activations.shards import ActivationSet
from pipeline.activations.source import LayerStatistics
from pipeline.config.activation_source import StreamedActivations
from pipeline.config.cache_activations import CacheConfig
from pipeline.run import Run
from pipeline.stages import cache_activations

inputs, pair = activation_pieces.inputs, activation_pieces.pair


def test_statistics_of_a_stream_over_all_contexts_are_those_on_disk(inputs, tmp_path, pair):
    settings = StreamedActivations(kind="stream", statistics_contexts=10_000, **harvest_settings(inputs))
    streamed = open_source(settings, Run(tmp_path / "all"), CPU).statistics
    disk = pair[0].statistics
    assert streamed.num_positions == disk.num_positions
    torch.testing.assert_close(streamed.mean_LD, disk.mean_LD, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(streamed.mean_squared_norm_L, disk.mean_squared_norm_L, rtol=1e-12, atol=0)


@pytest.mark.parametrize("place", ["disk", "stream"])
def test_statistics_leave_position_0_out_even_where_it_is_kept(inputs, tmp_path, place):
    settings = harvest_settings(inputs, drop_positions=[])
    if place == "disk":
        cache_activations.run(CacheConfig(name="test", output=tmp_path / "set", **settings), Run(tmp_path / "run"))
        source = ActivationSet.open(tmp_path / "set", CPU)
    else:
        source = open_source(StreamedActivations(kind="stream", statistics_contexts=10_000, **settings), Run(tmp_path / "run"), CPU)
    rows = next(iter(source.batches(batch_positions=source.num_positions, epoch=0, cursor=0)))
    assert len(rows.acts_BLD) == source.num_positions
    counted = rows.acts_BLD[rows.positions_B > 0].double()
    assert source.statistics.num_positions == len(counted) < source.num_positions
    torch.testing.assert_close(source.statistics.mean_LD, counted.mean(0), rtol=1e-10, atol=1e-12)


def test_statistics_of_a_stream_are_of_its_leading_contexts(inputs, tmp_path):
    settings = StreamedActivations(kind="stream", statistics_contexts=8, **harvest_settings(inputs))
    source = open_source(settings, Run(tmp_path / "run"), CPU)
    batches = order_of(source).model_batches(0) + order_of(source).model_batches(1)
    # 4 + 2 contexts of the first generation, then 4 of the second: whole model batches, until 8 are reached.
    assert source.statistics.num_positions == sum(batch.num_rows for batch in batches[:3])


def test_a_stream_warns_where_the_limit_comes_before_the_halves_agree(inputs, tmp_path, capsys):
    settings = StreamedActivations(kind="stream", statistics_contexts=8, **harvest_settings(inputs))
    source = open_source(settings, Run(tmp_path / "run"), CPU)
    capsys.readouterr()
    _ = source.statistics
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert "warning: statistics: halves differ by" in said
    assert "at 10 contexts" in said
    assert "set statistics_contexts higher than 8" in said


def test_the_disagreement_of_halves_is_that_of_two_separate_samples():
    acts_BLD = torch.randn(600, 2, 5, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1.0], [30.0]]) + 2
    halves = Halves(2, 5)
    for part_BLD in acts_BLD.split(100):
        halves.add(part_BLD, num_contexts=1)
    parts = acts_BLD.double().unflatten(0, (6, 100))
    first, second = parts[0::2].flatten(0, 1), parts[1::2].flatten(0, 1)
    scales = [(half - half.mean(0)).square().sum(-1).mean(0).sqrt() for half in (first, second)]
    means = (first.mean(0) - second.mean(0)).norm(dim=-1)
    both = acts_BLD.double()
    scale = (both - both.mean(0)).square().sum(-1).mean(0).sqrt()
    expected = max(((scales[0] - scales[1]).abs() / scale).max(), (means / scale).max())
    assert halves.disagreement() == pytest.approx(float(expected), rel=1e-9)


def test_a_sample_doubles_until_its_halves_agree():
    def contexts_until_agreement(outlier_at):
        halves = Halves(1, 2)
        # 10 contexts a batch, each with mean 0 and scale 1; one batch is 40 times the others.
        for batch in range(100):
            acts_BLD = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]]) * (40 if batch == outlier_at else 1)
            halves.add(acts_BLD, num_contexts=10)
            if halves.agree():
                return halves.num_contexts
        return None

    assert contexts_until_agreement(None) == 70  # the first whole model batch past 64
    assert contexts_until_agreement(7) == 70  # an outlier that comes after the look is not seen
    assert contexts_until_agreement(3) is None
    assert Halves(1, 2).disagreement() == float("inf")


def test_halves_of_a_constant_layer_agree():
    halves = Halves(1, 2)
    for _ in range(2):
        halves.add(torch.full((8, 1, 2), 3.0), num_contexts=32)
    assert halves.agree()


def test_sums_of_parts_are_the_sums_of_the_whole():
    acts_BLD = torch.randn(10_000, 2, 3, generator=torch.Generator().manual_seed(0))
    whole, parts = layer_sums.LayerSums(2, 3), [layer_sums.LayerSums(2, 3) for _ in range(2)]
    whole.add(acts_BLD)
    for part, acts in zip(parts, acts_BLD.split(7_000), strict=True):
        part.add(acts)
    joint = layer_sums.statistics_of(part.to_json() for part in parts)
    torch.testing.assert_close(joint.mean_LD, acts_BLD.double().mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(joint.mean_squared_norm_L, whole.statistics().mean_squared_norm_L, rtol=1e-12, atol=0)
    kept = LayerStatistics.from_json(joint.to_json())
    assert kept.mean_LD.equal(joint.mean_LD)
    assert kept.num_positions == 10_000
