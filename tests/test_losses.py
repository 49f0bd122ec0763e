"""The terms of the loss and their sum, by hand and against slower formulas."""

import math
from typing import Any

import pytest
import torch
from rounding import tolerance
from torch import Tensor
from toy_activations import AUXK, BATCH_TOPK, L1, train_config

from pipeline.config.crosscoder import CrosscoderConfig
from pipeline.config.schema import build
from pipeline.crosscoder.losses import auxk, decoder_norm_l1, squared_norms_L
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.objective import Objective, Outcome

# Of two layers of width 4: an encoder's sum, a decoder's over 8 features, then all squares of a batch of at most 6 positions.
ROUNDING = tolerance(8, 8, 6 * 8)


def small_crosscoder(activation_function: dict[str, Any], *, num_features: int = 8, num_layers: int = 2, d_model: int = 4) -> Crosscoder:
    config = build(CrosscoderConfig, {"num_features": num_features, "activation_function": activation_function}, "test")
    return Crosscoder(config, num_layers=num_layers, d_model=d_model, seed=3)


def outcome_of(crosscoder: Crosscoder, acts_BLD: Tensor, loss: dict[str, Any], dead_J: Tensor | None, **changes: Any) -> Outcome:
    config = train_config(loss=loss, **changes)
    objective = Objective(config, acts_BLD.shape[2], "cpu")
    return objective(crosscoder, acts_BLD, torch.zeros(acts_BLD.shape[1:]), torch.tensor(0.25), dead_J)


def test_decoder_norm_l1_by_hand() -> None:
    # Feature 0 has decoder norms 5 (3-4-5) and 2, feature 1 has 13 (5-12-13) and 0.
    W_dec_FLD = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[5.0, 12.0], [0.0, 0.0]]])
    features_BF = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    # Position 0: 1 * 7. Position 1: 2 * 7 + 3 * 13 = 53. Mean: 30.
    assert decoder_norm_l1(features_BF, W_dec_FLD).item() == 30.0


def test_decoder_norm_l1_does_not_change_when_a_feature_is_scaled_up_and_its_decoder_down() -> None:
    torch.manual_seed(0)
    features_BF, W_dec_FLD = torch.rand(5, 7), torch.randn(7, 2, 3)
    scale_F = torch.rand(7) + 0.5
    scaled = decoder_norm_l1(features_BF * scale_F, W_dec_FLD / scale_F[:, None, None])
    torch.testing.assert_close(scaled, decoder_norm_l1(features_BF, W_dec_FLD))


def test_decoder_norm_l1_has_a_finite_gradient_where_a_decoder_is_zero() -> None:
    W_dec_FLD = torch.zeros(2, 2, 3, requires_grad=True)
    decoder_norm_l1(torch.ones(4, 2), W_dec_FLD).backward()
    assert W_dec_FLD.grad is not None
    assert torch.isfinite(W_dec_FLD.grad).all()


def test_bfloat16_features_are_summed_in_float32() -> None:
    features_BF = torch.ones(4096, 1, dtype=torch.bfloat16)
    features_BF[0] = 1.0078125
    # In bfloat16 the sum would be 4096 and the last bits lost; in float32 every partial sum is exact, whatever the order.
    assert decoder_norm_l1(features_BF, torch.ones(1, 1, 1)).item() == 1 + 0.0078125 / 4096
    squares = squared_norms_L(torch.full((4096, 1, 1), 1.0078125, dtype=torch.bfloat16)).item()
    assert squares == pytest.approx(4096 * 1.0078125**2, rel=tolerance(4096))


def slow_auxk(crosscoder: Crosscoder, pre_BF: Tensor, residual_BLD: Tensor, dead: list[int], k: int) -> float:
    """Position by position, layer by layer."""
    W_dec_FLD = crosscoder.W_dec_FLD.detach()
    left = total = 0.0
    for b in range(pre_BF.shape[0]):
        contributions = []
        for j in dead:
            activation = max(0.0, pre_BF[b, j].item())
            norm = sum(math.sqrt((W_dec_FLD[j, layer] ** 2).sum().item()) for layer in range(W_dec_FLD.shape[1]))
            contributions.append((activation * norm, activation, j))
        model_LD = torch.zeros(W_dec_FLD.shape[1:])
        for _, activation, j in sorted(contributions, reverse=True)[:k]:
            model_LD += activation * W_dec_FLD[j]
        left += (residual_BLD[b] - model_LD).square().sum().item()
        total += residual_BLD[b].square().sum().item()
    return left / total


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_auxk_agrees_with_a_loop_over_positions(k: int) -> None:
    torch.manual_seed(1)
    crosscoder = small_crosscoder(BATCH_TOPK)
    with torch.no_grad():
        crosscoder.W_dec_FLD.mul_(torch.rand(8, 1, 1) * 5)
    pre_BF, residual_BLD, dead = torch.randn(6, 8), torch.randn(6, 2, 4), [1, 4, 6]
    found = auxk(crosscoder, pre_BF, residual_BLD, torch.tensor(dead), k)
    assert found.item() == pytest.approx(slow_auxk(crosscoder, pre_BF, residual_BLD, dead, k), rel=ROUNDING)


def test_auxk_of_a_perfect_reconstruction_is_zero_and_not_nan() -> None:
    torch.manual_seed(8)
    crosscoder = small_crosscoder(BATCH_TOPK)
    share = auxk(crosscoder, torch.randn(3, 8, requires_grad=True), torch.zeros(3, 2, 4), torch.tensor([0, 1]), 1)
    share.backward()
    assert share.item() == 0.0
    assert crosscoder.W_dec_FLD.grad is not None
    assert torch.isfinite(crosscoder.W_dec_FLD.grad).all()


def test_the_loss_is_the_sum_of_its_terms_each_by_its_own_formula() -> None:
    torch.manual_seed(2)
    crosscoder, acts_BLD, dead_J = small_crosscoder({"kind": "relu"}), torch.randn(5, 2, 4), torch.tensor([2, 5])
    loss = {"sparsity": L1["sparsity"], "auxiliary": {"kind": "auxk", "k": 1, "coefficient": 0.5}}
    outcome = outcome_of(crosscoder, acts_BLD, loss, dead_J)
    pre_BF = crosscoder.pre_activations(acts_BLD)
    features_BF = torch.relu(pre_BF)
    residual_BLD = acts_BLD - crosscoder.decode(features_BF)
    reconstruction = residual_BLD.square().sum().item() / 5
    sparsity = 0.25 * decoder_norm_l1(features_BF, crosscoder.W_dec_FLD).item()
    share = slow_auxk(crosscoder, pre_BF.detach(), residual_BLD.detach(), [2, 5], 1)
    auxiliary = 0.5 * share * acts_BLD.square().sum().item() / 5
    assert outcome.reconstruction.item() == pytest.approx(reconstruction, rel=ROUNDING)
    assert outcome.sparsity.item() == pytest.approx(sparsity, rel=ROUNDING)
    assert outcome.auxiliary.item() == pytest.approx(auxiliary, rel=ROUNDING)
    assert outcome.loss.item() == pytest.approx(reconstruction + sparsity + auxiliary, rel=ROUNDING)
    assert min(reconstruction, sparsity, auxiliary) > 0.01


def test_without_dead_features_the_auxiliary_term_is_exactly_zero() -> None:
    torch.manual_seed(6)
    crosscoder, acts_BLD = small_crosscoder(BATCH_TOPK), torch.randn(5, 2, 4)
    outcome = outcome_of(crosscoder, acts_BLD, AUXK, None)
    assert outcome.auxiliary.item() == 0.0
    assert outcome.loss.item() == outcome.reconstruction.item()


def test_the_auxiliary_loss_alone_reaches_encoders_biases_and_decoders_of_dead_features() -> None:
    torch.manual_seed(4)
    crosscoder, acts_BLD = small_crosscoder({"kind": "batch_topk", "k": 1}), torch.randn(16, 2, 4)
    with torch.no_grad():  # features 3 and 6 are alive, but too weak to be among the highest
        crosscoder.W_dec_FLD[[3, 6]] *= 1e-3
    dead_J = torch.tensor([3, 6])
    outcome_of(crosscoder, acts_BLD, AUXK, None).loss.backward()
    for gradient in (crosscoder.W_enc_LDF.grad[:, :, dead_J], crosscoder.W_dec_FLD.grad[dead_J], crosscoder.b_enc_F.grad[dead_J]):
        assert (gradient == 0).all(), "these features must be dead for the main loss, or this test shows nothing"
    crosscoder.zero_grad()
    outcome_of(crosscoder, acts_BLD, AUXK, dead_J).loss.backward()
    for j in (3, 6):
        assert crosscoder.W_enc_LDF.grad[:, :, j].abs().sum() > 0
        assert crosscoder.W_dec_FLD.grad[j].abs().sum() > 0
        assert crosscoder.b_enc_F.grad[j] != 0


def test_the_auxiliary_loss_gives_living_features_no_gradient() -> None:
    torch.manual_seed(4)
    crosscoder, acts_BLD, dead_J = small_crosscoder({"kind": "batch_topk", "k": 1}), torch.randn(16, 2, 4), torch.tensor([3, 6])
    gradients = []
    for dead in (None, dead_J):
        crosscoder.zero_grad()
        outcome_of(crosscoder, acts_BLD, AUXK, dead).loss.backward()
        gradients.append((crosscoder.W_enc_LDF.grad.clone(), crosscoder.W_dec_FLD.grad.clone(), crosscoder.b_dec_LD.grad.clone()))
    alive = [0, 1, 2, 4, 5, 7]
    torch.testing.assert_close(gradients[0][0][:, :, alive], gradients[1][0][:, :, alive])
    torch.testing.assert_close(gradients[0][1][alive], gradients[1][1][alive])
    torch.testing.assert_close(gradients[0][2], gradients[1][2])


def test_explained_variance_sums_are_per_layer() -> None:
    torch.manual_seed(7)
    crosscoder, acts_BLD = small_crosscoder({"kind": "relu"}), torch.randn(5, 2, 4)
    outcome = outcome_of(crosscoder, acts_BLD, L1, None)
    for layer in range(2):
        assert outcome.variance_L[layer].item() == pytest.approx(acts_BLD[:, layer].square().sum().item(), rel=ROUNDING)
    residual_BLD = acts_BLD - crosscoder.decode(crosscoder.encode(acts_BLD))
    assert outcome.residual_L.tolist() == pytest.approx(residual_BLD.square().sum((0, 2)).tolist(), rel=ROUNDING)


def test_bfloat16_autocast_stays_near_float32_and_keeps_weights_and_loss_in_float32() -> None:
    torch.manual_seed(5)
    crosscoder, acts_BLD = small_crosscoder({"kind": "relu"}), torch.randn(64, 2, 4)
    exact = outcome_of(crosscoder, acts_BLD, L1, None)
    rounded = outcome_of(crosscoder, acts_BLD, L1, None, precision="bfloat16")
    assert rounded.loss.dtype == torch.float32
    assert rounded.loss.item() != exact.loss.item()
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=0.01)
    rounded.loss.backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in crosscoder.parameters())
