"""Means and norms of activations: alike from disk and stream, and from parts."""

import activation_pieces
import pytest
import torch
from activation_pieces import CPU, harvest_settings, order_of

from pipeline.activations import layer_sums
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
