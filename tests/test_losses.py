"""The terms of the loss and their sum, by hand and against slower formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_activations import train_config

from pipeline.config.errors import UserError
from pipeline.config.loss import L1, Loss, Term
from pipeline.crosscoder.activation_functions import Fired
from pipeline.crosscoder.losses import TERMS, squared_norms_L
from pipeline.crosscoder.losses import l1 as l1_term
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.objective import Objective, Outcome
from pipeline.crosscoder.schedules import StepValues, scheduled_numbers, step_values
from pipeline.crosscoder.training_pass import Pass
from pipeline.crosscoder.weights import Weights, decoder_norms

CPU = torch.device("cpu")
RELU, BATCH_TOPK = {"kind": "relu"}, {"kind": "batch_topk", "k": 2}
JUMP_RELU, GATED = {"kind": "jump_relu", "initial_threshold": 0.2}, {"kind": "gated"}
EACH_TERM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "l1": (RELU, {"l1": {"coefficient": 0.5, "schedule": {"warmup_fraction": 0.0}}}),
    "tanh": (JUMP_RELU, {"tanh": {"coefficient": 0.5, "schedule": {"warmup_fraction": 0.0}}}),
    "l0_target": (JUMP_RELU, {"l0_target": {"coefficient": 0.5, "target": 2.0}}),
    "pre_activation": (JUMP_RELU, {"pre_activation": {"coefficient": 0.5}}),
    "orthogonality": (RELU, {"orthogonality": {"coefficient": 0.5, "sample": 6}}),
    "auxk": (BATCH_TOPK, {"auxk": {"coefficient": 0.5, "k": 2}}),
    "gated": (GATED, {"gated": {"coefficient": 0.5}}),
}
"""Of each term of the loss, an activation function that it is meant for, and the term."""


class Toy:
    """A crosscoder of 8 features over 2 layers of width 4, a batch for it, and the objective of a configuration."""

    def __init__(self, activation_function: dict[str, Any], loss: dict[str, Any], *, positions: int = 12, **changes: Any) -> None:
        crosscoder = {"num_features": 8, "activation_function": activation_function, **changes.pop("crosscoder", {})}
        self.config = train_config(crosscoder=crosscoder, loss=loss, **changes)
        torch.manual_seed(3)
        self.crosscoder = Crosscoder(self.config.crosscoder, layers=["a", "b"], d_model=4, seed=3)
        with torch.no_grad():
            self.crosscoder.b_enc_F.add_(0.1 * torch.randn(8))
            for parameter in self.crosscoder.parameters():  # away from the symmetry of the first weights
                parameter.mul_(1.0 + 0.3 * torch.rand_like(parameter))
        self.acts_BLD = torch.randn(positions, 2, 4) * 3
        self.mean_LD = torch.zeros(2, 4)
        self.dead_J = torch.tensor([1, 4, 6])
        torch.manual_seed(5)
        self.values = step_values(self.config, scheduled_numbers(self.config, 1, 10), batch_shape=(positions, 2), device=CPU)

    def outcome(self, dead_J: Tensor | None = None) -> Outcome:
        return Objective(self.config, "cpu")(self.crosscoder, self.acts_BLD, self.mean_LD, self.values, dead_J)

    def gradients(self, outcome: Outcome | None = None, dead_J: Tensor | None = None) -> dict[str, Tensor]:
        self.crosscoder.zero_grad()
        (outcome or self.outcome(dead_J)).loss.backward()
        return {name: p.grad.clone() for name, p in self.crosscoder.named_parameters() if p.grad is not None}


def pass_of(features_BF: Tensor, W_dec_FLD: Tensor) -> Pass:
    """What a penalty on activations needs of a pass."""
    made: Any = Pass(None, None, torch.zeros(len(features_BF), 1, 1), None, Fired(features_BF, features_BF), Weights(None, W_dec_FLD),  # type: ignore[arg-type]
                     decoder_norms(W_dec_FLD), None, None, None, None)  # type: ignore[arg-type]  # fmt: skip
    return made


# -- L1 and its choices ---------------------------------------------------------------------------------------------------


def test_l1_by_hand() -> None:
    # Feature 0 has decoder norms 5 (3-4-5) and 2, feature 1 has 13 (5-12-13) and 0.
    W_dec_FLD = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[5.0, 12.0], [0.0, 0.0]]])
    p = pass_of(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), W_dec_FLD)
    # Position 0: 1 * 7. Position 1: 2 * 7 + 3 * 13 = 53. Mean: 30.
    assert l1_term(L1(coefficient=1.0), p).item() == 30.0
    assert l1_term(L1(coefficient=1.0, positions="sum"), p).item() == 60.0
    # L1 norms of the rows: 7 and 2, 17 and 0.
    assert l1_term(L1(coefficient=1.0, norm="l1"), p).item() == (9 + 2 * 9 + 3 * 17) / 2
    assert l1_term(L1(coefficient=1.0, across_layers="max"), p).item() == (5 + 2 * 5 + 3 * 13) / 2
    assert l1_term(L1(coefficient=1.0, across_layers="l2"), p).item() == pytest.approx((3 * math.sqrt(29) + 39) / 2)
    assert l1_term(L1(coefficient=1.0, decoder_norms="absent"), p).item() == (1 + 2 + 3) / 2


@pytest.mark.parametrize("decoder_norms_are", ["live", "detached"])
def test_only_live_decoder_norms_get_the_penaltys_gradient(decoder_norms_are: Any) -> None:
    W_dec_FLD, features_BF = torch.randn(7, 2, 3, requires_grad=True), torch.rand(5, 7, requires_grad=True)
    l1_term(L1(coefficient=1.0, decoder_norms=decoder_norms_are), pass_of(features_BF, W_dec_FLD)).backward()
    assert features_BF.grad is not None
    assert (W_dec_FLD.grad is not None) == (decoder_norms_are == "live")


def test_l1_does_not_change_when_a_feature_is_scaled_up_and_its_decoder_down() -> None:
    torch.manual_seed(0)
    features_BF, W_dec_FLD = torch.rand(5, 7), torch.randn(7, 2, 3)
    scale_F = torch.rand(7) + 0.5
    scaled = l1_term(L1(coefficient=1.0), pass_of(features_BF * scale_F, W_dec_FLD / scale_F[:, None, None]))
    torch.testing.assert_close(scaled, l1_term(L1(coefficient=1.0), pass_of(features_BF, W_dec_FLD)))


@pytest.mark.parametrize("across", ["sum", "l2", "max"])
def test_l1_has_a_finite_gradient_where_a_decoder_is_zero(across: Any) -> None:
    W_dec_FLD = torch.zeros(2, 2, 3, requires_grad=True)
    l1_term(L1(coefficient=1.0, across_layers=across), pass_of(torch.ones(4, 2), W_dec_FLD)).backward()
    assert W_dec_FLD.grad is not None
    assert torch.isfinite(W_dec_FLD.grad).all()


def test_bfloat16_features_are_summed_in_float32() -> None:
    features_BF = torch.ones(4096, 1, dtype=torch.bfloat16)
    features_BF[0] = 1.0078125
    # In bfloat16 the sum would be 4096 and the last bits lost.
    found = l1_term(L1(coefficient=1.0), pass_of(features_BF, torch.ones(1, 1, 1)))
    assert found.item() == pytest.approx(1 + 0.0078125 / 4096, abs=1e-8)
    assert squared_norms_L(torch.full((4096, 1, 1), 1.0078125, dtype=torch.bfloat16)).item() == pytest.approx(4096 * 1.0078125**2)


# -- every term by an independent formula -----------------------------------------------------------------------------


def slow(toy: Toy, name: str) -> float:
    """The term without its coefficient, position by position and feature by feature, from its published formula."""
    crosscoder, acts_BLD = toy.crosscoder, toy.acts_BLD
    W_enc, W_dec = crosscoder.W_enc_LDF.detach(), crosscoder.W_dec_FLD.detach()
    pre_BF = torch.einsum("bld,ldf->bf", acts_BLD, W_enc) + crosscoder.b_enc_F.detach()
    norm = [sum(W_dec[f, layer].norm().item() for layer in range(2)) for f in range(8)]
    positions, total = len(acts_BLD), 0.0
    for b in range(positions):
        row = pre_BF[b].tolist()
        if name == "l1":
            total += sum(max(0.0, row[f]) * norm[f] for f in range(8))
        elif name == "tanh":
            total += sum(math.tanh(4.0 * row[f] * norm[f]) for f in range(8) if row[f] > threshold(toy)[f])
        elif name == "pre_activation":
            total += sum(max(0.0, threshold(toy)[f] - row[f]) * norm[f] for f in range(8))
        elif name == "l0_target":
            total += sum(row[f] > threshold(toy)[f] for f in range(8))
        elif name == "gated":
            x_LD = crosscoder.b_dec_LD.detach() + sum(max(0.0, row[f]) * W_dec[f] for f in range(8))
            total += (acts_BLD[b] - x_LD).square().sum().item()
    if name == "l0_target":
        return (total / positions / 2.0 - 1.0) ** 2
    if name == "orthogonality":
        assert toy.values.sample_J is not None
        chosen = toy.values.sample_J.tolist()
        pairs = [(f, g) for f in chosen for g in chosen if f != g]
        flat = W_dec.flatten(1)
        return sum((flat[f] @ flat[g] / flat[f].norm() / flat[g].norm()).item() ** 2 for f, g in pairs) / len(pairs)
    if name == "auxk":
        return slow_auxk(toy, pre_BF) * acts_BLD.square().sum().item() / positions
    return total / positions


def threshold(toy: Toy) -> list[float]:
    found: list[float] = toy.crosscoder.state_dict()["activation_function.log_threshold_F"].exp().tolist()
    return found


def slow_auxk(toy: Toy, pre_BF: Tensor) -> float:
    """The share of the residual left by the two strongest dead features of each position."""
    W_dec = toy.crosscoder.W_dec_FLD.detach()
    features_BF = toy.crosscoder.encode_as_trained(toy.acts_BLD).detach()
    residual_BLD = toy.acts_BLD - toy.crosscoder.decode(features_BF).detach()
    left = total = 0.0
    for b in range(len(pre_BF)):
        strength = {j: pre_BF[b, j].item() * sum(W_dec[j, layer].norm().item() for layer in range(2)) for j in toy.dead_J.tolist()}
        strongest = sorted(strength, key=lambda j: strength[j], reverse=True)[:2]
        model_LD = sum(max(0.0, pre_BF[b, j].item()) * W_dec[j] for j in strongest)
        left += (residual_BLD[b] - model_LD).square().sum().item()
        total += residual_BLD[b].square().sum().item()
    return left / total


@pytest.mark.parametrize("name", EACH_TERM)
def test_every_term_agrees_with_its_formula_written_out(name: str) -> None:
    toy = Toy(*EACH_TERM[name])
    outcome = toy.outcome(toy.dead_J)
    assert list(outcome.terms) == [name]
    assert outcome.terms[name].item() == pytest.approx(0.5 * slow(toy, name), rel=1e-5)
    assert outcome.terms[name].item() > 1e-4
    assert outcome.loss.item() == pytest.approx(outcome.reconstruction.item() + outcome.terms[name].item(), rel=1e-6)


@pytest.mark.parametrize("name", EACH_TERM)
def test_every_terms_weight_changes_the_gradient_of_what_is_stepped_on(name: str) -> None:
    function, loss = EACH_TERM[name]
    heavier = {name: {**loss[name], "coefficient": 5.0}}
    one, other = (toy.gradients(dead_J=toy.dead_J) for toy in (Toy(function, loss), Toy(function, heavier)))
    assert any(not torch.allclose(one[parameter], other[parameter]) for parameter in one)


def test_every_term_of_the_loss_has_a_function_and_these_tests() -> None:
    fields = {name for name, field in Loss.model_fields.items() if name != "reconstruction"}
    assert fields == set(EACH_TERM)
    assert set(TERMS) == {type(term) for _, loss in EACH_TERM.values() for term in train_config_loss(loss).terms().values()}


def train_config_loss(loss: dict[str, Any]) -> Loss:
    return Loss.model_validate(loss)


def test_a_term_that_no_function_gives_is_refused_before_training() -> None:
    class Unknown(Term):
        pass

    config = train_config()
    unknown = config.model_copy(update={"loss": config.loss.model_copy(update={"l1": Unknown(coefficient=1.0)})})
    with pytest.raises(KeyError, match="no function gives the term l1"):
        Objective(unknown, "cpu")


@pytest.mark.parametrize(
    ("function", "loss", "said"),
    [
        (RELU, {"l0_target": {"coefficient": 1.0, "target": 3}}, "only activation_function.kind jump_relu has"),
        (BATCH_TOPK, {"pre_activation": {}}, "use activation_function.kind jump_relu or relu"),
        (RELU, {"gated": {}}, "only activation_function.kind gated has"),
        (GATED, {"l1": {"coefficient": 1.0}}, "add `gated: {}` to the loss"),
        (RELU, {"reconstruction": {"prefixes": [4, 2]}}, r"prefixes is \[4, 2\], expected rising numbers below num_features, 8"),
        (RELU, {"reconstruction": {"prefixes": [8]}}, r"prefixes is \[8\]"),
        (RELU, {"l1": {"coefficient": 0.0}}, "set l1 to null instead"),
    ],
)
def test_terms_that_make_no_sense_together_are_refused_in_a_sentence(function: Any, loss: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        train_config(crosscoder={"num_features": 8, "activation_function": function}, loss=loss)


# -- reconstruction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reconstruction_by_its_formula(reduction: str) -> None:
    toy = Toy(RELU, {"reconstruction": {"reduction": reduction}})
    with torch.no_grad():
        error_BLD = toy.acts_BLD - toy.crosscoder.decode(toy.crosscoder.encode(toy.acts_BLD))
    expected = error_BLD.square().sum((1, 2)).mean() if reduction == "sum" else error_BLD.square().mean()
    assert toy.outcome().reconstruction.item() == pytest.approx(expected.item(), rel=1e-6)


def test_matryoshka_prefixes_must_reconstruct_alone() -> None:
    toy = Toy(RELU, {"reconstruction": {"prefixes": [2, 5]}}, crosscoder={"dense_rank": 2})
    with torch.no_grad():
        features_BF = toy.crosscoder.encode(toy.acts_BLD)
        errors = []
        for n in (2, 5, 8):
            kept_BF = torch.cat([features_BF[:, :n], torch.zeros(len(features_BF), 8 - n)], dim=1)
            errors.append((toy.acts_BLD - toy.crosscoder.decode(kept_BF, toy.acts_BLD)).square().sum((1, 2)).mean().item())
    assert toy.outcome().reconstruction.item() == pytest.approx(sum(errors) / 3, rel=1e-5)
    assert len(set(errors)) == 3


def test_predicting_the_mean_explains_nothing() -> None:
    toy = Toy(RELU, {})
    toy.mean_LD = toy.acts_BLD.mean(0)
    with torch.no_grad():
        toy.crosscoder.b_enc_F.fill_(-1e6)
        toy.crosscoder.b_dec_LD.copy_(toy.mean_LD)
    outcome = toy.outcome()
    assert outcome.firings_F.sum() == 0
    torch.testing.assert_close(outcome.residual_L, outcome.variance_L)


def test_the_decoder_of_a_layer_writes_that_layer_only() -> None:
    toy = Toy(RELU, {})
    outcome = toy.outcome()
    grads = torch.autograd.grad(outcome.loss, [toy.crosscoder.W_dec_FLD])[0]
    assert (grads != 0).any(dim=(0, 2)).all()
    with torch.no_grad():
        features_BF = toy.crosscoder.encode(toy.acts_BLD)
        before_BLD = toy.crosscoder.decode(features_BF)
        toy.crosscoder.W_dec_FLD[:, 1] += 1.0
        after_BLD = toy.crosscoder.decode(features_BF)
    assert torch.equal(before_BLD[:, 0], after_BLD[:, 0])
    assert not torch.allclose(before_BLD[:, 1], after_BLD[:, 1])


# -- auxiliary ------------------------------------------------------------------------------------------------------------


def test_auxk_of_a_perfect_reconstruction_is_zero_and_not_nan() -> None:
    toy = Toy(BATCH_TOPK, EACH_TERM["auxk"][1])
    toy.acts_BLD = toy.crosscoder.b_dec_LD.detach().expand(12, 2, 4).clone()
    with torch.no_grad():
        toy.crosscoder.b_enc_F.fill_(-1e6)
    outcome = toy.outcome(toy.dead_J)
    gradients = toy.gradients(outcome)
    assert outcome.terms["auxk"].item() == 0.0
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_without_dead_features_the_auxiliary_term_is_exactly_zero() -> None:
    outcome = Toy(BATCH_TOPK, EACH_TERM["auxk"][1]).outcome(None)
    assert outcome.terms["auxk"].item() == 0.0
    assert outcome.loss.item() == outcome.reconstruction.item()


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("function", [RELU, BATCH_TOPK, JUMP_RELU], ids=lambda function: function["kind"])
def test_the_auxiliary_loss_alone_reaches_dead_features_even_those_that_are_negative_everywhere(function: Any, k: int) -> None:
    toy = Toy(function, {"auxk": {"coefficient": 0.5, "k": k}}, positions=64)
    with torch.no_grad():  # features 1, 4 and 6 are below zero at every position
        toy.crosscoder.b_enc_F[toy.dead_J] = -100.0
    without, with_auxk = toy.gradients(), toy.gradients(dead_J=toy.dead_J)
    for name, axis in (("parameterization.W_enc_LDF", 2), ("b_enc_F", 0)):
        assert (without[name].index_select(axis, toy.dead_J) == 0).all(), "dead for the main loss, or this test shows nothing"
        reached = (
            with_auxk[name].index_select(axis, toy.dead_J).abs().movedim(axis, 0).flatten(1)
            if axis
            else with_auxk[name][toy.dead_J][:, None].abs()
        )
        assert (reached.sum(1) > 0).any() if k == 1 else (reached.sum(1) > 0).all()


def test_the_auxiliary_loss_gives_living_features_no_gradient() -> None:
    toy = Toy({"kind": "batch_topk", "k": 1}, EACH_TERM["auxk"][1])
    one, other = toy.gradients(), toy.gradients(dead_J=toy.dead_J)
    alive = [0, 2, 3, 5, 7]
    torch.testing.assert_close(one["parameterization.W_enc_LDF"][:, :, alive], other["parameterization.W_enc_LDF"][:, :, alive])
    torch.testing.assert_close(one["parameterization.W_dec_FLD"][alive], other["parameterization.W_dec_FLD"][alive])
    torch.testing.assert_close(one["b_dec_LD"], other["b_dec_LD"])


# -- parts of a batch, masks, precision -----------------------------------------------------------------------------------

PARTS = {
    **EACH_TERM,
    "topk": ({"kind": "topk", "k": 2}, {"auxk": {"k": 2}}),
    "prefixes": (BATCH_TOPK, {"reconstruction": {"prefixes": [3]}, "auxk": {"k": 1}}),
    "mean": (RELU, {"reconstruction": {"reduction": "mean"}, "l1": {"coefficient": 1.0, "positions": "sum"}}),
}


@pytest.mark.parametrize("mask_rate", [0.0, 0.4])
@pytest.mark.parametrize("name", PARTS)
def test_the_parts_of_a_batch_add_up_to_the_whole(name: str, mask_rate: float) -> None:
    toy = Toy(*PARTS[name], layer_mask_rate=mask_rate)
    whole = toy.outcome(toy.dead_J)
    expected = toy.gradients(whole)
    sizes = [5, 5, 2]
    parts = toy.acts_BLD.split(sizes)
    kept = [None] * 3 if toy.values.keep_BL is None else toy.values.keep_BL.split(sizes)
    values = [toy.values._replace(keep_BL=keep_BL) for keep_BL in kept]
    objective = Objective(toy.config, "cpu")
    sums = objective.batch_sums(toy.crosscoder, parts, toy.mean_LD, values)
    outcomes = [
        objective(toy.crosscoder, part_BLD, toy.mean_LD, of_part, toy.dead_J, sums) for part_BLD, of_part in zip(parts, values, strict=True)
    ]
    toy.crosscoder.zero_grad()
    for outcome in outcomes:
        outcome.loss.backward()
    found = {name: p.grad for name, p in toy.crosscoder.named_parameters() if p.grad is not None}
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-5)
    added = Outcome.added([outcome._replace(loss=outcome.loss.detach()) for outcome in outcomes])
    torch.testing.assert_close(added.loss, whole.loss.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(added.firings_F, whole.firings_F)


def test_a_masked_layer_is_the_mean_for_the_encoder_and_still_to_be_reconstructed() -> None:
    toy = Toy(RELU, {}, layer_mask_rate=0.5)
    toy.mean_LD = torch.randn(2, 4)
    keep_BL = toy.values.keep_BL
    assert keep_BL is not None
    assert 0 < keep_BL.sum() < keep_BL.numel()
    assert (keep_BL.sum(1) >= 1).all(), "a position keeps a layer"
    seen_BLD = torch.where(keep_BL[..., None] > 0, toy.acts_BLD, toy.mean_LD)
    with torch.no_grad():
        residual_BLD = toy.acts_BLD - toy.crosscoder.decode(toy.crosscoder.encode(seen_BLD))
    torch.testing.assert_close(toy.outcome().residual_L, residual_BLD.square().sum((0, 2)))


def test_the_values_of_a_step_are_what_is_drawn_from_torchs_generator() -> None:
    toy = Toy(RELU, {"orthogonality": {"coefficient": 1.0, "sample": 3}}, layer_mask_rate=0.3)
    drawn: list[StepValues] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(step_values(toy.config, scheduled_numbers(toy.config, 1, 10), batch_shape=(50, 2), device=CPU))
    assert drawn[0].keep_BL is not None
    assert torch.equal(drawn[0].keep_BL, drawn[1].keep_BL)
    assert not torch.equal(drawn[0].keep_BL, drawn[2].keep_BL)
    assert len(set(drawn[0].sample_J.tolist())) == 3


@pytest.mark.parametrize("name", PARTS)
def test_bfloat16_autocast_stays_near_float32_and_keeps_weights_and_loss_in_float32(name: str) -> None:
    function, loss = PARTS[name]
    exact, rounded = (Toy(function, loss, positions=64, precision=precision) for precision in ("float32", "bfloat16"))
    one, other = exact.outcome(exact.dead_J), rounded.outcome(rounded.dead_J)
    assert other.loss.dtype == torch.float32
    assert other.loss.item() != one.loss.item()
    assert other.loss.item() == pytest.approx(one.loss.item(), rel=0.03)
    other.loss.backward()
    parameters = [p for p in rounded.crosscoder.parameters() if p.grad is not None]
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)
