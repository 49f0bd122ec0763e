"""Which features fire: each activation function in training and at inference, and the thresholds that it learns or estimates."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.crosscoder import BatchTopk, FixedThreshold, Gated, JumpRelu, Relu, Topk
from pipeline.config.schema import Config
from pipeline.crosscoder import straight_through
from pipeline.crosscoder.activation_functions import ActivationFunction, Fired, make_activation_function
from pipeline.crosscoder.running_mean import update_running_mean
from pipeline.crosscoder.schedules import StepValues

KINDS: list[Config] = [Relu(), Relu(negative_gradient=0.3), Topk(k=2), BatchTopk(k=2), JumpRelu(initial_threshold=0.4), Gated()]
KINDS.append(FixedThreshold(threshold=0.4))


def fire(settings: Config, pre_BF: Tensor, norms_F: Tensor, *, b_enc_F: Tensor | None = None, bandwidth: float = 1.0) -> Fired:
    """What fires in training; k is the settings' own."""
    return fire_with(make_activation_function(settings, len(norms_F)), settings, pre_BF, norms_F, b_enc_F, bandwidth)


def fire_with(
    function: ActivationFunction, settings: Any, pre_BF: Tensor, norms_F: Tensor, b_enc_F: Tensor | None = None, bandwidth: float = 1.0
) -> Fired:
    values = StepValues(coefficients={}, k=getattr(settings, "k", None), bandwidth=torch.tensor(bandwidth))
    return function.fire(pre_BF, norms_F, torch.zeros(len(norms_F)) if b_enc_F is None else b_enc_F, values, None)


def test_batch_topk_by_hand() -> None:
    pre_BF = torch.tensor([[5.0, 4.0, 1.0], [2.0, 3.0, -7.0]])
    fired = fire(BatchTopk(k=1, rank_by="activation"), pre_BF, torch.ones(3))
    # 2 of 6 fire, and both are at the first position: the batch decides, not the position.
    assert fired.features_BF.tolist() == [[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    assert fired.smallest_rank is not None
    assert fired.smallest_rank.item() == 4.0


def test_ranking_by_decoder_norm_by_hand() -> None:
    pre_BF = torch.tensor([[5.0, 4.0, 1.0], [2.0, 3.0, -7.0]])
    fired = fire(BatchTopk(k=1), pre_BF, torch.tensor([1.0, 2.0, 9.0]))
    # Ranks: 5, 8, 9 and 2, 6, -63.
    assert fired.features_BF.tolist() == [[0.0, 4.0, 1.0], [0.0, 0.0, 0.0]]
    assert fired.smallest_rank is not None
    assert fired.smallest_rank.item() == 8.0


def test_topk_by_hand() -> None:
    pre_BF = torch.tensor([[5.0, 4.0, 1.0], [2.0, 3.0, -7.0], [-1.0, -2.0, -3.0]])
    fired = fire(Topk(k=1, rank_by="activation"), pre_BF, torch.ones(3))
    # Each position has its own highest; where nothing is positive, nothing fires.
    assert fired.features_BF.tolist() == [[5.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]
    assert fired.smallest_rank is not None
    assert fired.smallest_rank.item() == 4.0, "the mean over the positions at which something fired"


def slow_batch_topk(pre_BF: Tensor, norms_F: Tensor, k: int) -> Tensor:
    ranked = sorted(((pre_BF[b, f] * norms_F[f]).item(), b, f) for b in range(pre_BF.shape[0]) for f in range(pre_BF.shape[1]))
    features_BF = torch.zeros_like(pre_BF)
    for rank, b, f in ranked[-k * pre_BF.shape[0] :]:
        if rank > 0:
            features_BF[b, f] = pre_BF[b, f]
    return features_BF


@pytest.mark.parametrize("shift", [0.0, -1.5])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_batch_topk_agrees_with_sorting_all_of_the_batch(k: int, shift: float) -> None:
    torch.manual_seed(0)
    pre_BF, norms_F = torch.randn(6, 8) + shift, torch.rand(8) + 0.1
    fired = fire(BatchTopk(k=k), pre_BF, norms_F)
    expected_BF = slow_batch_topk(pre_BF, norms_F, k)
    assert torch.equal(fired.features_BF, expected_BF)
    assert fired.smallest_rank is not None
    assert fired.smallest_rank.item() == pytest.approx((expected_BF * norms_F)[expected_BF > 0].min().item())


@pytest.mark.parametrize("k", [1, 3])
def test_topk_agrees_with_sorting_each_position(k: int) -> None:
    torch.manual_seed(0)
    pre_BF, norms_F = torch.randn(6, 8), torch.rand(8) + 0.1
    alone_BF = torch.cat([slow_batch_topk(row_BF, norms_F, k) for row_BF in pre_BF.split(1)])
    assert torch.equal(fire(Topk(k=k), pre_BF, norms_F).features_BF, alone_BF)


def test_scaling_a_feature_up_and_its_decoder_down_changes_nothing_about_what_fires() -> None:
    torch.manual_seed(0)
    pre_BF, norms_F, scale_F = torch.randn(6, 8), torch.rand(8) + 0.1, torch.tensor([4.0, 0.5] * 4)
    fires = fire(BatchTopk(k=1), pre_BF, norms_F).features_BF > 0
    assert torch.equal(fire(BatchTopk(k=1), pre_BF * scale_F, norms_F / scale_F).features_BF > 0, fires)
    by_activation = fire(BatchTopk(k=1, rank_by="activation"), pre_BF * scale_F, norms_F / scale_F).features_BF > 0
    assert not torch.equal(by_activation, fires)


def gradient(settings: Config, pre_BF: Tensor, weights_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Features, and the gradient of their weighed sum with respect to the pre-activations."""
    pre_BF = pre_BF.clone().requires_grad_()
    features_BF = fire(settings, pre_BF, torch.ones(pre_BF.shape[1])).features_BF
    (features_BF * weights_BF).sum().backward()
    assert pre_BF.grad is not None
    return features_BF.detach(), pre_BF.grad


@pytest.mark.parametrize("settings", [Relu(), Topk(k=2), BatchTopk(k=2), JumpRelu(initial_threshold=0.4), Gated()])
def test_the_gradient_reaches_what_fired_and_nothing_else(settings: Config) -> None:
    torch.manual_seed(0)
    pre_BF, weights_BF = torch.randn(6, 8), torch.rand(6, 8) + 0.5
    features_BF, found_BF = gradient(settings, pre_BF, weights_BF)
    assert 0 < (features_BF > 0).sum() < features_BF.numel()
    assert torch.equal(found_BF, weights_BF * (features_BF > 0))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_negative_pre_activation_may_have_a_share_of_the_gradient_while_the_feature_is_zero(share: float) -> None:
    torch.manual_seed(0)
    pre_BF, weights_BF = torch.randn(6, 8), torch.rand(6, 8) + 0.5
    features_BF, found_BF = gradient(Relu(negative_gradient=share), pre_BF, weights_BF)
    assert torch.equal(features_BF, torch.relu(pre_BF))
    torch.testing.assert_close(found_BF, torch.where(pre_BF > 0, weights_BF, share * weights_BF))


def test_a_learned_threshold_gets_the_gradient_of_the_published_formula() -> None:
    pre_BF = torch.tensor([[0.3, 0.9], [0.7, 2.0], [1.4, 0.5]])
    threshold_F = torch.tensor([0.5, 1.0], requires_grad=True)
    upstream_BF, bandwidth = torch.tensor([[1.0, 10.0], [100.0, 1e3], [1e4, 1e5]]), torch.tensor(0.5)
    features_BF = straight_through.jump_relu(pre_BF, threshold_F, bandwidth)
    torch.testing.assert_close(features_BF.detach(), torch.tensor([[0.0, 0.0], [0.7, 2.0], [1.4, 0.0]]))
    (features_BF * upstream_BF).sum().backward()
    # Within 0.25 of the threshold: 0.3 and 0.7 of the first feature, 0.9 of the second. -threshold / bandwidth times what comes in.
    assert threshold_F.grad is not None
    assert threshold_F.grad.tolist() == pytest.approx([-(0.5 / 0.5) * 101.0, -(1.0 / 0.5) * 10.0])
    threshold_F.grad = None
    fires_BF = straight_through.step(pre_BF, threshold_F, bandwidth)
    assert fires_BF.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]]
    (fires_BF * upstream_BF).sum().backward()
    assert threshold_F.grad is not None
    assert threshold_F.grad.tolist() == pytest.approx([-101.0 / 0.5, -10.0 / 0.5])


def test_a_gate_opens_by_its_own_path_and_the_other_says_how_far() -> None:
    function = make_activation_function(Gated(), 2)
    state = {"log_gain_F": torch.tensor([0.0, 2.0]).log1p(), "b_magnitude_F": torch.tensor([0.5, -1.0])}
    function.load_state_dict(state)
    # Gates 1, -1 and -0.1, 0.2; without their biases 0.8, -1.2 and -0.4, -0.1; gains 1 and 3.
    fired = fire_with(function, Gated(), torch.tensor([[1.0, -0.1], [-1.0, 0.2]]), torch.ones(2), b_enc_F=torch.tensor([0.2, 0.3]))
    assert fired.features_BF.tolist() == [[pytest.approx(0.8 + 0.5), 0.0], [0.0, 0.0]]
    torch.testing.assert_close(fired.penalized_BF, torch.tensor([[1.0, 0.0], [0.0, 0.2]]))


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: settings.kind)
def test_the_inference_form_agrees_with_training_at_the_batchs_own_threshold(settings: Config) -> None:
    torch.manual_seed(0)
    pre_BF, norms_F, b_enc_F = torch.randn(64, 8), torch.rand(8) + 0.1, torch.randn(8) * 0.3
    function = make_activation_function(settings, 8)
    with torch.no_grad():
        for parameter in function.parameters():
            parameter.add_(torch.randn(8) * 0.3)
        if isinstance(settings, Topk):  # of a single position: there the threshold is that position's own
            pre_BF = pre_BF[:1]
        fired = fire_with(function, settings, pre_BF, norms_F, b_enc_F)
        if fired.smallest_rank is not None:
            function.update(fired.smallest_rank * (1 - 1e-6))
        gain_F, shift_F, threshold_F = function.inference_form(norms_F, b_enc_F)
        value_BF = pre_BF * gain_F + shift_F
        torch.testing.assert_close(torch.where(value_BF > threshold_F, value_BF, 0.0), fired.features_BF)
    assert (threshold_F >= 0).all()
    assert (fired.features_BF > 0).any()


def test_a_feature_without_a_decoder_never_fires_at_inference_and_gives_no_nan() -> None:
    function = make_activation_function(BatchTopk(k=1), 2)
    function.update(torch.tensor(0.5))
    form = function.inference_form(torch.tensor([0.0, 2.0]), torch.zeros(2))
    assert form.threshold_F[0] > 1e30
    assert form.threshold_F[1] == 0.25


def test_the_running_mean_is_even_first_and_exponential_later() -> None:
    mean, num_updates = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    found = []
    for value in (4.0, 2.0, 6.0, 8.0):
        update_running_mean(mean, num_updates, torch.tensor(value), momentum=0.5)
        found.append(mean.item())
    # Means of the first one and two; from then on half old, half new: (3 + 6) / 2, (4.5 + 8) / 2.
    assert found == [4.0, 3.0, 4.5, 6.25]
    assert num_updates.item() == 4


@pytest.mark.parametrize("settings", [Topk(k=1), BatchTopk(k=1)])
def test_a_batch_in_which_nothing_fires_leaves_the_threshold_alone(settings: Config) -> None:
    function = make_activation_function(settings, 3)
    function.load_state_dict({"threshold": torch.tensor(0.7), "num_threshold_updates": torch.tensor(5)})
    fired = fire_with(function, settings, -torch.ones(2, 3), torch.ones(3))
    assert not fired.features_BF.any()
    function.update(fired.smallest_rank)
    assert function.state_dict()["threshold"].item() == pytest.approx(0.7)
    assert function.state_dict()["num_threshold_updates"].item() == 5
