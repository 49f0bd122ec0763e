"""The verdict: which baseline is the strongest, and which the crosscoder beats, in nats and in explained variance."""

import pytest
from evaluation_verdict import COSTS, EXPLAINED, RANKS, SWEEP, found

from pipeline.evaluation.threshold_sweep import SweepPoint
from pipeline.evaluation.verdict import best_of_baselines, compare, number, verdict


def test_the_verdict_names_the_strongest_baseline_and_what_is_beaten() -> None:
    first, second, third, fourth = verdict(found(COSTS, EXPLAINED), ranks=RANKS, ranks_needed=[105])
    assert first == (
        "h.2: WORSE than the strongest baseline by nats: the crosscoder costs 0.1470, an affine map from h.3 0.0440. It beats h.3 as it "
        "is, PCA of rank 32, the mean and zeros; not an affine map from h.3."
    )
    assert second == (
        "  WORSE by explained variance: the crosscoder's is 0.9160, that of an affine map from h.3 0.9390. It beats h.3 as it is, a "
        "random dictionary, the mean and zeros; not an affine map from h.3 and PCA of rank 32."
    )
    assert third == "  A PCA explains as much from rank 105 on."
    # 0.939 is 0.3 of the way from 0.936 at 40 to 0.946 at 60.
    assert fourth == "  With its thresholds moved it would explain more than an affine map from h.3 (0.9390) at L0 46.0."


def test_at_which_l0_it_would_be_better_or_that_it_would_be_at_none() -> None:
    def last(sweep: list[SweepPoint], affine: float = 0.95) -> str:
        return verdict(found(COSTS, EXPLAINED | {"affine": affine}, sweep), ranks=RANKS, ranks_needed=[None])[-1]

    falling = [*SWEEP, SweepPoint(0.1, 90.0, {"h.2": 0.7})]
    assert last(falling) == (
        "  With its thresholds lowered it explains more than an affine map from h.3 (0.9500) at no L0 up to 90.0: it explains most, "
        "0.9460, at L0 60.0."
    )
    own = last(SWEEP[:1])
    assert own == "  It has no thresholds to lower, so it explains more than an affine map from h.3 at no L0 up to its own, 30.0."
    assert last(SWEEP, 0.0).endswith("than PCA of rank 32 (0.9200) at L0 32.0."), "another is the strongest then"


def test_another_run_is_named_as_what_it_is() -> None:
    explained = EXPLAINED | {"compared": 0.95}
    first, second, *_ = verdict(found(COSTS | {"compared": 0.01}, explained), ranks=RANKS, ranks_needed=[None])
    assert "costs 0.1470, one-each (sparse autoencoders a layer, L0 1.50) 0.0100." in first
    assert "that of one-each (sparse autoencoders a layer, L0 1.50) 0.9500." in second


def test_a_crosscoder_that_beats_all_is_called_better() -> None:
    first, second = verdict(found(COSTS | {"crosscoder": 0.01}, EXPLAINED | {"crosscoder": 0.99}), ranks=RANKS, ranks_needed=[None])
    assert first.startswith("h.2: BETTER than the strongest baseline by nats: the crosscoder costs 0.0100, an affine map from h.3 0.0440.")
    assert first.endswith("It beats all: an affine map from h.3, h.3 as it is, PCA of rank 32, the mean and zeros.")
    assert second.startswith(
        "  BETTER by explained variance: the crosscoder's is 0.9900, that of an affine map from h.3 0.9390. It beats all: "
    )


def test_nats_and_explained_variance_may_name_different_baselines() -> None:
    costs = COSTS | {"other_layer": 0.01}
    nats, explained = compare(found(costs, EXPLAINED), "h.2", RANKS)
    assert nats.best == ("h.3 as it is", 0.01)
    assert explained.best == ("an affine map from h.3", 0.939)
    assert nats.not_beaten == ["an affine map from h.3", "h.3 as it is"]


def test_one_that_beats_nothing_says_so() -> None:
    first, second, _ = verdict(found(COSTS | {"crosscoder": 9.0}, EXPLAINED | {"crosscoder": -1.0}), ranks=RANKS, ranks_needed=[None])
    assert first.endswith("It beats none.")
    assert second.endswith("It beats none.")


def test_equal_figures_are_not_better() -> None:
    nats, _ = compare(found({"crosscoder": 0.5, "mean": 0.5, "zero": 0.5}, EXPLAINED), "h.2", RANKS)
    assert not nats.is_better


def test_activations_that_never_vary_have_no_verdict_by_variance() -> None:
    _, second = verdict(found(COSTS, dict.fromkeys(EXPLAINED)), ranks=RANKS, ranks_needed=[None])
    assert second == "  No explained variance: the activations never vary here."


def test_the_best_baselines_are_of_each_layer_ablations_and_compared_runs_aside() -> None:
    nats, explained = best_of_baselines(found(COSTS | {"compared": 0.001}, EXPLAINED | {"dense_path": 0.99}))
    assert (nats, explained) == (pytest.approx(0.044), pytest.approx(0.939))
    assert best_of_baselines(found({"crosscoder": 0.1, "mean": 2.0, "zero": 3.0}, {"crosscoder": 0.5, "mean": 0.0})) == (None, None)


def test_numbers_are_short_and_never_minus_zero() -> None:
    assert number(None) == "-"
    assert number(-1e-9) == "0.0000"
    assert number(-12345.678) == "-1.23e+04"
