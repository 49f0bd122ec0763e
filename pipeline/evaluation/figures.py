"""Figures of an evaluation, as PNG files: the same numbers give the same bytes with one version of matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline import records
from pipeline.evaluation.model_diffing import ONLY, SHARED_FROM, SHARED_TO

DEAD, ALIVE, BASELINE, FAINT_BASELINE = "#c44e52", "#4c72b0", "#8c8c8c", "#c9c9c9"
LOWEST_EXPLAINED_VARIANCE = -0.25
"""Bars end here; what lies deeper is written as a number."""


class LayerBars(NamedTuple):
    """Explained variance at one layer."""

    layer: str
    crosscoder: float | None
    affine: float | None
    """Of the best other layer; None where there is no other."""
    other_layer: float | None


class NormBars(NamedTuple):
    """How features write in two models."""

    one: str
    other: str
    differences_F: npt.NDArray[np.float64]
    """Norm differences of those that fire."""
    shares: dict[str, float]
    """Of them, by class (see `pipeline.evaluation.model_diffing`)."""


def feature_density(
    path: Path, counts_F: npt.NDArray[np.int64], dead_F: npt.NDArray[np.bool_], *, num_positions: int, dense_fraction: float
) -> None:
    """Histogram of how often features fire, on a logarithmic axis, those dead at the end of training set apart.

    Features that never fire here have no place on the axis: a bar of their own stands left of it.
    """
    figure, axes = _new_figure(7.0, 4.0)
    lowest = min(-1, math.floor(-math.log10(num_positions)))
    edges = np.arange(10 * lowest, 1) / 10
    never = lowest - 0.7
    heights = []
    for chosen_F in (~dead_F, dead_F):
        counts = counts_F[chosen_F]
        in_bins, _ = np.histogram(np.log10(counts[counts > 0] / num_positions), edges)
        heights.append(np.append(in_bins, np.sum(counts == 0)))
    places, widths = np.append(edges[:-1], never - 0.1), np.append(np.diff(edges), 0.2)
    names = [f"fired late in training ({np.sum(~dead_F):,})", f"dead at the end of training ({np.sum(dead_F):,})"]
    for color, name, height, bottom in zip((ALIVE, DEAD), names, heights, (0 * heights[0], heights[0]), strict=True):
        axes.bar(places, height, widths, bottom, align="edge", color=color, label=name)
    num_dense = int(np.sum(counts_F > dense_fraction * num_positions))
    axes.axvline(np.log10(dense_fraction), color="black", linewidth=0.8, linestyle="--")
    axes.annotate(
        f"dense:\n{num_dense:,} features", (np.log10(dense_fraction), 1.0), xytext=(4, -4), xycoords=("data", "axes fraction"),
        textcoords="offset points", va="top", fontsize=8,
    )  # fmt: skip
    ticks = range(lowest, 1)
    axes.set_xticks([never, *ticks], ["never", *[f"$10^{{{tick}}}$" for tick in ticks]])
    axes.set_xlabel(f"share of the {num_positions:,} held-out positions on which a feature fires")
    axes.set_ylabel(f"features (of {len(counts_F):,})")
    axes.set_ylim(0, 1.08 * max(1, (heights[0] + heights[1]).max()))
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=2)
    _save(figure, path)


def explained_variance(path: Path, bars: Sequence[LayerBars]) -> None:
    """Explained variance of each layer: the crosscoder beside the best other layer; predicting the mean is the zero line."""
    figure, axes = _new_figure(max(6.5, 1.5 + 1.2 * len(bars)), 4.0)
    kinds = {
        "crosscoder": (ALIVE, "crosscoder"),
        "affine": (BASELINE, "affine map from the best other layer"),
        "other_layer": (FAINT_BASELINE, "best other layer, as it is"),
    }
    shown = [field for field in kinds if any(getattr(bar, field) is not None for bar in bars)]
    for index, field in enumerate(shown):
        color, name = kinds[field]
        offset = 0.27 * (index - (len(shown) - 1) / 2)
        values = [getattr(bar, field) for bar in bars]
        drawn = [(place + offset, value) for place, value in enumerate(values) if value is not None]
        heights = [max(value, LOWEST_EXPLAINED_VARIANCE) for _, value in drawn]
        axes.bar([place for place, _ in drawn], heights, 0.25, color=color, label=name)
        for (place, value), height in zip(drawn, heights, strict=True):
            below = height < 0
            text = f"{value:.2f}" if value >= LOWEST_EXPLAINED_VARIANCE else f"{value:.3g} ↓"
            axes.annotate(text.replace("-", "−"), (place, height), xytext=(0, -3 if below else 3), textcoords="offset points", ha="center",
                          va="top" if below else "bottom", fontsize=8)  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(-0.6, len(bars) - 0.4)
    any_below = any(value is not None and value < 0 for bar in bars for value in bar[1:])
    axes.set_ylim(LOWEST_EXPLAINED_VARIANCE - 0.1 if any_below else 0, 1.1)
    axes.set_yticks(np.arange(-0.25 if any_below else 0, 1.01, 0.25))
    axes.set_xticks(range(len(bars)), [bar.layer for bar in bars])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("explained variance (predicting the mean: 0)")
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=len(kinds), columnspacing=1.0)
    _save(figure, path)


def model_diffing(path: Path, pairs: Sequence[NormBars]) -> None:
    """Histogram of the norm differences of features between two models, a panel a pair, with the shares of the classes above."""
    figure, axes = _new_figure(7.0, 3.6 * len(pairs), len(pairs))
    for panel, pair in zip(axes, pairs, strict=True):
        panel.hist(pair.differences_F, np.linspace(0, 1, 51), color=ALIVE)
        classes = {f"only_{pair.one}": (0.0, ONLY), "shared": (SHARED_FROM, SHARED_TO), f"only_{pair.other}": (1 - ONLY, 1.0)}
        for name, (low, high) in classes.items():
            panel.axvspan(low, high, color=FAINT_BASELINE, alpha=0.4, linewidth=0, zorder=0)
            words = name.replace("only_", "only ")
            panel.annotate(f"{words}\n{100 * pair.shares[name]:.1f} %", ((low + high) / 2, 1.0), xycoords=("data", "axes fraction"),
                           xytext=(0, 4), textcoords="offset points", ha="center", va="bottom", fontsize=8)  # fmt: skip
        panel.set_xlim(0, 1)
        panel.set_xlabel(f"norm difference of decoders: 0 writes in {pair.one} alone, 1 in {pair.other} alone")
        panel.set_ylabel(f"features (of {len(pair.differences_F):,} that fire)")
    _save(figure, path)


def _new_figure(width_inches: float, height_inches: float, panels: int = 0) -> tuple[Any, Any]:
    """The figure and its axes; of several panels, one below the other, a list of them."""
    # The object interface, not pyplot: no global state, no window system. matplotlib takes half a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(max(panels, 1), 1, number + 1) for number in range(max(panels, 1))]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes if panels else axes[0]


def _save(figure: Any, path: Path) -> None:
    with records.atomic_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
