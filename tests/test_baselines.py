"""Baselines: each against an independent formula on the same rows, and against what it says of its own fit."""

import evaluation_pieces
import numpy as np
import pytest
import torch
from evaluation_pieces import Pieces, batch_topk_config, random_crosscoder
from torch import Tensor

from pipeline.crosscoder.checkpoint import TrainedCrosscoder, load_crosscoder
from pipeline.evaluation import baselines, covariances
from pipeline.evaluation.approximations import Approximation, only_at
from pipeline.evaluation.baselines import Fit, fitted_baselines, rank_that_explains
from pipeline.evaluation.covariances import Covariances

pieces = evaluation_pieces.pieces
LAYERS = ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
D_MODEL = evaluation_pieces.D_MODEL


def activations(num_layers: int = 3, positions: int = 400) -> Tensor:
    """Rows whose layers depend on each other, with means and spreads of their own, [N, L, D] float32."""
    generator = torch.Generator().manual_seed(0)
    common_ND = torch.randn(positions, D_MODEL, generator=generator) * torch.linspace(0.2, 2, D_MODEL)
    layers = []
    for layer in range(num_layers):
        mixed_ND = common_ND @ torch.randn(D_MODEL, D_MODEL, generator=generator) / 4
        layers.append((layer + 1) * (mixed_ND + 0.3 * torch.randn(positions, D_MODEL, generator=generator)) + 5 * layer - 2)
    return torch.stack(layers, dim=1)


def fit_of(acts_NLD: Tensor, l0: float = 5.0) -> Fit:
    found = Covariances(torch.full(acts_NLD.shape[1:], 0.7))
    found.add(acts_NLD[:150])
    found.add(acts_NLD[150:])
    return Fit(found, acts_NLD, l0)


@pytest.fixture(scope="module")
def trained(pieces: Pieces) -> TrainedCrosscoder:
    config = batch_topk_config(num_features=64)
    return load_crosscoder(pieces.write_crosscoder(config, random_crosscoder(config, 3), run="three", layers=LAYERS))


@pytest.fixture(scope="module")
def found(trained: TrainedCrosscoder) -> dict[str, Approximation]:
    return {baseline.by: baseline for baseline in fitted_baselines(fit_of(activations()), trained, seed=3)}


def explained(acts_NLD: Tensor, values_NLD: Tensor) -> list[float]:
    errors_L = (acts_NLD.double() - values_NLD.double()).square().sum((0, 2))
    return (1 - errors_L / (acts_NLD.double() - acts_NLD.double().mean(0)).square().sum((0, 2))).tolist()


def least_squares(target_ND: np.ndarray, source_NS: np.ndarray) -> np.ndarray:
    """The best affine function of the source, at the rows it is fitted on."""
    inputs = np.column_stack([source_NS, np.ones(len(source_NS))])
    return inputs @ np.linalg.lstsq(inputs, target_ND, rcond=None)[0]


def test_every_baseline_explains_what_it_says_on_the_rows_that_it_was_fitted_on(found: dict[str, Approximation]) -> None:
    acts_NLD = activations()
    assert list(found) == ["affine", "affine_all", "other_layer_matched", "other_layer", "pca", "pca_joint", "random_dictionary"]
    for baseline in found.values():
        # Weights of principal directions and dictionaries are float32; the rest is float64.
        assert baseline.fitted == pytest.approx(explained(acts_NLD, baseline.give(acts_NLD)), rel=1e-5), baseline.by


def test_layers_beyond_the_crosscoders_change_nothing(found: dict[str, Approximation]) -> None:
    acts_NLD = activations()
    more_NXD = torch.cat([acts_NLD, torch.full_like(acts_NLD[:, :1], 1e3)], dim=1)
    for baseline in found.values():
        assert torch.equal(baseline.give(more_NXD), baseline.give(acts_NLD)), baseline.by


def test_affine_maps_are_least_squares_from_the_best_layer_and_from_all_others(found: dict[str, Approximation]) -> None:
    acts_NLD = activations()
    acts = acts_NLD.double().numpy()
    given, from_all = found["affine"].give(acts_NLD), found["affine_all"].give(acts_NLD)
    for layer in range(3):
        others = [other for other in range(3) if other != layer]
        candidates = {other: least_squares(acts[:, layer], acts[:, other]) for other in others}
        best = min(others, key=lambda other, of=candidates, at=layer: ((acts[:, at] - of[other]) ** 2).sum())  # type: ignore[misc]
        assert found["affine"].sources[layer] == LAYERS[best]
        # The ridge is 1e-6 of the mean variance; the smallest variance here is a hundredth of the mean.
        np.testing.assert_allclose(given[:, layer], candidates[best], atol=1e-3)
        together = least_squares(acts[:, layer], acts[:, others].reshape(len(acts), -1))
        np.testing.assert_allclose(from_all[:, layer], together, atol=1e-3)
        assert found["affine_all"].fitted[layer] > found["affine"].fitted[layer]


def test_switching_takes_the_layer_that_explains_most(found: dict[str, Approximation]) -> None:
    acts_NLD = activations()
    acts = acts_NLD.double().numpy()
    mean, spread = acts.mean(0), np.sqrt(((acts - acts.mean(0)) ** 2).sum((0, 2)))
    for by in ("other_layer", "other_layer_matched"):
        for layer in range(3):
            values = {}
            for other in {0, 1, 2} - {layer}:
                matched = mean[layer] + (acts[:, other] - mean[other]) * spread[layer] / spread[other]
                values[other] = acts[:, other] if by == "other_layer" else matched
            best = min(values, key=lambda other, of=values, at=layer: ((acts[:, at] - of[other]) ** 2).sum())  # type: ignore[misc]
            assert found[by].sources[layer] == LAYERS[best]
            np.testing.assert_allclose(found[by].give(acts_NLD)[:, layer], values[best], rtol=1e-9, atol=1e-9)


def test_principal_components_are_those_of_a_singular_value_decomposition(found: dict[str, Approximation]) -> None:
    acts_NLD = activations()
    acts = acts_NLD.double().numpy()
    centered = acts - acts.mean(0)
    for layer in range(3):
        _, _, directions = np.linalg.svd(centered[:, layer], full_matrices=False)
        expected = acts.mean(0)[layer] + centered[:, layer] @ directions[:5].T @ directions[:5]
        np.testing.assert_allclose(found["pca"].give(acts_NLD)[:, layer], expected, atol=1e-4)
    spread_L1 = np.sqrt((centered**2).sum((0, 2)))[:, None]
    scaled = (centered / spread_L1).reshape(len(acts), -1)
    _, _, directions = np.linalg.svd(scaled, full_matrices=False)
    expected = acts.mean(0) + (scaled @ directions[:5].T @ directions[:5]).reshape(acts.shape) * spread_L1
    np.testing.assert_allclose(found["pca_joint"].give(acts_NLD), expected, atol=1e-4)


def test_a_rank_beyond_the_width_gives_everything_back(trained: TrainedCrosscoder) -> None:
    acts_NLD = activations()
    fit = fit_of(acts_NLD, l0=40.0)
    assert baselines.ranks_of(fit) == {"pca": 16, "pca_joint": 40}
    by = {baseline.by: baseline for baseline in fitted_baselines(fit, trained, seed=0)}
    torch.testing.assert_close(by["pca"].give(acts_NLD).float(), acts_NLD, rtol=1e-4, atol=1e-4)


def test_a_random_dictionary_fires_as_often_as_it_should_and_is_scaled_best(trained: TrainedCrosscoder) -> None:
    acts_NLD = activations()
    fit = fit_of(acts_NLD, l0=7.25)
    # The same, drawn and worked out one position at a time.
    decoder = torch.randn(64, 3 * D_MODEL, generator=torch.Generator().manual_seed(3)).double().numpy()
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    acts = acts_NLD.double().numpy()
    centered = acts - acts.mean(0)
    scaled = (centered / np.sqrt((centered**2).sum(-1).mean(0))[:, None]).reshape(len(acts), -1)
    products = scaled @ decoder.T
    last_to_fire, threshold = np.sort(products, axis=None)[::-1][round(7.25 * len(acts)) - 1 :][:2]
    assert last_to_fire - threshold > 1e-6 * threshold, "rounding must not decide what fires"
    features = np.where(products > threshold, products, 0)
    assert (features > 0).sum() / len(acts) == 7.25
    decoded = (features @ decoder).reshape(acts.shape)
    (given,) = [baseline.give(acts_NLD) for baseline in fitted_baselines(fit, trained, seed=3) if baseline.by == "random_dictionary"]
    for layer in range(3):
        inputs = np.column_stack([decoded[:, layer].ravel(), np.tile(np.eye(D_MODEL), (len(acts), 1))])
        expected = (inputs @ np.linalg.lstsq(inputs, acts[:, layer].ravel(), rcond=None)[0]).reshape(len(acts), D_MODEL)
        np.testing.assert_allclose(given[:, layer], expected, atol=2e-4)


def test_parts_of_a_sample_give_the_threshold_of_the_whole(trained: TrainedCrosscoder, monkeypatch: pytest.MonkeyPatch) -> None:
    acts_NLD = activations()
    whole = fitted_baselines(fit_of(acts_NLD), trained, seed=3)[-1].give(acts_NLD)
    monkeypatch.setattr(baselines, "FEATURES_AT_A_TIME", 64 * 37)
    torch.testing.assert_close(fitted_baselines(fit_of(acts_NLD), trained, seed=3)[-1].give(acts_NLD), whole, rtol=1e-5, atol=1e-5)


def test_the_rank_that_explains_a_share_is_the_least_one() -> None:
    acts_NLD = activations()
    fit = fit_of(acts_NLD)
    centered = acts_NLD[:, 1].double().numpy() - acts_NLD[:, 1].double().numpy().mean(0)
    squares = np.linalg.svd(centered, compute_uv=False) ** 2
    shares = np.cumsum(squares) / squares.sum()
    for rank in (1, 4, 15):
        assert rank_that_explains(fit.covariances, 1, float(shares[rank - 1]) - 1e-9) == rank
        assert rank_that_explains(fit.covariances, 1, float(shares[rank - 1]) + 1e-9) == rank + 1
    assert rank_that_explains(fit.covariances, 1, -0.5) == 0
    assert rank_that_explains(fit.covariances, 1, 1.0) == 16


def test_a_single_layer_has_only_what_needs_no_other(pieces: Pieces) -> None:
    config = batch_topk_config()
    run = pieces.write_crosscoder(config, random_crosscoder(config, 1), run="one", layers=LAYERS[:1])
    found = fitted_baselines(fit_of(activations(1)), load_crosscoder(run), seed=0)
    assert [baseline.by for baseline in found] == ["pca", "random_dictionary"]


def test_where_all_pairs_would_not_fit_neighbours_are_kept(trained: TrainedCrosscoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariances, "WIDEST", 3 * D_MODEL - 1)
    fit = fit_of(activations())
    assert [fit.covariances.neighbours(layer) for layer in range(3)] == [[1], [0, 2], [1]]
    found = {baseline.by: baseline for baseline in fitted_baselines(fit, trained, seed=0)}
    assert list(found) == ["affine", "other_layer_matched", "other_layer", "pca", "random_dictionary"]
    assert [found["affine"].sources[0], found["affine"].sources[2]] == [LAYERS[1], LAYERS[1]]


def test_covariances_agree_with_numpy_whatever_is_subtracted_first() -> None:
    acts_NLD = activations()
    acts = acts_NLD.double().numpy().reshape(len(acts_NLD), -1)
    centered = acts - acts.mean(0)
    expected = centered.T @ centered / len(acts)
    for reference in (0.0, 30.0):
        found = Covariances(torch.full((3, D_MODEL), reference))
        for part_NLD in acts_NLD.split(90):
            found.add(part_NLD)
        np.testing.assert_allclose(found.block([0, 1, 2], [0, 1, 2]), expected, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(found.mean_LD.flatten(), acts.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.variance_L, np.diag(expected).reshape(3, -1).sum(1), rtol=1e-11)


def test_a_baseline_can_be_had_at_some_layers_alone(found: dict[str, Approximation]) -> None:
    acts_NLD = activations()
    some = only_at(found["affine"], [2, 0])
    assert some.covered == [0, 2]
    assert some.sources == [found["affine"].sources[0], found["affine"].sources[2]]
    assert torch.equal(some.give(acts_NLD), found["affine"].give(acts_NLD)[:, [0, 2]])
    assert some.fitted == [found["affine"].fitted[0], found["affine"].fitted[2]]
    assert only_at(found["pca"], [0, 1, 2]) is found["pca"]
