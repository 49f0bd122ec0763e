"""Figures of the verdict: the crosscoder beside each baseline, by cost in nats, by explained variance, and that at other L0s."""

from pathlib import Path

from pipeline.evaluation import figures, verdict
from pipeline.evaluation.figures import Bar, Curve, Panel
from pipeline.evaluation.measurements import Measurements
from pipeline.evaluation.verdict import LayerVerdict

FARTHEST = 4.0
"""A bar of nats ends at so many times what the crosscoder or its strongest baseline costs; mean and zeros cost far more as a rule."""

EMPTY_AXIS = 0.1
"""Nats that the axis shows where nothing costs anything."""


def draw_nats(path: Path, found: Measurements, ranks: dict[str, int]) -> None:
    """What each stand-in costs; the cheapest on top."""
    compared = {layer: verdict.compare(found, layer, ranks)[0] for layer in found.layers}
    panels = [
        Panel(f"{layer}: {of.outcome} than the strongest baseline", _bars(of, sign=1), not of.is_better) for layer, of in compared.items()
    ]
    values = [bar.value for panel in panels for bar in panel.bars]
    near = max(max(of.own, min(value for _, value in of.others)) for of in compared.values())
    greatest = min(max(values), FARTHEST * near) if near > 0 else max(*values, EMPTY_AXIS)
    label = "nats that the language model loses with the layer replaced"
    figures.stand_ins(path, panels, label=label, least=max(min(*values, 0.0), -greatest), greatest=greatest)


def draw_explained_variance(path: Path, found: Measurements, ranks: dict[str, int]) -> None:
    """How much each stand-in explains, the most on top; the outcome by nats, with which the verdict begins, in color and in words."""
    panels = []
    for layer in found.layers:
        nats, variance = verdict.compare(found, layer, ranks)
        if variance.best is not None:
            title = f"{layer}: {nats.outcome} by nats (nats.png); here, by explained variance, {variance.outcome}"
            panels.append(Panel(title, _bars(variance, sign=-1), not nats.is_better))
    if panels:
        label = "explained variance (predicting the mean: 0)"
        figures.stand_ins(path, panels, label=label, least=figures.LOWEST_EXPLAINED_VARIANCE, greatest=1.0)


def draw_sweep(path: Path, found: Measurements, ranks: dict[str, int]) -> None:
    """What the crosscoder explains at other L0s, beside the strongest baseline of each layer; nothing where it has no thresholds."""
    curves = []
    for layer in found.layers:
        known = [(point, share) for point in found.sweep if (share := point.explained_variance[layer]) is not None]
        own = next(((point.l0, share) for point, share in known if point.threshold_factor == 1), None)
        best = verdict.compare(found, layer, ranks)[1].best
        curves.append(Curve(layer, [(point.l0, share) for point, share in known if point.l0 > 0], own, best))
    curves = [curve for curve in curves if len(curve.points) > 1]
    if curves:
        figures.l0_curves(path, curves)


def _bars(of: LayerVerdict, *, sign: int) -> list[Bar]:
    bars = [Bar("the crosscoder", of.own, True), *(Bar(name, value) for name, value in of.others)]
    return sorted(bars, key=lambda bar: sign * bar.value)
