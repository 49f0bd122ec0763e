"""The computed permutation is one, is fair, and depends on seed and stream."""

import pytest
import torch

from pipeline.permutation import Permutation, _scramble


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 16, 17, 97, 100, 101, 1000, 1023, 1024, 1025, 65_537])
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3])
def test_every_number_is_met_exactly_once(n, seed):
    assert Permutation(n, seed=seed).all().sort().values.equal(torch.arange(n))


def test_every_n_up_to_three_hundred_is_permuted():
    for n in range(300):
        assert Permutation(n, seed=n).all().sort().values.equal(torch.arange(n))


def test_a_part_is_computed_as_in_the_whole():
    permutation = Permutation(10_007, seed=5)
    assert permutation(torch.tensor([9_999, 0, 77])).equal(permutation.all()[[9_999, 0, 77]])


def test_the_values_stay_what_they_were_when_data_sets_were_made():
    # A change here would silently reorder every activation set and every stream that is resumed.
    assert Permutation(10, seed=0).all().tolist() == [1, 8, 5, 6, 9, 2, 4, 0, 3, 7]
    # splitmix64 of Vigna's reference implementation: the first output for seed 0 is the finalizer of the increment.
    increment = torch.tensor(0x9E3779B97F4A7C15 - (1 << 64))
    assert int(_scramble(increment)) & (2**64 - 1) == 0xE220A8397B1DCDAF


def test_seeds_and_streams_give_unrelated_orders():
    orders = [Permutation(5_000, seed=seed, stream=stream).all() for seed in range(4) for stream in range(4)]
    for index, one in enumerate(orders):
        for other in orders[:index]:
            assert int((one == other).sum()) < 10  # of unrelated orders about 1 place agrees


@pytest.mark.parametrize("n", [12, 100, 1000])
def test_each_number_goes_everywhere_equally_often(n):
    # Over many seeds the image of a place is uniform: chi-squared over ten equal bins, 9 degrees of freedom, below 40 (p = 1e-5).
    num_seeds = 600
    for place in (0, 1, n // 2, n - 1):
        images = torch.stack([Permutation(n, seed=seed)(torch.tensor(place)) for seed in range(num_seeds)])
        bins = torch.bincount(images * 10 // n, minlength=10)
        expected = torch.bincount(torch.arange(n) * 10 // n, minlength=10) * num_seeds / n
        assert float(((bins - expected) ** 2 / expected).sum()) < 40


def test_neighbours_are_torn_apart():
    # A random permutation keeps |p(i+1) - p(i)| above n/3 on average, and about 1 pair in 5,000 adjacent.
    n = 10_000
    steps = Permutation(n, seed=3).all().diff().abs()
    assert abs(float(steps.double().mean()) / n - 1 / 3) < 0.02
    assert int((steps == 1).sum()) < 12


def test_a_negative_number_of_things_is_refused():
    with pytest.raises(ValueError, match="-1"):
        Permutation(-1, seed=0)
