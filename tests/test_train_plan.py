"""What follows from the step alone: positions, what schedules move; and counters of dead features."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from toy_activations import train_config

from pipeline.config.errors import UserError
from pipeline.config.schedule import Schedule
from pipeline.config.schema import build
from pipeline.config.train_crosscoder import Optimizer
from pipeline.crosscoder.clipping import Clipping
from pipeline.crosscoder.dead_features import count_tokens, dead_features, firings, firings_by_norm
from pipeline.crosscoder.plan import Place, Plan
from pipeline.crosscoder.schedules import factor, scheduled_numbers


def test_the_plan_of_three_and_a_half_epochs_by_hand() -> None:
    # 10 positions an epoch in batches of 4: 4, 4, 2; then 4 and 1 of the last one: 35 in all.
    plan = Plan.of(train_config(num_tokens=35, batch_positions=4), 10)
    assert plan.num_steps == 11
    assert [plan.positions_in(step) for step in range(1, 12)] == [4, 4, 2, 4, 4, 2, 4, 4, 2, 4, 1]
    assert plan.place_after(3) == Place(epoch=1, cursor=0)
    assert plan.place_after(4) == Place(epoch=1, cursor=4)
    assert plan.tokens_after(11) == 35


@pytest.mark.parametrize(("epoch_positions", "batch", "num_tokens"), [(7, 7, 7), (7, 3, 20), (5, 9, 12), (100, 1, 30), (64, 8, 128)])
def test_steps_add_up_to_the_tokens_asked_for(epoch_positions: int, batch: int, num_tokens: int) -> None:
    plan = Plan(epoch_positions, batch, num_tokens, 1)
    sizes = [plan.positions_in(step) for step in range(1, plan.num_steps + 1)]
    assert sum(sizes) == num_tokens
    assert 1 <= min(sizes) <= max(sizes) <= batch


def test_epochs_are_counted_in_the_positions_that_the_activations_hold() -> None:
    assert Plan.of(train_config(num_tokens=None, epochs=3), 40).num_tokens == 120


def test_activations_without_positions_are_refused() -> None:
    with pytest.raises(UserError, match="hold no positions to train on"):
        Plan.of(train_config(), 0)


def test_num_tokens_and_epochs_exclude_each_other() -> None:
    for length in ({"num_tokens": 5, "epochs": 1}, {"num_tokens": None, "epochs": None}):
        with pytest.raises(UserError, match=r"toy\.yaml: give either num_tokens or epochs"):
            train_config(**length)


def test_as_many_features_a_position_as_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"activation_function\.k is 16, expected less than num_features, 16"):
        train_config(crosscoder={"num_features": 16, "activation_function": {"kind": "batch_topk", "k": 16}})


def test_the_learning_rate_rises_stays_and_falls_by_hand() -> None:
    schedule = Schedule(warmup_fraction=0.4, decay="linear", decay_fraction=0.3)
    found = [factor(schedule, step, 10) for step in range(1, 11)]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_a_cosine_falls_to_the_final_fraction() -> None:
    schedule = Schedule(decay="cosine", decay_fraction=1.0, final_fraction=0.1)
    found = [2.0 * factor(schedule, step, 999) for step in range(1, 1000)]
    assert found == sorted(found, reverse=True)
    assert found[499] == pytest.approx(2.0 * 0.55)
    assert found[-1] == pytest.approx(0.2, rel=1e-4)


def test_the_default_schedule_changes_nothing() -> None:
    assert {factor(Schedule(), step, 50) for step in range(1, 51)} == {1.0}


def test_a_schedule_above_one_anneals_by_hand() -> None:
    schedule = Schedule(initial_fraction=5.0, warmup_fraction=0.4)
    assert [factor(schedule, step, 10) for step in range(1, 7)] == pytest.approx([4, 3, 2, 1, 1, 1])


def test_changing_one_field_of_the_learning_rates_schedule_keeps_the_others() -> None:
    schedule = train_config(optimizer={"schedule": {"warmup_fraction": 0.1}}).optimizer.schedule
    assert (schedule.warmup_fraction, schedule.decay, schedule.decay_fraction) == (0.1, "linear", 0.2)


def test_everything_that_a_schedule_moves_is_named_with_its_value() -> None:
    crosscoder = {
        "num_features": 16,
        "activation_function": {"kind": "batch_topk", "k": 2, "k_schedule": {"initial_fraction": 4, "warmup_fraction": 0.5}},
    }
    loss = {"l1": {"coefficient": 2.0, "schedule": {"warmup_fraction": 0.5}}}
    config = train_config(
        crosscoder=crosscoder, loss=loss, layer_mask_rate=0.2, optimizer={"learning_rate": 0.1, "schedule": {"warmup_fraction": 0.0}}
    )
    found = scheduled_numbers(config, 2, 8)
    assert found == {"learning_rate": 0.1, "coefficient_l1": 1.0, "k": 5, "layer_mask_rate": 0.2}


def test_the_window_of_dead_features_is_a_tenth_of_the_run_and_ten_million_at_most() -> None:
    windows = [
        Plan.of(train_config(num_tokens=tokens, dead_window_tokens=None), 1000).dead_window_tokens for tokens in (100, 30_000_000, 10**9)
    ]
    assert windows == [32, 3_000_000, 10_000_000]
    assert Plan.of(train_config(dead_window_tokens=77), 1000).dead_window_tokens == 77


def test_phases_that_overlap_are_refused() -> None:
    with pytest.raises(UserError, match="warmup_fraction and decay_fraction add up to more than 1"):
        train_config(optimizer={"schedule": {"warmup_fraction": 0.5, "decay_fraction": 0.6}})


def test_a_coefficient_rises_linearly() -> None:
    loss = {"l1": {"coefficient": 2.0, "schedule": {"warmup_fraction": 0.5}}}
    found = [scheduled_numbers(train_config(loss=loss), step, 8)["coefficient_l1"] for step in range(1, 9)]
    assert found == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_dead_counters_by_hand() -> None:
    counters_F = torch.zeros(3, dtype=torch.int64)
    fired = torch.tensor([[0.0, 2.0, 0.0], [0.0, 1.0, 0.5]])
    assert firings(fired).tolist() == [0.0, 2.0, 1.0]
    count_tokens(counters_F, firings(fired), 2)
    assert counters_F.tolist() == [2, 0, 0]
    count_tokens(counters_F, torch.tensor([0.0, 0.0, 4.0]), 5)
    assert counters_F.tolist() == [7, 5, 0]
    assert dead_features(counters_F, 5).tolist() == [0, 1]
    assert dead_features(counters_F, 6).tolist() == [0]
    assert dead_features(counters_F, 8).tolist() == []


@pytest.mark.parametrize("count", [firings, firings_by_norm])
def test_firings_count_every_position_in_low_precision_too(count: Callable[[Tensor], Tensor]) -> None:
    assert count(torch.full((5000, 2), 0.01, dtype=torch.bfloat16)).tolist() == [5000.0, 5000.0]


def test_both_ways_of_counting_firings_agree() -> None:
    features_BF = torch.relu(torch.randn(40, 9, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(firings(features_BF), firings_by_norm(features_BF))
    assert torch.equal(firings(features_BF), (features_BF > 0).sum(0).float())


def clipped(kind: dict[str, object], norms: list[float]) -> list[float]:
    """The norms of a sequence of gradients after clipping."""
    clipping = Clipping(build(Optimizer, {"clipping": kind}, "test").clipping)
    found = []
    for norm in norms:
        parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
        for parameter, gradient in zip(parameters, ([0.6 * norm, 0.0], [0.8 * norm]), strict=True):
            parameter.grad = torch.tensor(gradient)
        clipping.clip(parameters)
        found.append(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)))
    return found


def test_what_each_kind_of_clipping_leaves_of_a_gradients_norm_by_hand() -> None:
    norms = [8.0, 2.0, 40.0, 0.5]
    assert clipped({"kind": "none"}, norms) == pytest.approx(norms)
    assert clipped({"kind": "normalized"}, norms) == pytest.approx([1.0] * 4)
    assert clipped({"kind": "absolute", "norm": 3.0}, norms) == pytest.approx([3.0, 2.0, 3.0, 0.5])
    # The mean of 8 and 2 is 5: twice that is the limit of the third.
    assert clipped({"kind": "relative", "factor": 2.0}, norms) == pytest.approx([8.0, 2.0, 10.0, 0.5])


def test_a_normalized_gradient_of_zero_stays_zero() -> None:
    assert clipped({"kind": "normalized"}, [0.0]) == [0.0]
