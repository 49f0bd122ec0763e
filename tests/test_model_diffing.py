"""What a crosscoder of two models says of their difference: norms by hand, latent scaling against least squares a feature at a time."""

from typing import Any

import pytest
import torch
from evaluation_pieces import D_MODEL
from torch import Tensor

from pipeline.activations.source import LayerStatistics, Provenance
from pipeline.config.crosscoder import CrosscoderConfig, Group, Relu
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.normalizer import Normalizer
from pipeline.evaluation.model_diffing import ModelDifference, ModelDiffing, diffings_of

LAYERS = ["base/h.0", "chat/h.2", "base/h.2", "chat/h.0", "chat/h.1"]
"""The last one has none beside it in the other model, and their order differs."""
PAIRED = [([0, 2], [3, 1])]
FEATURES = 10


def trained_on(layers: list[str], *, dense_rank: int = 0, groups: list[Group] | None = None, seed: int = 0) -> TrainedCrosscoder:
    config = CrosscoderConfig(num_features=FEATURES, activation_function=Relu(), dense_rank=dense_rank, groups=groups or [])
    crosscoder = Crosscoder(config, layers=layers, d_model=D_MODEL, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in crosscoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    mean_LD = torch.randn(len(layers), D_MODEL, generator=generator, dtype=torch.float64)
    statistics = LayerStatistics(mean_LD, mean_LD.square().sum(1) + torch.rand(len(layers), generator=generator).double() + 0.5, 1000)
    normalizer = Normalizer.from_statistics(statistics, config.normalization)
    facts: dict[str, Any] = {"step": 1, "tokens_trained": 1, "dead_window_tokens": 1, "identity": "", "activations_id": ""}
    facts |= {"batch_positions": 8, "provenance": Provenance("", "", "", 16, [0])}
    since_F = torch.zeros(FEATURES, dtype=torch.int64)
    return TrainedCrosscoder(config, layers, crosscoder.requires_grad_(False), normalizer, tokens_since_fired_F=since_F, **facts)


def acts_of(trained: TrainedCrosscoder, positions: int = 40) -> Tensor:
    """Raw activations that are Gaussian in the crosscoder's units."""
    x_NLD = torch.randn(positions, len(trained.layers), D_MODEL, generator=torch.Generator().manual_seed(3))
    return trained.normalizer.denormalize(x_NLD)


def measured(trained: TrainedCrosscoder, acts_NLD: Tensor) -> ModelDifference:
    (diffing,) = diffings_of(trained, ["base", "chat"])
    for part_NLD in torch.split(acts_NLD, 17):
        diffing.add(part_NLD, trained.encode(part_NLD))
    return diffing.results()


def slow_betas(trained: TrainedCrosscoder, acts_NLD: Tensor, own_F: list[int]) -> tuple[Tensor, Tensor]:
    """beta_error_F2 and beta_reconstruction_F2 by a least-squares solver, a feature at a time, in float64."""
    x_NLD, f_NF = trained.normalizer.normalize(acts_NLD).double(), trained.encode(acts_NLD).double()
    crosscoder = trained.crosscoder.double()
    x_hat_NLD = crosscoder.decode(f_NF, x_NLD)
    d_FLD = crosscoder.W_dec_FLD
    betas = torch.empty(2, FEATURES, 2, dtype=torch.float64)
    for feature in range(FEATURES):
        written_NLD = f_NF[:, feature, None, None] * d_FLD[feature]
        ((base, chat),) = PAIRED
        sites = [base, chat]
        one_way = written_NLD[:, sites[own_F[feature]]].reshape(-1, 1)
        for model, at in enumerate(sites):
            shown = [x_NLD[:, at] - (x_hat_NLD[:, at] - written_NLD[:, at]), x_hat_NLD[:, at]]
            for kind, y in enumerate(shown):
                betas[kind, feature, model] = torch.linalg.lstsq(one_way, y.reshape(-1, 1)).solution.item()
    crosscoder.float()
    return betas[0], betas[1]


@pytest.mark.parametrize("dense_rank", [0, 2])
def test_latent_scaling_agrees_with_least_squares_a_feature_at_a_time(dense_rank: int) -> None:
    trained = trained_on(LAYERS, dense_rank=dense_rank)
    acts_NLD = acts_of(trained)
    found = measured(trained, acts_NLD)
    assert bool(found.fires_F.all())
    norms_FL = trained.crosscoder.W_dec_FLD.double().norm(dim=-1)
    base_F, chat_F = norms_FL[:, [0, 2]].square().sum(1), norms_FL[:, [1, 3, 4]].square().sum(1)
    own_F = (chat_F > base_F).long()
    assert 0 < own_F.sum() < FEATURES
    error_F2, reconstruction_F2 = slow_betas(trained, acts_NLD, own_F.tolist())
    assert found.sites == ["h.0", "h.2"]
    # Sums of 40 x 32 products that float32 rounds; betas are of the order of one.
    near: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.beta_error_F2, error_F2, **near)
    torch.testing.assert_close(found.beta_reconstruction_F2, reconstruction_F2, **near)
    for nu_F, beta_F2 in ((found.nu_error_F, found.beta_error_F2), (found.nu_reconstruction_F, found.beta_reconstruction_F2)):
        expected = [float(beta_F2[feature, 1 - own] / beta_F2[feature, own]) for feature, own in enumerate(own_F.tolist())]
        assert nu_F.tolist() == pytest.approx(expected, rel=1e-12)


def exact(trained: TrainedCrosscoder, decoders: list[list[float]]) -> None:
    """Two sites, base/h.0 and chat/h.0: feature j reads number j of the chat site and writes it, and in base, so many times."""
    stored: Any = trained.crosscoder.parameterization
    for parameter in trained.crosscoder.parameters():
        parameter.zero_()
    for feature, row in enumerate(decoders):
        stored.W_enc_LDF[1, feature, feature] = 1.0
        for layer, times in enumerate(row):
            stored.W_dec_FLD[feature, layer, feature] = times


def raw(trained: TrainedCrosscoder, x_NLD: Tensor) -> Tensor:
    """Activations that the crosscoder sees as these."""
    return trained.normalizer.denormalize(x_NLD)


def test_a_feature_that_the_base_model_lacks_is_told_from_one_whose_decoder_only_shrank() -> None:
    """Both write in chat alone; of the second, base has 0.9 times as much, which its own sites' error still holds."""
    trained = trained_on(["base/h.0", "chat/h.0"])
    exact(trained, [[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.5], [1.0, 0.5]])
    x_NLD = torch.zeros(5, 2, D_MODEL)
    for position, base in enumerate((0.0, 0.9, 1.0, 2.0, 1.0)):
        x_NLD[position, 1, position] = 3.0
        x_NLD[position, 0, position] = 3.0 * base
    found = measured(trained, raw(trained, x_NLD))
    # (1 + (1 - 0) / 1) / 2, ..., (1 + (0.5 - 2) / 2) / 2, (1 + (0.5 - 1) / 1) / 2
    assert found.norm_difference_F[:5].tolist() == [1.0, 1.0, 0.5, 0.125, 0.25]
    # Feature 2 is alike in both, so it counts as base's own, and chat is the foreign model.
    assert found.nu_error_F[:5].tolist() == pytest.approx([0.0, 0.9, 1.0, 0.5, 1.0], abs=1e-5)
    assert found.nu_reconstruction_F[:5].tolist() == pytest.approx([0.0, 0.0, 1.0, 0.25, 0.5], abs=1e-5)
    assert found.fires_F.tolist() == [True] * 5 + [False] * 5
    assert bool(found.nu_error_F[5:].isnan().all())
    classes = {row.name: row for row in found.classes()}
    assert {name: row.features for name, row in classes.items()} == {"only_base": 0, "shared": 1, "only_chat": 2, "between": 2}
    assert classes["only_chat"].absent == 1
    assert classes["only_chat"].fraction == 0.4
    assert classes["only_base"].nu_error is None


def test_a_concept_that_two_features_split_shows_in_the_reconstruction() -> None:
    """Latent decoupling: base's part of the concept is written by a feature of base alone."""
    trained = trained_on(["base/h.0", "chat/h.0"])
    exact(trained, [[0.0, 1.0], [1.0, 0.0]])
    stored: Any = trained.crosscoder.parameterization
    stored.W_enc_LDF[1, :, 1] = stored.W_enc_LDF[1, :, 0]
    stored.W_dec_FLD[1, 0] = stored.W_dec_FLD[0, 1]
    x_NLD = torch.zeros(4, 2, D_MODEL)
    x_NLD[:, :, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    found = measured(trained, raw(trained, x_NLD))
    assert found.norm_difference_F[:2].tolist() == [1.0, 0.0]
    assert found.nu_error_F[:2].tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert found.nu_reconstruction_F[:2].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert [row.absent for row in found.classes() if row.name.startswith("only_")] == [0, 0]


def test_models_without_a_site_in_common_are_compared_by_norms_alone() -> None:
    trained = trained_on(["base/h.0", "chat/h.1"])
    found = measured(trained, acts_of(trained))
    assert found.sites == []
    assert bool(found.fires_F.all())
    assert sum(row.features for row in found.classes()) == FEATURES
    assert {row.nu_error for row in found.classes()} == {None}


def test_every_two_models_that_are_written_are_compared() -> None:
    layers = ["a/h.0", "b/h.0", "c/h.0", "d/h.0"]
    trained = trained_on(layers, groups=[Group(features=6, writes=layers[:2]), Group(features=4, writes=["a/h.0", "c/h.0"])])
    names = [diffing.results().name for diffing in diffings_of(trained, ["a", "b", "c", "d"])]
    assert names == ["a-b", "a-c", "b-c"]
    assert diffings_of(trained_on(["h.0", "h.1"]), [""]) == []
    (pair,) = [ModelDiffing(trained, "b", "c")]
    acts_NLD = acts_of(trained)
    pair.add(acts_NLD, trained.encode(acts_NLD))
    assert pair.results().norm_difference_F.tolist() == [0.0] * 6 + [1.0] * 4
