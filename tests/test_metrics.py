"""Every evaluation metric: numbers worked by hand, a slow formula position by position, and what must always hold."""

import math
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.crosscoder import metrics
from pipeline.crosscoder.metrics import FiringCounts, LayerMoments, Medians, Predictions, Reconstruction, ReconstructionMetrics, recovered
from pipeline.evaluation.definitions import DEFINITIONS

CPU = torch.device("cpu")


def measured(acts_BLD: Tensor, approximations_BLD: Tensor, scale_L: Tensor | None = None, batch: int = 10**9) -> Reconstruction:
    moments = LayerMoments(acts_BLD.shape[1], acts_BLD.shape[2], CPU)
    moments.add(acts_BLD)
    sums = Reconstruction(moments.mean_LD, torch.ones(acts_BLD.shape[1]) if scale_L is None else scale_L)
    for start in range(0, len(acts_BLD), batch):
        sums.add(acts_BLD[start : start + batch], approximations_BLD[start : start + batch])
    return sums


def activations(seed: int = 0, positions: int = 61) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    acts_BLD = torch.randn(positions, 2, 5, generator=generator) * torch.tensor([1.0, 20.0])[:, None] + 3
    noisy_BLD = 0.8 * acts_BLD + torch.randn(positions, 2, 5, generator=generator)
    return acts_BLD, noisy_BLD, torch.tensor([0.7, 0.03])


# -- numbers worked by hand -----------------------------------------------------------------------------------------------------


def test_reconstruction_of_two_positions_worked_by_hand() -> None:
    # x: (4, 0), (0, 2); mean (2, 1); x_hat: (3, 0), (0, 0); e: (1, 0), (0, 2)
    acts_BLD = torch.tensor([[[4.0, 0.0]], [[0.0, 2.0]]])
    approximations_BLD = torch.tensor([[[3.0, 0.0]], [[0.0, 0.0]]])
    (found,) = measured(acts_BLD, approximations_BLD).layers()
    # sum |e|^2 = 1 + 4; sum |x - mean|^2 = 5 + 5; sum |x|^2 = 16 + 4; sum |x_hat|^2 = 9; sum x . x_hat = 12
    assert found.explained_variance == 1 - 5 / 10
    assert found.fraction_unexplained == 5 / 10
    assert found.explained_variance_legacy == pytest.approx(1 - (1 / 5 + 4 / 5) / 2)
    # mean e = (1/2, 1): sum |e - mean e|^2 = 5 - 2 * 5/4
    assert found.explained_variance_of_residual == 1 - 2.5 / 10
    assert found.explained_norm == 1 - 5 / 20
    assert found.best_scalar == 12 / 9
    assert found.norm_ratio == math.sqrt(9 / 20)
    assert found.median_error == pytest.approx(1 / 2, rel=1e-3)
    assert found.mean_squared_error == 5 / 2


def test_pooled_and_legacy_explained_variance_part_where_positions_differ_in_norm() -> None:
    # x: 10, -10, 1, -1 of mean 0; e: 0, 0, 1, 1. Pooled 1 - 2/202; by position 1 - (0 + 0 + 1 + 1)/4
    acts_BLD = torch.tensor([10.0, -10.0, 1.0, -1.0]).view(4, 1, 1)
    approximations_BLD = torch.tensor([10.0, -10.0, 0.0, 0.0]).view(4, 1, 1)
    (found,) = measured(acts_BLD, approximations_BLD).layers()
    assert found.explained_variance == pytest.approx(1 - 2 / 202)
    assert found.explained_variance_legacy == 0.5


def test_joint_adds_numerators_and_denominators_of_layers_in_normalized_space() -> None:
    # layer 0: x = 1, -1, e = 1, -1; layer 1: x = 10, -10, e = 0, 0; both have mean 0. Scales 1 and 1/5.
    acts_BLD = torch.tensor([[[1.0], [10.0]], [[-1.0], [-10.0]]])
    approximations_BLD = torch.tensor([[[0.0], [10.0]], [[0.0], [-10.0]]])
    sums = measured(acts_BLD, approximations_BLD, torch.tensor([1.0, 0.2]))
    assert [layer.explained_variance for layer in sums.layers()] == [0.0, 1.0]
    # joint: errors 2 * 1, spread 2 * (1 + 100/25)
    assert sums.joint().explained_variance == pytest.approx(1 - 2 / 10)
    assert sums.mean_over_layers().explained_variance == 0.5


def test_cross_entropy_and_divergence_worked_by_hand() -> None:
    # probabilities 1/2, 1/4, 1/4 and, clean, 1/4, 1/4, 1/2; the next token is 0
    changed = torch.tensor([0.5, 0.25, 0.25]).log()
    clean = torch.tensor([0.25, 0.25, 0.5]).log()
    sums = Predictions(CPU)
    sums.add(changed[None], torch.tensor([0]), clean[None])
    assert sums.num_predictions == 1
    assert sums.cross_entropy == pytest.approx(math.log(2), rel=1e-6)
    assert sums.kl == pytest.approx(0.25 * math.log(0.5) + 0.25 * math.log(1) + 0.5 * math.log(2), rel=1e-6)


def test_recovered_is_one_for_no_loss_zero_for_the_ablation_and_none_without_damage() -> None:
    assert recovered(ablated=10.0, spliced=3.0, clean=3.0) == 1
    assert recovered(ablated=10.0, spliced=10.0, clean=3.0) == 0
    assert recovered(ablated=10.0, spliced=4.75, clean=3.0) == 0.75
    assert recovered(ablated=10.0, spliced=17.0, clean=3.0) == -1
    assert recovered(ablated=3.0, spliced=3.5, clean=3.0) is None


def test_features_are_counted_where_they_are_above_zero() -> None:
    firing = FiringCounts(4, CPU)
    features_BF = torch.zeros(20, 4)
    features_BF[:3, 0] = 0.5  # 15 %: dense
    features_BF[:2, 1] = 1e-30  # 10 %: not over 10 %
    features_BF[:5, 2] = -1.0
    firing.add(features_BF[:7])
    firing.add(features_BF[7:])
    assert firing.counts_F.tolist() == [3, 2, 0, 0]
    assert (firing.l0, firing.num_silent, firing.num_dense) == (5 / 20, 2, 1)


# -- slow formulas --------------------------------------------------------------------------------------------------------------


def slow_metrics(acts_BD: np.ndarray, approximations_BD: np.ndarray) -> ReconstructionMetrics:
    """One layer's metrics, position by position in float64."""
    acts, approximations = acts_BD.astype(np.float64), approximations_BD.astype(np.float64)
    mean, mean_error = acts.mean(0), (acts - approximations).mean(0)
    error = centered = norm = approximation = product = ratios = residual = 0.0
    for x, x_hat in zip(acts, approximations, strict=True):
        e = x - x_hat
        error += e @ e
        centered += (x - mean) @ (x - mean)
        norm += x @ x
        approximation += x_hat @ x_hat
        product += x @ x_hat
        ratios += 1 - (e @ e) / ((x - mean) @ (x - mean))
        residual += (e - mean_error) @ (e - mean_error)
    medians = [statistics.median_low(math.sqrt(v @ v) for v in rows) for rows in (acts - approximations, acts)]
    return ReconstructionMetrics(
        explained_variance=1 - error / centered,
        explained_variance_with_outliers=1 - error / centered,
        fraction_unexplained=error / centered,
        explained_variance_legacy=ratios / len(acts),
        explained_variance_of_residual=1 - residual / centered,
        explained_norm=1 - error / norm,
        best_scalar=product / approximation,
        norm_ratio=math.sqrt(approximation / norm),
        median_error=medians[0] / medians[1],
        mean_squared_error=error / len(acts),
    )


def assert_same(found: ReconstructionMetrics, expected: ReconstructionMetrics, rel: float) -> None:
    for name, value in found._asdict().items():
        assert value == pytest.approx(getattr(expected, name), rel=1e-3 if name == "median_error" else rel, abs=1e-12), name


def test_layers_and_joint_agree_with_a_loop_over_positions() -> None:
    acts_BLD, noisy_BLD, scale_L = activations()
    sums = measured(acts_BLD, noisy_BLD, scale_L, batch=7)
    for layer, found in enumerate(sums.layers()):
        assert_same(found, slow_metrics(acts_BLD[:, layer].numpy(), noisy_BLD[:, layer].numpy()), rel=1e-11)
    scale_L1 = scale_L.double()[:, None]
    side_by_side = [(rows_BLD.double() * scale_L1).flatten(1).numpy() for rows_BLD in (acts_BLD, noisy_BLD)]
    assert_same(sums.joint(), slow_metrics(*side_by_side), rel=1e-11)
    means = [sum(values) / 2 for values in zip(*sums.layers(), strict=True)]
    assert_same(sums.mean_over_layers(), ReconstructionMetrics(*means), rel=1e-12)


def test_best_scalar_is_where_the_squared_error_is_least() -> None:
    acts_BLD, noisy_BLD, _ = activations()
    for layer, found in enumerate(measured(acts_BLD, noisy_BLD).layers()):
        assert found.best_scalar is not None
        error = [float((acts_BLD - found.best_scalar * step * noisy_BLD)[:, layer].double().square().sum()) for step in (0.999, 1, 1.001)]
        assert error[1] < min(error[0], error[2])


def test_predictions_agree_with_a_loop_over_positions() -> None:
    generator = torch.Generator().manual_seed(1)
    log_p_NV, clean_NV = ((torch.randn(7, 6, generator=generator) * 2).log_softmax(-1) for _ in range(2))
    targets_N = torch.randint(6, (7,), generator=generator)
    sums = Predictions(CPU)
    sums.add(log_p_NV[:5], targets_N[:5], clean_NV[:5])
    sums.add(log_p_NV[5:], targets_N[5:], clean_NV[5:])
    losses, divergences = [], []
    for row in range(7):
        p, q = (np.exp(rows[row].double().numpy()) for rows in (clean_NV, log_p_NV))
        losses.append(-math.log(q[targets_N[row]]))
        divergences.append(sum(p_v * math.log(p_v / q_v) for p_v, q_v in zip(p, q, strict=True)))
    assert sums.num_predictions == 7
    assert sums.cross_entropy == pytest.approx(statistics.fmean(losses), rel=1e-6)
    assert sums.kl == pytest.approx(statistics.fmean(divergences), rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 9, 10])
def test_medians_are_good_to_a_two_thousandth(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    values_BC = torch.randn(count, 3, generator=generator, dtype=torch.float64).exp() * torch.tensor([1e-4, 1.0, 1e5])
    medians = Medians(3, CPU)
    for row_1C in values_BC.split(4):
        medians.add(row_1C)
    for column, found in enumerate(medians.values()):
        assert found == pytest.approx(statistics.median_low(values_BC[:, column].tolist()), rel=5e-4)


def test_medians_of_zeros_are_zero_and_extremes_are_kept() -> None:
    medians = Medians(3, CPU)
    medians.add(torch.tensor([[0.0, 1e30, 0.0], [0.0, 1e30, 0.0], [5.0, 1e30, 2.0], [5.0, 1e-30, 2.0], [0.0, 1e30, 2.0]]))
    zero, huge, two = medians.values()
    assert zero == 0
    assert huge == pytest.approx(2.0**32, rel=1e-3)
    assert two == pytest.approx(2, rel=5e-4)


def test_moments_agree_with_numpy() -> None:
    acts_BLD, _, _ = activations()
    moments = LayerMoments(2, 5, CPU)
    for part in acts_BLD.split(8):
        moments.add(part)
    acts = acts_BLD.double().numpy()
    np.testing.assert_allclose(moments.mean_LD, acts.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.spread_L, ((acts - acts.mean(0)) ** 2).sum((0, 2)), rtol=1e-12)
    point_LD = torch.arange(10.0, dtype=torch.float64).view(2, 5)
    np.testing.assert_allclose(moments.squared_distance_to(point_LD), ((acts - point_LD.numpy()) ** 2).sum((0, 2)), rtol=1e-12)


def test_moments_of_two_parts_are_those_of_the_whole() -> None:
    acts_BLD, _, _ = activations()
    whole, first, second = (LayerMoments(2, 5, CPU) for _ in range(3))
    whole.add(acts_BLD)
    first.add(acts_BLD[:20])
    second.add(acts_BLD[20:])
    together = first.with_those_of(second)
    assert together.num_positions == whole.num_positions
    torch.testing.assert_close(together.mean_LD, whole.mean_LD, rtol=1e-13, atol=0)
    torch.testing.assert_close(together.spread_L, whole.spread_L, rtol=1e-12, atol=0)


# -- what always holds ----------------------------------------------------------------------------------------------------------


def test_a_perfect_reconstruction_explains_everything() -> None:
    acts_BLD, _, scale_L = activations()
    sums = measured(acts_BLD, acts_BLD, scale_L)
    for found in [*sums.layers(), sums.joint()]:
        assert found == ReconstructionMetrics(1, 1, 0, 1, 1, 1, found.best_scalar, found.norm_ratio, 0, 0)
        assert found.best_scalar == pytest.approx(1, rel=1e-14)
        assert found.norm_ratio == pytest.approx(1, rel=1e-14)


def test_predicting_the_mean_explains_nothing() -> None:
    acts_BLD, _, scale_L = activations()
    mean_LD = acts_BLD.double().mean(0)
    sums = measured(acts_BLD, mean_LD.expand(len(acts_BLD), -1, -1), scale_L)
    for found in [*sums.layers(), sums.joint(), sums.mean_over_layers()]:
        assert found.explained_variance == pytest.approx(0, abs=1e-14)
        assert found.explained_variance_legacy == pytest.approx(0, abs=1e-14)


def test_a_constant_error_costs_no_variance_of_the_residual() -> None:
    acts_BLD, _, _ = activations()
    for found in measured(acts_BLD, acts_BLD + 20).layers():
        assert found.explained_variance_of_residual == pytest.approx(1, abs=1e-6)
        assert found.explained_variance is not None
        assert found.explained_variance < 0.5


def test_batches_do_not_change_the_metrics() -> None:
    acts_BLD, noisy_BLD, scale_L = activations()
    whole = measured(acts_BLD, noisy_BLD, scale_L)
    for batch in (1, 8, 60):
        parts = measured(acts_BLD, noisy_BLD, scale_L, batch=batch)
        for found, expected in zip([*parts.layers(), parts.joint()], [*whole.layers(), whole.joint()], strict=True):
            assert found._asdict() == pytest.approx(expected._asdict(), rel=1e-12)


def test_chunks_inside_a_batch_do_not_change_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    acts_BLD, noisy_BLD, scale_L = activations()
    whole = measured(acts_BLD, noisy_BLD, scale_L)
    monkeypatch.setitem(metrics.CHUNK_NUMBERS, "cpu", 35)
    parts = measured(acts_BLD, noisy_BLD, scale_L)
    assert parts.joint()._asdict() == pytest.approx(whole.joint()._asdict(), rel=1e-12)


def test_activations_that_never_vary_have_no_explained_variance() -> None:
    constant_BLD = torch.ones(4, 1, 3)
    (found,) = measured(constant_BLD, constant_BLD * 0).layers()
    assert found.explained_variance is None
    assert found.fraction_unexplained is None
    assert found.explained_variance_legacy is None
    assert found.best_scalar is None
    assert found.explained_norm == 0


def test_outliers_count_in_one_number_alone() -> None:
    # x: 4, 0 of mean 2, and an outlier 20: mean of all 8. x_hat: 3, 0 and 10; e: 1, 0 and 10.
    acts_BLD, approximations_BLD = torch.tensor([4.0, 0.0]).view(2, 1, 1), torch.tensor([3.0, 0.0]).view(2, 1, 1)
    outlier_BLD = torch.tensor([20.0]).view(1, 1, 1)
    everything = LayerMoments(1, 1, CPU)
    everything.add(torch.cat([acts_BLD, outlier_BLD]))
    sums = Reconstruction(acts_BLD.double().mean(0), torch.ones(1), everything.spread_L)
    sums.add(acts_BLD, approximations_BLD)
    sums.add_outliers(outlier_BLD, outlier_BLD / 2)
    (found,) = sums.layers()
    assert found.explained_variance == 1 - 1 / 8
    assert found.explained_variance_with_outliers == pytest.approx(1 - 101 / (16 + 64 + 144))
    assert found == measured(acts_BLD, approximations_BLD).layers()[0]._replace(
        explained_variance_with_outliers=found.explained_variance_with_outliers
    )
    assert sums.joint().explained_variance_with_outliers == found.explained_variance_with_outliers


def test_norms_that_the_caller_has_change_nothing() -> None:
    acts_BLD, noisy_BLD, scale_L = activations()
    sums = Reconstruction(acts_BLD.double().mean(0), scale_L)
    sums.add(acts_BLD, noisy_BLD, metrics.squared_norms(acts_BLD, acts_BLD.double().mean(0)))
    assert sums.joint() == measured(acts_BLD, noisy_BLD, scale_L).joint()


def test_joint_explained_variance_is_the_mean_of_layers_where_each_is_divided_by_its_spread() -> None:
    acts_BLD, noisy_BLD, _ = activations()
    moments = LayerMoments(2, 5, CPU)
    moments.add(acts_BLD)
    sums = measured(acts_BLD, noisy_BLD, moments.spread_L.rsqrt())
    found, of_layers = sums.joint(), sums.mean_over_layers()
    assert found.explained_variance == pytest.approx(of_layers.explained_variance, rel=1e-12)
    assert found.explained_variance_legacy != pytest.approx(of_layers.explained_variance_legacy, rel=1e-3)


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 1.0])
def test_the_share_of_the_greatest_agrees_with_sorted_values(fraction: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values_BC = torch.randn(3000, 2, generator=generator).abs() * torch.tensor([1.0, 100.0])
    values_BC[:2, 1] = 5000.0
    medians = Medians(2, CPU)
    for part_BC in values_BC.split(700):
        medians.add(part_BC)
    squares_BC = values_BC.double().square().sort(0, descending=True).values
    expected_C = squares_BC[: round(fraction * 3000)].sum(0) / squares_BC.sum(0)
    assert medians.share_of_greatest(fraction) == pytest.approx(expected_C.tolist(), rel=2e-3)


def test_the_share_of_the_greatest_is_of_one_value_at_least_and_zero_of_zeros() -> None:
    medians = Medians(2, CPU)
    medians.add(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
    assert medians.share_of_greatest(0.001) == pytest.approx([16 / 25, 0], rel=2e-3)


def test_every_reconstruction_metric_is_defined_in_words() -> None:
    assert set(ReconstructionMetrics._fields) <= set(DEFINITIONS)
