"""Figures: what their axes say, and that they draw the numbers that they are given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.evaluation import figures
from pipeline.evaluation.figures import LayerBars

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


def test_bars_are_the_explained_variances_and_deep_ones_are_cut_and_written_out(drawn: list[Figure], tmp_path: Path) -> None:
    bars = [LayerBars("h.7", 0.8, 0.7, -5.0), LayerBars("h.8", 0.9, None, 0.25), LayerBars("h.9", -0.1, 0.5, 0.4)]
    figures.explained_variance(tmp_path / "explained.png", bars)
    assert bar_heights(drawn[0], "crosscoder").tolist() == [0.8, 0.9, -0.1]
    assert bar_heights(drawn[0], "affine map from the best other layer").tolist() == [0.7, 0.5]
    assert bar_heights(drawn[0], "best other layer, as it is").tolist() == [figures.LOWEST_EXPLAINED_VARIANCE, 0.25, 0.4]
    axes = drawn[0].axes[0]
    assert "−5 ↓" in [text.get_text() for text in axes.texts]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["h.7", "h.8", "h.9"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "explained variance (predicting the mean: 0)")


def test_a_crosscoder_of_one_layer_is_drawn_alone(drawn: list[Figure], tmp_path: Path) -> None:
    figures.explained_variance(tmp_path / "explained.png", [LayerBars("h.7", 0.8, None, None)])
    assert len(drawn[0].axes[0].containers) == 1


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        figures.explained_variance(tmp_path / name, [LayerBars("h.7", 0.8, 0.5, None)])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
