"""The figure of a sweep: its metric, and the columns that it wishes for, over a varied field, colors for the other fields."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import records
from slurm.record.run_directory import Json
from slurm.record.text_table import figure as in_digits
from slurm.submission.sweep_results import is_number, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 3
MOST_COLORS = 10
"""Groups of a legend with colors of their own; more of them share one color and have no legend."""
COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#64b5cd", "#ccb974", "#8c8c8c")
MARKERS = "osD^vP*X<>"
LOG_RATIO = 20.0
"""Positive results that span at least this have a logarithmic axis."""
FIELD_LOG_RATIO = 8.0
"""The same for the field along x: who varies one over so much varies it by factors."""
OUTLYING = 4.0
"""Values farther than so many interquartile ranges from the quartiles stand at the axis's edge, with their number ..."""
SQUASHED = 0.125
"""... where they would leave the others less than this share of the axis."""


class Axis(NamedTuple):
    """The field along x, and what sets the points of one x apart."""

    x: str
    groups: list[str]
    """Fields with a color for each combination of their values."""
    repeats: list[str]
    """Seeds: their points share a color, and the line goes through the mean."""
    along: list[str]
    """Fields that go together with x, as in a sweep's zip."""


def draw(
    rows: Sequence[Json], varied: Sequence[str], metric: str, path: Path, *, title: str, maximize: bool, columns: Sequence[str] = ()
) -> bool:
    """Draws the rows as a PNG at `path`; False if none has the metric yet.

    rows : as `sweep_results.gather` gives them. Tasks that have not finished are hollow.
    columns : further results, each in a panel of its own, as many as there is room for.
    """
    drawn = [row for row in rows if is_number(row.get(metric)) and math.isfinite(row[metric])]
    if not drawn:
        return False
    from matplotlib.figure import Figure

    axis = choose_axis(drawn, varied)
    names = [metric, *(name for name in columns if name != metric and any(is_number(row.get(name)) for row in drawn))][:MOST_PANELS]
    whole = Figure(figsize=(1.2 + 4.4 * len(names), 4.2), layout="constrained")
    panels = whole.subplots(1, len(names), squeeze=False)[0]
    finished = [row for row in drawn if row["state"] == "finished"]
    best = (max if maximize else min)(finished, key=lambda row: float(row[metric])) if finished else None
    for panel, name in zip(panels, names, strict=True):
        _draw_panel(panel, drawn, axis, name, best)
        better = f" ({'higher' if maximize else 'lower'} is better)" if name == metric else ""
        panel.set_ylabel(with_unit(name) + better)
    _legend(whole, panels[0], axis)
    missing = len(rows) - len(drawn)
    left_out = f"; {missing} of {len(rows)} tasks without a result yet" if missing else ""
    told = f"\nbest: {in_digits(best[metric])}, task {best['task']} (ringed){left_out}" if best else f"\nnone has finished{left_out}"
    whole.suptitle(title + told, fontsize=10)
    with records.atomic_file(path) as file:
        whole.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return True


def choose_axis(rows: Sequence[Json], varied: Sequence[str]) -> Axis:
    """The field along x: numbers before words, more values before fewer; seeds only where nothing else varies."""
    values = {name: _distinct(rows, name) for name in varied}
    fields = [name for name in varied if len(values[name]) > 1] or list(varied[:1])
    seeds = [name for name in fields if name.rpartition(".")[2] == "seed"]
    chosen = [name for name in fields if name not in seeds] or fields
    x = max(chosen, key=lambda name: (_is_numeric(values[name]), len(values[name])))
    others = [name for name in chosen if name != x]
    along = [name for name in others if _goes_with(rows, x, name)]
    return Axis(x, [name for name in others if name not in along], [name for name in seeds if name != x], along)


def _distinct(rows: Sequence[Json], name: str) -> list[Any]:
    return list({_key(row.get(name)): row.get(name) for row in rows}.values())


def _key(value: Any) -> str:
    return repr(value)


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(is_number(value) for value in values)


def _goes_with(rows: Sequence[Json], x: str, name: str) -> bool:
    """Whether x decides the value of `name`."""
    return len({(_key(row.get(x)), _key(row.get(name))) for row in rows}) == len(_distinct(rows, x))


def _draw_panel(panel: "Axes", rows: Sequence[Json], axis: Axis, name: str, best: Json | None) -> None:
    values = _distinct(rows, axis.x)
    numeric = _is_numeric(values)
    places = {_key(v): float(v) if numeric else i for i, v in enumerate(values)}
    groups = _groups(rows, axis)
    shown = [row for row in rows if is_number(row.get(name)) and math.isfinite(row[name])]
    if _spans([row[name] for row in shown], LOG_RATIO):
        panel.set_yscale("log")
    low, high = limits([row[name] for row in shown], is_log=panel.get_yscale() == "log")
    for number, (label, members) in enumerate(groups.items()):
        color = COLORS[number] if len(groups) <= MOST_COLORS else COLORS[0]
        points = [(places[_key(row.get(axis.x))], row) for row in members if row in shown]
        _draw_line(panel, points, name, color)
        marker, size = (MARKERS[number % len(MARKERS)], max(5.0, 9.0 - 1.5 * number)) if len(groups) <= MOST_COLORS else ("o", 5.0)
        for is_done in (True, False):
            some = [(x, row[name]) for x, row in points if (row["state"] == "finished") == is_done and low <= row[name] <= high]
            face = color if is_done else "none"
            panel.plot([x for x, _ in some], [y for _, y in some], marker, color=color, markersize=size, markerfacecolor=face)
        panel.plot([], [], marker, color=color, label=label)
        for x, row in points:
            if not low <= row[name] <= high:
                _mark_outlier(panel, x, row[name], color, is_above=row[name] > high, is_last=x == max(places.values()))
    if best is not None and is_number(best.get(name)) and low <= best[name] <= high:
        panel.plot([places[_key(best.get(axis.x))]], [best[name]], "o", color="black", markersize=14, markerfacecolor="none")
    panel.set_ylim(*_padded(low, high, is_log=panel.get_yscale() == "log"))
    _draw_x(panel, axis, values, numeric=numeric)


def _draw_line(panel: "Axes", points: Sequence[tuple[float, Json]], name: str, color: str) -> None:
    """The mean at each x of what has finished, in the order of x."""
    at: dict[float, list[float]] = {}
    for x, row in points:
        if row["state"] == "finished":
            at.setdefault(x, []).append(row[name])
    ordered = sorted(at)
    panel.plot(ordered, [sum(at[x]) / len(at[x]) for x in ordered], "-", color=color, linewidth=1.2, alpha=0.7)


def _mark_outlier(panel: "Axes", x: float, value: float, color: str, *, is_above: bool, is_last: bool) -> None:
    """An arrow at the axis's edge, with the value that lies far beyond it."""
    edge, inward = (1.0, -1) if is_above else (0.0, 1)
    panel.plot([x], [edge], "^" if is_above else "v", color=color, transform=panel.get_xaxis_transform(), clip_on=False)
    panel.annotate(
        in_digits(float(f"{value:.3g}")), (x, edge), xycoords=("data", "axes fraction"), xytext=(-7 if is_last else 7, 4 * inward),
        textcoords="offset points", fontsize=7, ha="right" if is_last else "left", va="top" if is_above else "bottom",
    )  # fmt: skip


def _draw_x(panel: "Axes", axis: Axis, values: Sequence[Any], *, numeric: bool) -> None:
    along = f"\n(with it {', '.join(short_names(axis.along).values())})" if axis.along else ""
    panel.set_xlabel(with_unit(".".join(axis.x.split(".")[-2:])) + along)
    if not numeric:
        texts = [in_digits(value, is_grouped=False) for value in values]
        is_long = sum(map(len, texts)) > 40
        panel.set_xticks(range(len(values)), texts, rotation=30 if is_long else 0, ha="right" if is_long else "center")
        panel.set_xlim(-0.5, len(values) - 0.5)
    elif _spans(values, FIELD_LOG_RATIO):
        panel.set_xscale("log")
    if numeric and len(values) <= 8:
        ordered = sorted(values)
        panel.set_xticks(ordered, [in_digits(value) for value in ordered])
        panel.minorticks_off()
    panel.grid(visible=True, alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _groups(rows: Sequence[Json], axis: Axis) -> dict[str, list[Json]]:
    """The rows by the values of the fields that colors stand for, each with its label, in the order of the values."""
    names = short_names(axis.groups)

    def label(row: Json) -> str:
        return ", ".join(f"{names[field]} {in_digits(row.get(field), is_grouped=False)}" for field in axis.groups)

    groups: dict[str, list[Json]] = {}
    for row in sorted(rows, key=lambda row: [(not is_number(v), v if is_number(v) else str(v)) for v in (row.get(f) for f in axis.groups)]):
        groups.setdefault(label(row), []).append(row)
    return groups


def _legend(whole: Any, panel: "Axes", axis: Axis) -> None:
    handles, labels = panel.get_legend_handles_labels()
    if axis.groups and len(labels) <= MOST_COLORS:
        whole.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=min(len(labels), 4))


def _spans(values: Sequence[float], ratio: float) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) >= ratio


def limits(values: Sequence[float], *, is_log: bool = False) -> tuple[float, float]:
    """Lowest and highest value that the axis shows: without those far from all others."""
    scale = math.log if is_log else float
    ordered = sorted(values)
    first, third = (scale(ordered[round(share * (len(ordered) - 1))]) for share in (0.25, 0.75))
    reach = OUTLYING * (third - first)
    near = [value for value in ordered if first - reach <= scale(value) <= third + reach]
    is_squashed = reach > 0 and scale(near[-1]) - scale(near[0]) <= SQUASHED * (scale(ordered[-1]) - scale(ordered[0]))
    return (near[0], near[-1]) if is_squashed else (ordered[0], ordered[-1])


def _padded(low: float, high: float, *, is_log: bool) -> tuple[float, float]:
    if is_log:
        factor = (high / low) ** 0.08 if high > low else 2.0
        return low / factor, high * factor
    pad = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return low - pad, high + pad


def with_unit(name: str) -> str:
    """A field with the unit that its name tells: `timeout_min` is in minutes."""
    last = name.rpartition(".")[2]
    units = {"seconds": "s", "minutes": "min", "min": "min", "gb": "GiB"}
    unit = "1/s" if last.endswith("_per_second") else units.get(last.rpartition("_")[2])
    return f"{name} [{unit}]" if unit else name
