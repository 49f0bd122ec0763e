"""The crosscoder's formulas, its first weights, and the units that it works in."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_activations import random_activations

from pipeline.activations.source import LayerStatistics
from pipeline.config.crosscoder import CrosscoderConfig, Normalization
from pipeline.config.errors import UserError
from pipeline.config.schema import build
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.normalizer import Normalizer


def crosscoder(seed: int = 0, **initialization: Any) -> Crosscoder:
    values = {"num_features": 9, "activation_function": {"kind": "relu"}, "initialization": initialization}
    return Crosscoder(build(CrosscoderConfig, values, "test"), layers=["a", "b", "c"], d_model=4, seed=seed)


def statistics_of(acts_BLD: torch.Tensor) -> LayerStatistics:
    exact = acts_BLD.double()
    return LayerStatistics.from_sums(exact.sum(0), exact.square().sum((0, 2)), acts_BLD.shape[0], exact.norm(dim=-1).sum(0))


def test_encode_and_decode_agree_with_a_loop_over_features_and_layers() -> None:
    torch.manual_seed(0)
    model = crosscoder()
    with torch.no_grad():
        model.b_enc_F.normal_()
        model.b_dec_LD.normal_()
        acts_BLD = torch.randn(5, 3, 4)
        features_BF = model.encode(acts_BLD)
        decoded_BLD = model.decode(features_BF)
    for b in range(5):
        expected_LD = model.b_dec_LD.detach().clone()
        for f in range(9):
            pre = model.b_enc_F[f] + sum(acts_BLD[b, layer] @ model.W_enc_LDF[layer, :, f] for layer in range(3))
            assert features_BF[b, f].item() == pytest.approx(max(0.0, pre.item()), abs=1e-5)
            expected_LD += features_BF[b, f] * model.W_dec_FLD[f].detach()
        torch.testing.assert_close(decoded_BLD[b], expected_LD)


@pytest.mark.parametrize("center", [True, False])
def test_normalized_activations_have_mean_squared_norm_d_model_in_each_layer(center: bool) -> None:
    raw_BLD = random_activations(500, d_model=6) * torch.tensor([1.0, 40.0])[:, None]
    normalizer = Normalizer.from_statistics(statistics_of(raw_BLD), Normalization(center=center))
    acts_BLD = normalizer.normalize(raw_BLD)
    torch.testing.assert_close(acts_BLD.square().sum(-1).mean(0), torch.full((2,), 6.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(acts_BLD.mean(0), normalizer.normalized_mean(), rtol=0, atol=1e-4)
    assert bool((normalizer.normalized_mean() == 0).all()) == center


@pytest.mark.parametrize("center", [True, False])
def test_denormalize_undoes_normalize(center: bool) -> None:
    raw_BLD = random_activations(50)
    normalizer = Normalizer.from_statistics(statistics_of(raw_BLD), Normalization(center=center))
    torch.testing.assert_close(normalizer.denormalize(normalizer.normalize(raw_BLD)), raw_BLD)


def test_without_scaling_activations_keep_their_unit() -> None:
    raw_BLD = random_activations(50)
    normalizer = Normalizer.from_statistics(statistics_of(raw_BLD), Normalization(center=False, scale="none"))
    assert torch.equal(normalizer.normalize(raw_BLD), raw_BLD)


def test_half_precision_activations_are_normalized_in_float32() -> None:
    raw_BLD = random_activations(50).half()
    normalizer = Normalizer.from_statistics(statistics_of(raw_BLD), Normalization())
    assert normalizer.normalize(raw_BLD).dtype == torch.float32
    torch.testing.assert_close(normalizer.normalize(raw_BLD), normalizer.normalize(raw_BLD.float()))


def test_a_layer_that_never_varies_is_refused() -> None:
    raw_BLD = random_activations(50)
    raw_BLD[:, 1] = 0.0
    with pytest.raises(UserError, match="layer 1 of the activations never varies"):
        Normalizer.from_statistics(statistics_of(raw_BLD), Normalization())


@pytest.mark.parametrize("center", [True, False])
def test_activations_may_be_scaled_by_their_mean_norm(center: bool) -> None:
    raw_BLD = random_activations(50)
    normalizer = Normalizer.from_statistics(statistics_of(raw_BLD), Normalization(center=center, scale="mean_norm"))
    torch.testing.assert_close(normalizer.scale_L, 6**0.5 / raw_BLD.norm(dim=-1).mean(0))


def test_a_set_without_mean_norms_is_refused_where_they_are_needed() -> None:
    statistics = replace(statistics_of(random_activations(50)), mean_norm_L=None)
    with pytest.raises(UserError, match="which this set was made without; cache it again"):
        Normalizer.from_statistics(statistics, Normalization(scale="mean_norm"))
