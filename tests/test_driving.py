"""By how many layers features are driven: worked by hand, and against encoding again with a layer masked."""

import evaluation_pieces
import pytest
import torch
from evaluation_pieces import LAYERS, Pieces, random_crosscoder
from torch import Tensor

from pipeline.config.crosscoder import Aligned, BatchTopk, CrosscoderConfig, Gated, Group, JumpRelu, Normalization, Relu
from pipeline.crosscoder.checkpoint import TrainedCrosscoder, load_crosscoder
from pipeline.crosscoder.model import Crosscoder
from pipeline.evaluation import driving
from pipeline.evaluation.driving import Driving, effective_number

pieces = evaluation_pieces.pieces

KINDS = {
    "relu": CrosscoderConfig(num_features=24, activation_function=Relu()),
    "batch_topk": CrosscoderConfig(num_features=24, activation_function=BatchTopk(k=3)),
    "jump_relu": CrosscoderConfig(num_features=24, activation_function=JumpRelu(initial_threshold=0.3)),
    "gated": CrosscoderConfig(num_features=24, activation_function=Gated()),
    "aligned, not centered": CrosscoderConfig(
        num_features=24, activation_function=Relu(), parameterization=Aligned(), normalization=Normalization(center=False)
    ),
    "groups": CrosscoderConfig(
        num_features=24, activation_function=Relu(), groups=[Group(features=10), Group(features=14, reads=[LAYERS[1]], writes=[LAYERS[1]])]
    ),
}


def trained_of(pieces: Pieces, kind: str) -> TrainedCrosscoder:
    config = KINDS[kind]
    if config.groups:
        crosscoder = Crosscoder(config, layers=LAYERS, d_model=evaluation_pieces.D_MODEL, seed=0)
    else:
        crosscoder = random_crosscoder(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        crosscoder.b_enc_F.copy_(torch.randn(24, generator=generator) * 0.1)
        if kind == "gated":
            for parameter in crosscoder.activation_function.parameters():
                parameter.copy_(torch.randn(24, generator=generator) * 0.2)
    return load_crosscoder(pieces.write_crosscoder(config, crosscoder, run=f"driving-{kind}"))


def activations(trained: TrainedCrosscoder) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(150, len(trained.layers), trained.d_model, generator=generator) * 0.3 + 0.1


def nearest_to_threshold(trained: TrainedCrosscoder, acts_NLD: Tensor) -> Tensor:
    """[N, F]: how far each feature's value is from its threshold."""
    gain_F, shift_F, threshold_F = trained.crosscoder.inference_form()
    pre_NF = trained.crosscoder.pre_activations(trained.normalizer.normalize(acts_NLD), trained.crosscoder.W_enc_LDF)
    return (pre_NF * gain_F + shift_F - threshold_F).abs()


@pytest.mark.parametrize("kind", list(KINDS))
def test_drops_and_survival_are_those_of_encoding_again_with_layers_masked(pieces: Pieces, kind: str) -> None:
    trained = trained_of(pieces, kind)
    acts_NLD = activations(trained)
    mean_LD = acts_NLD.double().mean(0) + 0.05
    features_NF = trained.encode(acts_NLD)
    measured = Driving(trained, mean_LD)
    for part in (slice(0, 40), slice(40, 150)):
        measured.add(acts_NLD[part], features_NF[part])
    fires_NF = features_NF > 0
    living_F = fires_NF.any(0)
    assert living_F.sum() > 5
    assert measured.firings_F.equal(fires_NF.sum(0))
    torch.testing.assert_close(measured.sum_activation_F, features_NF.double().sum(0))
    torch.testing.assert_close(measured.max_activation_F, features_NF.amax(0))
    for layer in range(2):
        masked_NLD, alone_NLD = acts_NLD.clone(), mean_LD.float().repeat(len(acts_NLD), 1, 1)
        masked_NLD[:, layer], alone_NLD[:, layer] = mean_LD[layer].float(), acts_NLD[:, layer]
        drop_F = ((features_NF - trained.encode(masked_NLD)) * fires_NF).double().sum(0) / features_NF.double().sum(0)
        survives_F = ((trained.encode(alone_NLD) > 0) & fires_NF).sum(0) / fires_NF.sum(0)
        # Sums of 32 products in float32; a threshold cuts them, and none lies within their rounding of it.
        assert nearest_to_threshold(trained, masked_NLD)[fires_NF].min() > 1e-6
        assert nearest_to_threshold(trained, alone_NLD)[fires_NF].min() > 1e-6
        torch.testing.assert_close(measured.drop_by_layer_FL[living_F, layer], drop_F[living_F], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(measured.survives_alone_FL[living_F, layer].float(), survives_F[living_F], rtol=1e-6, atol=0)
    assert not measured.drop_by_layer_FL[~living_F].any()
    if kind == "groups":
        assert not measured.drop_by_layer_FL[10:, 0].any()
        assert bool((effective_number(measured.drop_by_layer_FL.clamp(min=0))[10:] - 1 < 1e-9).all())


def test_what_drives_three_features_worked_by_hand(pieces: Pieces) -> None:
    """One position, two layers of width 16 whose first numbers are 3 and 1, means 0; encoders read first numbers alone."""
    config = CrosscoderConfig(num_features=4, activation_function=Relu(), normalization=Normalization(center=False, scale="none"))
    crosscoder = Crosscoder(config, layers=LAYERS, d_model=16, seed=0)
    with torch.no_grad():
        crosscoder.W_enc_LDF.zero_()
        # Feature 0: 3 + 1 = 4. Feature 1: layer 0 alone, 3. Feature 2: 3 - 2 + 1 x 2 of bias -2: 1. Feature 3 never fires.
        crosscoder.W_enc_LDF[:, 0] = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
        crosscoder.b_enc_F.copy_(torch.tensor([0.0, 0.0, -2.0, -1.0]))
        crosscoder.W_dec_FLD.zero_()
        crosscoder.W_dec_FLD[:, :, 0] = torch.tensor([[3.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    trained = load_crosscoder(pieces.write_crosscoder(config, crosscoder, run="by-hand"))
    acts_1LD = torch.zeros(1, 2, 16)
    acts_1LD[0, :, 0] = torch.tensor([3.0, 1.0])
    measured = Driving(trained, torch.zeros(2, 16, dtype=torch.float64))
    measured.add(acts_1LD, trained.encode(acts_1LD))
    assert measured.sum_activation_F.tolist() == [4, 3, 1, 0]
    # Without layer 0 they are 1, 0 and 0; without layer 1 they are 3, 3 and 1.
    assert measured.drop_by_layer_FL.tolist() == [[3 / 4, 1 / 4], [1, 0], [1, 0], [0, 0]]
    assert measured.survives_alone_FL.tolist() == [[1, 1], [1, 0], [1, 0], [0, 0]]
    found = measured.results()
    both = 4 / 3**0.75  # exp of the entropy of (3/4, 1/4)
    assert found.num_features == 3
    assert found.layers_driving == pytest.approx((both + 1 + 1) / 3)
    assert found.functional_coherence == pytest.approx((both - 1) / 3)
    assert found.layers_by_decoder_norm == pytest.approx((both + 1 + 2) / 3)
    assert found.quantiles["50"] == pytest.approx(1)
    assert found.drop_L == pytest.approx([(3 / 4 + 1 + 1) / 3, 1 / 12])
    assert found.survives_alone_L == pytest.approx([1, 1 / 3])


def test_the_effective_number_is_from_one_to_all() -> None:
    weights_FL = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 5.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert effective_number(weights_FL.double()).tolist() == pytest.approx([4, 1, 2, 1])


def test_parts_of_the_positions_add_up(pieces: Pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trained_of(pieces, "batch_topk")
    acts_NLD = activations(trained)
    features_NF, mean_LD = trained.encode(acts_NLD), acts_NLD.double().mean(0)
    whole = Driving(trained, mean_LD)
    whole.add(acts_NLD, features_NF)
    monkeypatch.setattr(driving, "NUMBERS_AT_A_TIME", 24 * 7)
    parts = Driving(trained, mean_LD)
    parts.add(acts_NLD, features_NF)
    torch.testing.assert_close(parts.drop_by_layer_FL, whole.drop_by_layer_FL, rtol=1e-6, atol=1e-8)
    assert parts.survives_alone_FL.equal(whole.survives_alone_FL)
    assert parts.firings_F.equal(whole.firings_F)


def test_without_positions_nothing_is_driven(pieces: Pieces) -> None:
    trained = trained_of(pieces, "relu")
    measured = Driving(trained, torch.zeros(2, 16, dtype=torch.float64))
    measured.add(torch.empty(0, 2, 16), torch.empty(0, 24))
    assert (measured.results().num_features, measured.results().layers_driving) == (0, None)
