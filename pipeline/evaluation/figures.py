"""Figures of an evaluation, as PNG files: the same numbers give the same bytes with one version of matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline import records
from pipeline.evaluation.model_diffing import ONLY, SHARED_FROM, SHARED_TO

DEAD, ALIVE = WORSE, BETTER = "#c44e52", "#4c72b0"
BASELINE = "#c9c9c9"
LOWEST_EXPLAINED_VARIANCE = -0.25
"""Bars end here; what lies deeper is written as a number."""


class Bar(NamedTuple):
    """What stands in for a layer, and one figure of it."""

    name: str
    value: float
    is_crosscoder: bool = False


class Panel(NamedTuple):
    """One layer."""

    title: str
    bars: list[Bar]
    """The best first."""
    is_worse: bool
    """Whether the crosscoder costs more nats than a baseline; it is then drawn in another color, by whatever figure."""


class Curve(NamedTuple):
    """Explained variance of one layer at several L0s."""

    layer: str
    points: list[tuple[float, float]]
    """L0 and explained variance, from the lowest L0 on."""
    own: tuple[float, float] | None
    """Of the crosscoder as it was trained."""
    baseline: tuple[str, float] | None
    """The strongest one by name, and what it explains."""


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


def stand_ins(path: Path, panels: Sequence[Panel], *, label: str, least: float, greatest: float) -> None:
    """A panel a layer: what stands in for it by one figure, the best on top. Bars end at `least` and `greatest`."""
    heights = [0.9 + 0.24 * len(panel.bars) for panel in panels]
    figure, axes_of_panels = _new_figure(8.5, 0.5 + sum(heights), rows=heights)
    for axes, panel in zip(axes_of_panels, panels, strict=True):
        places = range(len(panel.bars), 0, -1)
        values = [min(max(bar.value, least), greatest) for bar in panel.bars]
        own = WORSE if panel.is_worse else BETTER
        axes.barh(places, values, 0.7, color=[own if bar.is_crosscoder else BASELINE for bar in panel.bars])
        for place, bar, value in zip(places, panel.bars, values, strict=True):
            cut = "" if bar.value == value else " →" if bar.value > value else " ←"
            axes.annotate((_short(bar.value) + cut).replace("-", "−"), (max(value, 0), place), xytext=(3, 0), textcoords="offset points",
                          va="center", fontsize=8)  # fmt: skip
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(places, [bar.name for bar in panel.bars], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8)
        for tick, bar in zip(axes.get_yticklabels(), panel.bars, strict=True):
            tick.set_fontweight("bold" if bar.is_crosscoder else "normal")
        axes.set_ylim(0.3, len(panel.bars) + 0.7)
        # A tenth of the axis is left for the number beside the longest bar.
        axes.set_xlim(least if any(bar.value < 0 for of in panels for bar in of.bars) else 0, greatest + 0.12 * (greatest - min(least, 0)))
        axes.set_title(panel.title, loc="left", fontsize=9)
        axes.set_xlabel(label, fontsize=9)
    _save(figure, path)


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def l0_curves(path: Path, curves: Sequence[Curve]) -> None:
    """Explained variance against L0, a line a layer, dashed where its strongest baseline lies; the dot is the crosscoder as trained."""
    figure, axes = _new_figure(7.0, 4.2)
    for number, curve in enumerate(curves):
        color = f"C{number % 10}"
        axes.plot(*zip(*curve.points, strict=True), color=color, linewidth=1.2, marker=".", markersize=4, label=curve.layer)
        if curve.own is not None:
            axes.plot(*curve.own, color=color, marker="o", markersize=7, linestyle="none")
        if curve.baseline is not None:
            name, share = curve.baseline
            axes.axhline(share, color=color, linewidth=0.9, linestyle="--", label=f"{curve.layer}: {name}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="both", which="both", labelsize=8)
    axes.set_xlabel("L0, with the crosscoder's thresholds times one factor (dot: as it was trained)", fontsize=9)
    axes.set_ylabel("explained variance", fontsize=9)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=2)
    _save(figure, path)


def model_diffing(path: Path, pairs: Sequence[NormBars]) -> None:
    """Histogram of the norm differences of features between two models, a panel a pair, with the shares of the classes above."""
    figure, axes = _new_figure(7.0, 3.6 * len(pairs), rows=[1.0] * len(pairs))
    for panel, pair in zip(axes, pairs, strict=True):
        panel.hist(pair.differences_F, np.linspace(0, 1, 51), color=ALIVE)
        classes = {f"only_{pair.one}": (0.0, ONLY), "shared": (SHARED_FROM, SHARED_TO), f"only_{pair.other}": (1 - ONLY, 1.0)}
        for name, (low, high) in classes.items():
            panel.axvspan(low, high, color=BASELINE, alpha=0.4, linewidth=0, zorder=0)
            words = name.replace("only_", "only ")
            panel.annotate(f"{words}\n{100 * pair.shares[name]:.1f} %", ((low + high) / 2, 1.0), xycoords=("data", "axes fraction"),
                           xytext=(0, 4), textcoords="offset points", ha="center", va="bottom", fontsize=8)  # fmt: skip
        panel.set_xlim(0, 1)
        panel.set_xlabel(f"norm difference of decoders: 0 writes in {pair.one} alone, 1 in {pair.other} alone")
        panel.set_ylabel(f"features (of {len(pair.differences_F):,} that fire)")
    _save(figure, path)


def _new_figure(width_inches: float, height_inches: float, rows: Sequence[float] | None = None) -> tuple[Any, Any]:
    """The figure and its axes; with `rows` one axes each, of these heights to one another."""
    # The object interface, not pyplot: no global state, no window system. matplotlib takes half a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    made = figure.subplots(1 if rows is None else len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes in made:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, made[0] if rows is None else made


def _save(figure: Any, path: Path) -> None:
    with records.atomic_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
