"""Figures: what their axes say, and that they draw the numbers that they are given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_verdict import COSTS, EXPLAINED, RANKS, SWEEP, found
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from pipeline.evaluation import figures, panels

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, still open to questions."""
    saved: list[Figure] = []
    save = figures._save

    def save_and_keep(figure: Any, path: Path) -> None:
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "_save", save_and_keep)
    return saved


def bar_heights(figure: Figure, label_start: str) -> np.ndarray:
    (container,) = [bars for bars in figure.axes[0].containers if bars.get_label().startswith(label_start)]
    return np.array([bar.get_height() for bar in container])


def test_density_counts_every_feature_once(drawn: list[Figure], tmp_path: Path) -> None:
    counts_F = np.array([0, 0, 0, 1, 10, 100, 150, 1000])
    dead_F = np.array([True, True, False, True, False, False, False, False])
    figures.feature_density(tmp_path / "density.png", counts_F, dead_F, num_positions=1000, dense_fraction=0.1)
    alive, dead = bar_heights(drawn[0], "fired late in training (5)"), bar_heights(drawn[0], "dead at the end of training (3)")
    assert (alive.sum(), dead.sum()) == (5, 3)
    assert (alive[-1], dead[-1]) == (1, 2), "the last bar is of those that never fire"
    assert (tmp_path / "density.png").read_bytes().startswith(PNG)


def test_density_axes_say_what_they_show(drawn: list[Figure], tmp_path: Path) -> None:
    counts_F = np.array([0, 5, 150, 1000])
    figures.feature_density(tmp_path / "density.png", counts_F, counts_F < 0, num_positions=1000, dense_fraction=0.1)
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == "share of the 1,000 held-out positions on which a feature fires"
    assert axes.get_ylabel() == "features (of 4)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["never", "$10^{-3}$", "$10^{-2}$", "$10^{-1}$", "$10^{0}$"]
    assert [text.get_text() for text in axes.texts] == ["dense:\n2 features"]


@pytest.mark.parametrize("num_positions", [1, 7, 1000, 12_345_678])
@pytest.mark.parametrize("every", [0, 1])
def test_density_has_a_place_for_features_that_fire_never_and_always(
    drawn: list[Figure], tmp_path: Path, num_positions: int, every: int
) -> None:
    counts_F = np.full(6, every * num_positions)
    figures.feature_density(tmp_path / "density.png", counts_F, counts_F < 0, num_positions=num_positions, dense_fraction=0.1)
    assert bar_heights(drawn[0], "fired late").sum() == 6


def test_density_has_a_place_for_features_that_fire_once(drawn: list[Figure], tmp_path: Path) -> None:
    for num_positions in (7, 1000, 60_000, 999_983):
        counts_F = np.ones(6, dtype=np.int64)
        figures.feature_density(tmp_path / "density.png", counts_F, counts_F < 0, num_positions=num_positions, dense_fraction=0.1)
        assert bar_heights(drawn[-1], "fired late").sum() == 6


def test_the_cheapest_stands_on_top_and_what_costs_far_more_is_cut_and_written_out(drawn: list[Figure], tmp_path: Path) -> None:
    panels.draw_nats(tmp_path / "nats.png", found(COSTS, EXPLAINED), RANKS)
    (axes,) = drawn[0].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["an affine map from h.3", "the crosscoder", "h.3 as it is", "PCA of rank 32", "the mean", "zeros"]
    # The crosscoder costs 0.147, more than the strongest baseline: bars end at four times that.
    assert [bar.get_width() for bar in axes.containers[0]] == pytest.approx([0.044, 0.147, 0.21, 0.5, 0.588, 0.588])
    assert [text.get_text() for text in axes.texts] == ["0.044", "0.147", "0.210", "0.500", "6.000 →", "7.000 →"]
    assert axes.get_title(loc="left") == "h.2: WORSE than the strongest baseline"
    assert axes.get_xlabel() == "nats that the language model loses with the layer replaced"
    colors = [to_hex(bar.get_facecolor()) for bar in axes.containers[0]]
    assert colors == [figures.BASELINE, figures.WORSE, *[figures.BASELINE] * 4]


def test_explained_variance_is_beside_every_baseline_and_says_what_the_verdict_by_nats_is(drawn: list[Figure], tmp_path: Path) -> None:
    panels.draw_explained_variance(tmp_path / "explained.png", found(COSTS, EXPLAINED | {"crosscoder": 0.99, "zero": -5.0}), RANKS)
    (axes,) = drawn[0].axes
    assert axes.get_title(loc="left") == "h.2: WORSE by nats (nats.png); here, by explained variance, BETTER"
    assert len(axes.containers[0]) == len(EXPLAINED)
    assert axes.containers[0][0].get_width() == 0.99
    assert to_hex(axes.containers[0][0].get_facecolor()) == figures.WORSE
    assert axes.containers[0][-1].get_width() == figures.LOWEST_EXPLAINED_VARIANCE
    assert axes.texts[-1].get_text() == "−5.000 ←"


def test_layers_that_never_vary_have_no_figure_of_explained_variance(drawn: list[Figure], tmp_path: Path) -> None:
    panels.draw_explained_variance(tmp_path / "explained.png", found(COSTS, dict.fromkeys(EXPLAINED)), RANKS)
    assert not drawn
    panels.draw_nats(tmp_path / "nats.png", found({"crosscoder": 0.0, "mean": 0.0, "zero": -0.1}, EXPLAINED), RANKS)
    assert len(drawn) == 1


def test_curves_are_the_points_of_the_sweep_with_the_strongest_baseline_of_the_layer(drawn: list[Figure], tmp_path: Path) -> None:
    panels.draw_sweep(tmp_path / "curves.png", found(COSTS, EXPLAINED), RANKS)
    curve, own, baseline = drawn[0].axes[0].lines
    assert curve.get_xydata().tolist() == [[point.l0, point.explained_variance["h.2"]] for point in SWEEP]
    assert own.get_xydata().tolist() == [[30.0, 0.916]]
    assert set(baseline.get_ydata()) == {0.939}
    assert baseline.get_label() == "h.2: an affine map from h.3"
    panels.draw_sweep(tmp_path / "none.png", found(COSTS, EXPLAINED, SWEEP[:1]), RANKS)
    assert not (tmp_path / "none.png").exists()


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        panels.draw_nats(tmp_path / name, found(COSTS, EXPLAINED), RANKS)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
