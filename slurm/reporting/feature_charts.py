"""The charts of a report that are about features, as specifications of Vega-Lite (see `slurm.reporting.charts`)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slurm.record.run_directory import Json
from slurm.reporting.charts import NAMES, Spec, legend
from slurm.reporting.words import MANY_LAYERS

DENSITY_BINS, SHARE_BINS = 40, 40


def density_histogram(densities: Sequence[float]) -> Spec:
    """How often features fire; those that never do are left out."""
    import numpy as np

    logs = np.log10([density for density in densities if density > 0] or [1.0])
    low, high = math.floor(float(logs.min())), 0.0
    counts, edges = np.histogram(logs, bins=DENSITY_BINS, range=(min(low, -1), high))
    bars = [{"from": 10.0**a, "to": 10.0**b, "count": n} for a, b, n in _bins(counts, edges)]
    chart = _histogram(bars, "share of positions on which a feature fires", ".2~e")
    chart["encoding"]["x"]["scale"] = {"type": "log"}
    chart["encoding"]["x"]["axis"] = {"format": "~g", "tickCount": 6}
    return chart


def share_histogram(values_by_layer: Mapping[str, Sequence[float]], title: str) -> Spec:
    """Shares between 0 and 1 of all features, the bars of a few layers over one another, many as rows of a heat map."""
    import numpy as np

    bars = []
    for layer, values in values_by_layer.items():
        counts, edges = np.histogram(np.asarray(values, np.float64), bins=SHARE_BINS, range=(0.0, 1.0))
        bars += [{"layer": layer, "from": a, "to": b, "count": n} for a, b, n in _bins(counts, edges)]
    if len(values_by_layer) > MANY_LAYERS:
        return _heatmap(bars, title)
    chart = _histogram(bars, title, ".3~f")
    if len(values_by_layer) > 1:
        chart["mark"] |= {"opacity": 0.55}
        chart["encoding"]["color"] = {"field": "layer", "type": "nominal", "sort": None, "title": "layer", "legend": legend()}
        chart["encoding"]["y"]["stack"] = None
        chart["encoding"]["tooltip"].insert(0, {"field": "layer"})
    return chart


def _bins(counts: Any, edges: Any) -> Iterator[tuple[float, float, int]]:
    """Of numpy's counts and edges, from where to where and how many."""
    ends = edges.tolist()
    return zip(ends[:-1], ends[1:], counts.tolist(), strict=True)


def _histogram(bars: list[Json], title: str, number: str) -> Spec:
    return {
        "width": "container",
        "height": 220,
        "data": {"values": bars},
        "mark": {"type": "bar", "binSpacing": 0},
        "encoding": {
            "x": {"field": "from", "type": "quantitative", "title": title, "bin": {"binned": True}, "axis": {"tickCount": 5}},
            "x2": {"field": "to"},
            "y": {"field": "count", "type": "quantitative", "title": "features"},
            "tooltip": [
                {"field": "from", "format": number},
                {"field": "to", "format": number},
                {"field": "count", "title": "features", "format": ","},
            ],
        },
    }


def _heatmap(bars: list[Json], title: str) -> Spec:
    """A row a layer: the darker, the more features."""
    return {
        "width": "container",
        "height": {"step": 18},
        "data": {"values": bars},
        "mark": {"type": "rect"},
        "encoding": {
            "x": {"field": "from", "type": "quantitative", "title": title, "bin": {"binned": True}, "axis": {"tickCount": 5}},
            "x2": {"field": "to"},
            "y": {"field": "layer", "type": "nominal", "sort": None, "title": None, "axis": NAMES},
            "opacity": {"field": "count", "type": "quantitative", "title": "features", "scale": {"range": [0, 1]}, "legend": legend()},
            "tooltip": [
                {"field": "layer"},
                {"field": "from", "format": ".3~f"},
                {"field": "to", "format": ".3~f"},
                {"field": "count", "title": "features", "format": ","},
            ],
        },
    }


def layer_profile() -> Spec:
    """One feature by layer; the page puts rows of `layer`, `measure` and `value` in."""
    return {
        "width": "container",
        "height": {"step": 14},
        "data": {"values": []},
        "mark": "bar",
        "encoding": {
            "y": {"field": "layer", "type": "nominal", "sort": None, "title": None, "axis": NAMES},
            "yOffset": {"field": "measure", "sort": None},
            "x": {"field": "value", "type": "quantitative", "title": "share", "axis": {"tickCount": 6}, "scale": {"domain": [0, 1]}},
            "color": {"field": "measure", "type": "nominal", "sort": None, "title": None, "legend": legend()},
            "tooltip": [{"field": "layer"}, {"field": "measure"}, {"field": "value", "format": ".3f"}],
        },
    }
