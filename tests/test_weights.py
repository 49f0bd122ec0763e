"""How a crosscoder's weights are stored, and what they are before the first step."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.crosscoder import CrosscoderConfig, Initialization
from pipeline.config.errors import UserError
from pipeline.config.schema import build
from pipeline.crosscoder.initialization import DIRECTIONS, initial_weights
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.weights import PARAMETERIZATIONS, Weights

LAYERS, WIDTH, FEATURES = 3, 4, 40
NAMES = ["a", "b", "c"]


def crosscoder(**settings: Any) -> Crosscoder:
    values = {"num_features": FEATURES, "activation_function": {"kind": "relu"}, **settings}
    return Crosscoder(build(CrosscoderConfig, values, "test"), layers=NAMES, d_model=WIDTH, seed=0)


def drawn(seed: int = 0, data_NLD: Tensor | None = None, **settings: Any) -> Weights:
    return initial_weights(build(Initialization, settings, "test"), LAYERS, WIDTH, FEATURES, seed, data_NLD)


# -- parameterizations ------------------------------------------------------------------------------------------------


def test_aligned_encoders_and_decoders_have_inner_product_one_whatever_is_stored() -> None:
    model = crosscoder(parameterization={"kind": "aligned"})
    with torch.no_grad():
        for parameter in model.parameterization.parameters():
            parameter.add_(torch.randn_like(parameter))
    inner_F = torch.einsum("ldf,fld->f", model.W_enc_LDF, model.W_dec_FLD)
    # 12 products and their sum in float32, of numbers of order 1.
    torch.testing.assert_close(inner_F, torch.ones(FEATURES), rtol=0, atol=1e-4)
    model.W_enc_LDF.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameterization.parameters())


def test_an_aligned_feature_alone_reads_its_own_coefficient_back() -> None:
    model = crosscoder(parameterization={"kind": "aligned"})
    with torch.no_grad():
        acts_BLD = 2.5 * model.W_dec_FLD
        pre_BF = model.pre_activations(acts_BLD, model.W_enc_LDF)
    torch.testing.assert_close(pre_BF.diagonal(), torch.full((FEATURES,), 2.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rank", [2, 12])
def test_factorized_weights_have_the_rank_asked_for_and_the_first_weights_norms(rank: int) -> None:
    model, free = crosscoder(parameterization={"kind": "factorized", "rank": rank}), crosscoder()
    for found, first in ((model.W_enc_LDF.permute(2, 0, 1), free.W_enc_LDF.permute(2, 0, 1)), (model.W_dec_FLD, free.W_dec_FLD)):
        assert torch.linalg.matrix_rank(found.detach().flatten(1).double(), rtol=1e-5) == rank
        torch.testing.assert_close(found.flatten(1).norm(dim=1), first.flatten(1).norm(dim=1))
        if rank == LAYERS * WIDTH:
            torch.testing.assert_close(found, first)
    torch.testing.assert_close(model.W_enc_LDF, model.W_dec_FLD.permute(1, 2, 0))


def test_a_rank_beyond_all_directions_is_refused() -> None:
    with pytest.raises(UserError, match="rank is 13, but 3 layers of width 4 have no more directions"):
        crosscoder(parameterization={"kind": "factorized", "rank": 13})


def test_the_dense_path_begins_as_nothing_and_learns() -> None:
    model, plain = crosscoder(dense_rank=2), crosscoder()
    acts_BLD = torch.randn(5, LAYERS, WIDTH)
    features_BF = model.encode(acts_BLD)
    assert torch.equal(model.decode(features_BF, acts_BLD), plain.decode(plain.encode(acts_BLD)))
    assert model.dense is not None
    (model.decode(features_BF, acts_BLD) - acts_BLD).square().sum().backward()
    assert model.dense.write_RC.grad is not None
    assert model.dense.write_RC.grad.abs().sum() > 0
    with torch.no_grad():
        model.dense.write_RC.normal_()
        by_hand_BLD = plain.decode(features_BF) + (acts_BLD.flatten(1) @ model.dense.read_CR @ model.dense.write_RC).view(5, LAYERS, WIDTH)
    torch.testing.assert_close(model.decode(features_BF, acts_BLD), by_hand_BLD)
    with pytest.raises(ValueError, match="its reconstruction needs the activations too"):
        model.decode(features_BF)


@pytest.mark.parametrize("parameterization", [{"kind": "free"}, {"kind": "aligned"}, {"kind": "factorized", "rank": 5}])
def test_a_crosscoder_without_a_seed_takes_the_weights_of_another(parameterization: dict[str, Any]) -> None:
    settings = {"parameterization": parameterization, "dense_rank": 2, "activation_function": {"kind": "jump_relu"}}
    model = crosscoder(**settings)
    values = {"num_features": FEATURES, "activation_function": {"kind": "relu"}, **settings}
    empty = Crosscoder(build(CrosscoderConfig, values, "test"), layers=NAMES, d_model=WIDTH)
    empty.load_state_dict(model.state_dict())
    acts_BLD = torch.randn(5, LAYERS, WIDTH)
    assert torch.equal(empty.encode(acts_BLD), model.encode(acts_BLD))


def test_every_kind_of_parameterization_and_of_drawing_is_known() -> None:
    kinds = {"free", "aligned", "factorized"}
    assert {settings.model_fields["kind"].default for settings in PARAMETERIZATIONS} == kinds
    assert set(DIRECTIONS) == {"random_directions", "same_direction", "kaiming_uniform", "data_points"}


# -- the first weights ------------------------------------------------------------------------------------------------


def test_decoders_begin_with_the_norm_asked_for_in_every_layer_and_encoders_as_their_transpose() -> None:
    for decoder in ("random_directions", "same_direction", "kaiming_uniform"):
        weights = drawn(decoder=decoder, decoder_norm=0.37)
        torch.testing.assert_close(weights.W_dec_FLD.norm(dim=-1), torch.full((FEATURES, LAYERS), 0.37))
        assert torch.equal(weights.W_enc_LDF, weights.W_dec_FLD.permute(1, 2, 0))


def test_an_encoder_drawn_on_its_own_has_the_same_norms_and_other_directions() -> None:
    weights = drawn(decoder_norm=0.37, encoder="random_directions")
    torch.testing.assert_close(weights.W_enc_LDF.norm(dim=1), torch.full((LAYERS, FEATURES), 0.37))
    cosines = (weights.W_enc_LDF.permute(2, 0, 1) * weights.W_dec_FLD).sum(-1) / 0.37**2
    assert cosines.abs().mean() < 0.9


def test_an_encoder_may_have_a_norm_of_its_own() -> None:
    weights = drawn(decoder_norm=0.1, encoder_norm=2.0)
    torch.testing.assert_close(weights.W_enc_LDF.norm(dim=1), torch.full((LAYERS, FEATURES), 2.0))
    torch.testing.assert_close(weights.W_enc_LDF.permute(2, 0, 1) / 20.0, weights.W_dec_FLD)


def test_the_same_direction_stands_in_every_layer() -> None:
    W_dec_FLD = drawn(decoder="same_direction").W_dec_FLD
    assert torch.equal(W_dec_FLD[:, 0], W_dec_FLD[:, 1])
    assert torch.equal(W_dec_FLD[:, 0], W_dec_FLD[:, 2])
    assert not torch.equal(W_dec_FLD[0], W_dec_FLD[1])


@pytest.mark.parametrize(
    ("fan_in", "gain", "encoder_bound", "decoder_bound"),
    [
        ("inputs", "by_role", math.sqrt(2) * math.sqrt(3 / 12), math.sqrt(3 / 40)),
        ("storage", "sqrt_5", 1 / math.sqrt(160), 1 / math.sqrt(12)),
    ],
)
def test_kaiming_bounds_by_hand(fan_in: str, gain: str, encoder_bound: float, decoder_bound: float) -> None:
    # 3 layers of width 4 and 40 features: 12 inputs of the encoder, 40 of the decoder; stored [3, 4, 40] and [40, 3, 4].
    kinds = {"decoder": "kaiming_uniform", "encoder": "kaiming_uniform", "decoder_norm": None}
    weights = drawn(**kinds, kaiming_fan_in=fan_in, kaiming_gain=gain)
    for found, bound in ((weights.W_enc_LDF, encoder_bound), (weights.W_dec_FLD, decoder_bound)):
        assert 0.95 * bound < found.abs().max().item() <= bound
        assert found.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_kaiming_agrees_with_torchs_own_on_the_stored_shapes() -> None:
    torch.manual_seed(0)
    for shape, encoder in (((LAYERS, WIDTH, FEATURES), True), ((FEATURES, LAYERS, WIDTH), False)):
        theirs = torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
        kinds = {"decoder": "kaiming_uniform", "encoder": "kaiming_uniform", "decoder_norm": None}
        ours = drawn(**kinds, kaiming_fan_in="storage", kaiming_gain="sqrt_5")
        found = ours.W_enc_LDF if encoder else ours.W_dec_FLD
        assert found.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.05)


def test_a_kaiming_encoder_keeps_its_own_norm_beside_a_decoder_that_is_scaled() -> None:
    kinds = {"decoder": "kaiming_uniform", "encoder": "kaiming_uniform"}
    scaled, free = drawn(**kinds, decoder_norm=0.08), drawn(**kinds, decoder_norm=None)
    assert torch.equal(scaled.W_enc_LDF, free.W_enc_LDF)
    torch.testing.assert_close(scaled.W_dec_FLD.norm(dim=-1), torch.full((FEATURES, LAYERS), 0.08))


def test_data_points_are_centered_positions_of_the_data_each_once_while_there_are_enough() -> None:
    data_NLD = torch.randn(60, LAYERS, WIDTH) + 3.0
    W_dec_FLD = drawn(data_NLD=data_NLD, decoder="data_points", decoder_norm=None).W_dec_FLD
    centered_NLD = data_NLD - data_NLD.mean(0)
    matches_FN = (W_dec_FLD[:, None] - centered_NLD[None]).abs().amax((2, 3)) < 1e-6
    assert (matches_FN.sum(1) == 1).all()
    assert (matches_FN.sum(0) <= 1).all()
    with pytest.raises(UserError, match="needs activations to draw from"):
        drawn(decoder="data_points")


def test_the_seed_decides_the_first_weights() -> None:
    for decoder in ("random_directions", "same_direction", "kaiming_uniform"):
        assert torch.equal(drawn(1, decoder=decoder).W_dec_FLD, drawn(1, decoder=decoder).W_dec_FLD)
        assert not torch.equal(drawn(1, decoder=decoder).W_dec_FLD, drawn(2, decoder=decoder).W_dec_FLD)
