"""When an epoch takes which row: all of them once, those of a context far apart, in an order of its own."""

import numpy as np
import pytest
import torch

from pipeline.activations.epoch_order import EpochOrder, batch_sizes, num_before
from pipeline.config.activation_source import Shuffle
from pipeline.config.errors import UserError

CPU = torch.device("cpu")


def epoch_order(rows, *, generations=4, positions=256, seed=3, epoch=0):
    shuffle = Shuffle(shuffle_generations=generations, shuffle_positions=positions)
    return EpochOrder(np.array(rows, np.int64), shuffle, seed=seed, epoch=epoch)


def taken(order):
    """(generation, row) in the order of the epoch, by pools, one row at a time."""
    rows = []
    for strip in order.strips:
        for pool in order.pools(strip):
            stored = [(block.generation, row) for block in pool.blocks for row in range(block.start, block.stop)]
            in_pool = [None] * pool.num_positions
            for place, row in zip(pool.places(CPU).tolist(), stored, strict=True):
                in_pool[place] = row
            assert pool.first == len(rows)
            rows += in_pool
    return rows


SIZES = {"even": [300] * 8, "one": [700], "uneven": [5, 0, 900, 1, 320, 64, 33], "tiny": [1, 1, 1], "empty-first": [0, 7]}


@pytest.mark.parametrize("rows", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("positions", [1, 50, 256, 100_000])
def test_every_row_comes_exactly_once_an_epoch(rows, positions):
    expected = [(generation, row) for generation, num_positions in enumerate(rows) for row in range(num_positions)]
    for epoch in range(3):
        assert sorted(taken(epoch_order(rows, positions=positions, generations=3, epoch=epoch))) == expected


@pytest.mark.parametrize("rows", SIZES.values(), ids=SIZES)
def test_places_of_a_strip_are_those_of_its_pools(rows):
    order = epoch_order(rows, epoch=1)
    in_epoch = []
    for strip in order.strips:
        stored = [(generation, row) for generation in strip.generations for row in range(rows[generation])]
        in_strip = [None] * strip.num_positions
        for place, row in zip(order.places(strip, CPU).tolist(), stored, strict=True):
            in_strip[place] = row
        in_epoch += in_strip
    assert in_epoch == taken(order)


def test_strips_are_even_and_epoch_0_takes_generations_as_they_are_numbered():
    assert [strip.generations for strip in epoch_order([10] * 9).strips] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [(strip.first, strip.last) for strip in epoch_order([10] * 9).strips] == [(0, 30), (30, 60), (60, 90)]
    later = [[g for strip in epoch_order([10] * 9, epoch=epoch).strips for g in strip.generations] for epoch in (1, 2)]
    assert later[0] != later[1]
    assert all(sorted(order) == list(range(9)) for order in later)


def test_pools_are_even_and_hold_each_generation_alike():
    order = epoch_order([1600] * 4)  # blocks of 256 / 16 = 16 rows, 25 pools of 16 blocks
    pools = order.pools(order.strips[0])
    assert [pool.num_positions for pool in pools] == [256] * 25
    for pool in pools:
        assert sorted(block.generation for block in pool.blocks) == sorted([0, 1, 2, 3] * 4)


def test_blocks_lie_one_behind_the_other_on_disk():
    order = epoch_order([100_000] * 2, generations=2, positions=40_000)
    sizes = {block.num_positions for pool in order.pools(order.strips[0]) for block in pool.blocks}
    assert sizes == {2048, 100_000 % 2048}


def test_a_batch_of_a_later_epoch_shares_no_more_with_one_of_an_earlier_than_chance_has_it():
    first, second = (taken(epoch_order([2048] * 8, generations=4, positions=1024, epoch=epoch)) for epoch in (0, 1))
    batch_of = {row: place // 256 for place, row in enumerate(first)}
    most = max(
        np.bincount([batch_of[row] for row in second[start : start + 256]], minlength=64).max() for start in range(0, len(second), 256)
    )
    # A true reshuffle has 4 rows of 256 in common on average, and about 13 at most over all 64 x 64 pairs. Two pools share a few of
    # their 16 blocks, and two of their batches a quarter of the 16 rows that a batch has of a block.
    assert most <= 40


def test_seed_and_epoch_decide_the_order():
    orders = [taken(epoch_order([50] * 6, seed=seed, epoch=epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4
    assert taken(epoch_order([50] * 6, seed=1, epoch=1)) == orders[-1]


def test_the_rest_of_an_epoch():
    order = epoch_order([10] * 9)
    assert [strip.generations for strip in order.strips_from(30)] == [[3, 4, 5], [6, 7, 8]]
    assert [num_before(strip, 35) for strip in order.strips] == [30, 5, 0]
    assert order.strips_from(90) == []
    assert list(batch_sizes(25, 10)) == [10, 10, 5]
    assert list(batch_sizes(0, 10)) == []
    with pytest.raises(UserError, match="the position in the data is 91, but an epoch has 90 positions"):
        order.strips_from(91)
