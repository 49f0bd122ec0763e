"""The charts of a report, as specifications of Vega-Lite (https://vega.github.io/vega-lite/docs/) with their data in them.

Each has a width of "container" and no colors or fonts of its own: the page gives those, light or dark.
"""

import math
from collections.abc import Sequence
from typing import Any

from slurm.record.run_directory import Json
from slurm.reporting.words import MANY_LAYERS, stand_name

Spec = dict[str, Any]

MOST_ROWS = 400
"""Of metrics.jsonl that a curve shows, evenly spread."""
FAR = 3.0
"""Bars that are longer than all but the mean's and the zeros' by so much would leave those no room: they are named in words."""
FEW_POINTS = 40
"""So many points of a curve are drawn besides its line, which a single one does not have."""
ON_FRONT, BEATEN = "on the front", "beaten"
_IS_OWN = {"condition": {"test": "datum.value == 'crosscoder'", "value": "bold"}, "value": "normal"}
NAMES: Json = {"labelLimit": 170, "labelFontWeight": _IS_OWN}


# -- held-out measures --------------------------------------------------------------------------------------------------


def costs(metrics: Json) -> tuple[Spec, list[Json]]:
    """What each stand-in for a layer costs in nats; and the rows left out, as they would dwarf the others."""
    rows = [_bar(row, row["difference"]) for row in metrics["replaced"] if row["layer"] in metrics["layers"] and row["by"] != "dense_path"]
    near = [abs(row["value"]) for row in rows if row["by"] not in ("mean", "zero")]
    limit = FAR * max(near, default=math.inf)
    far = [row for row in rows if row["by"] in ("mean", "zero") and row["value"] > limit]
    shown = [row for row in rows if row not in far]
    return _bars(shown, "cross-entropy cost [nats]", ".4f"), far


def explained(metrics: Json) -> Spec:
    """The explained variance of each stand-in, by layer."""
    known = [row for row in metrics["reconstruction"] if row["layer"] in metrics["layers"] and row["explained_variance"] is not None]
    rows = [_bar(row, row["explained_variance"]) for row in known if row["by"] not in ("zero", "mean", "dense_path")]
    return _bars(rows, "explained variance", ".4f", domain=[0, 1])


def _bar(row: Json, value: float) -> Json:
    return {"layer": row["layer"], "by": row["by"], "name": stand_name(row["by"], row["source"], is_short=True), "value": value}


def _bars(rows: Sequence[Json], title: str, number: str, domain: list[float] | None = None) -> Spec:
    """Bars by stand-in and layer; of many layers lines over them, as there would be no room for so many bars."""
    names = list(dict.fromkeys(row["name"] for row in sorted(rows, key=lambda row: row["by"] != "crosscoder")))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    value: Json = {"field": "value", "type": "quantitative", "title": title, "axis": {"tickCount": 6}}
    value |= {} if domain is None else {"scale": {"domain": domain}}
    tooltip = [{"field": "name", "title": "stand-in"}, {"field": "layer"}, {"field": "value", "title": title, "format": number}]
    chart: Spec = {"width": "container", "data": {"values": list(rows)}}
    if len(layers) > MANY_LAYERS:
        width = {"condition": {"test": "datum.by == 'crosscoder'", "value": 4}, "value": 1.5}
        return chart | {
            "height": 300,
            "mark": {"type": "line", "clip": True, "point": True},
            "encoding": {
                "x": {"field": "layer", "type": "nominal", "sort": layers, "title": None, "axis": {"labelLimit": 170, "labelAngle": -40}},
                "y": value,
                "color": {"field": "name", "type": "nominal", "sort": names, "title": None, "legend": legend()},
                "strokeWidth": width,
                "tooltip": tooltip,
            },
        }
    return chart | {
        "height": {"step": 18 if len(layers) > 1 else 26},
        "mark": {"type": "bar", "clip": True},
        "encoding": {
            "y": {"field": "name", "type": "nominal", "sort": names, "title": None, "axis": NAMES},
            "yOffset": {"field": "layer", "sort": layers},
            "x": value,
            "color": {"field": "layer", "type": "nominal", "sort": layers, "title": "layer", "legend": legend()},
            "tooltip": tooltip,
        },
    }


def legend() -> Json:
    """Below the chart; the page says in how many columns."""
    return {"orient": "bottom", "labelLimit": 300}


# -- training -----------------------------------------------------------------------------------------------------------


def training_curves(rows: Sequence[Json], layers: Sequence[str]) -> list[tuple[str, Spec]]:
    """A heading and a chart for the loss, the explained variance, L0 and dead features, as far as rows of metrics have them."""
    thinned = thin(rows)
    names = list(dict.fromkeys(name for row in thinned for name in row))
    loss = {name: {"loss": "total"}.get(name, name.removeprefix("loss_")) for name in names if name == "loss" or name.startswith("loss_")}
    panels = [
        ("Loss", "loss", loss),
        ("Explained variance", "explained variance", _by_layer("explained_variance", layers)),
        ("L0", "features that fire at a position", {"l0": "in training", "held_out_l0": "held out"}),
        ("Dead features", "share of all features", {"dead_fraction": "dead"}),
    ]
    charts = [(heading, curve(_points(thinned, series), title)) for heading, title, series in panels]
    return [(heading, chart) for heading, chart in charts if chart["data"]["values"]]


def _by_layer(name: str, layers: Sequence[str]) -> dict[str, str]:
    """What is drawn of a quantity that rows hold by layer and, where it was measured so, of held-out positions."""
    return {f"{name}_by_layer": "", name: "all layers, in training", f"held_out_{name}": "all layers, held out"} | {
        f"{name}_by_layer.{number}": layer for number, layer in enumerate(layers)
    }


def _points(rows: Sequence[Json], series: dict[str, str]) -> list[Json]:
    points = []
    for row in rows:
        for name, value in row.items():
            of_layer = value if isinstance(value, list) else [value]
            for number, one in enumerate(of_layer):
                label = series.get(f"{name}.{number}", f"layer {number}") if isinstance(value, list) else series.get(name)
                if name in series and label and isinstance(one, int | float) and math.isfinite(one):
                    points.append({"tokens": row["tokens"], "series": label, "value": one})
    return points


def thin(rows: Sequence[Json]) -> list[Json]:
    """At most `MOST_ROWS` of the rows that tell their tokens, evenly spread, the first and the last among them."""
    known = [row for row in rows if isinstance(row.get("tokens"), int | float)]
    if len(known) <= MOST_ROWS:
        return known
    return [known[round(place * (len(known) - 1) / (MOST_ROWS - 1))] for place in range(MOST_ROWS)]


def curve(points: list[Json], title: str) -> Spec:
    """Lines over training tokens; the point nearest to the pointer tells its value."""
    is_short = len({point["tokens"] for point in points}) <= FEW_POINTS
    encoding = {
        "x": {
            "field": "tokens",
            "type": "quantitative",
            "title": "training tokens",
            "axis": {"labelExpr": "datum.value == 0 ? '0' : format(datum.value, '~s')", "tickCount": 5},
        },
        "y": {"field": "value", "type": "quantitative", "title": title, "scale": {"zero": False}},
        "color": {"field": "series", "type": "nominal", "sort": None, "title": None, "legend": legend()},
    }
    hover = {"name": "near", "select": {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}}
    tooltip = [
        {"field": "series", "title": "curve"},
        {"field": "tokens", "format": ","},
        {"field": "value", "title": title, "format": ".5~g"},
    ]
    return {
        "width": "container",
        "height": 220,
        "data": {"values": points},
        "encoding": encoding,
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 1.8, "point": {"size": 16} if is_short else False}},
            {
                "params": [hover],
                "mark": {"type": "point", "filled": True, "size": 60},
                "encoding": {"tooltip": tooltip, "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}},
            },
        ],
    }


# -- several crosscoders ------------------------------------------------------------------------------------------------


def front(rows: list[Json], title: str) -> Spec:
    """`value` over `l0` of each row; a line joins those whose `standing` is `ON_FRONT`."""
    is_on_front = [{"filter": {"field": "standing", "equal": ON_FRONT}}]
    x = {"field": "l0", "type": "quantitative", "title": "L0", "scale": {"zero": False}, "axis": {"tickCount": 6}}
    y = {"field": "value", "type": "quantitative", "title": title, "scale": {"zero": False}}
    tooltip = [
        {"field": "label", "title": "crosscoder"},
        {"field": "l0", "title": "L0", "format": ".1f"},
        {"field": "value", "title": title, "format": ".4f"},
        {"field": "varied", "title": "settings"},
    ]
    labels: Json = {
        "mark": {"type": "text", "align": "left", "dx": 8, "dy": -6, "fontSize": 11},
        "transform": is_on_front,
        "encoding": {"x": x, "y": y, "text": {"field": "label"}},
    }
    return {
        "width": "container",
        "height": 300,
        "data": {"values": rows},
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 1.5, "opacity": 0.6},
                "transform": is_on_front,
                "encoding": {"x": x, "y": y, "order": {"field": "l0"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {
                    "x": x,
                    "y": y,
                    "tooltip": tooltip,
                    "color": {"field": "standing", "type": "nominal", "title": None, "sort": [ON_FRONT, BEATEN], "legend": legend()},
                },
            },
            labels,
        ],
    }
