"""The tables that an evaluation ends with, as text for a terminal of 100 columns or a log file."""

import io
import re

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline.crosscoder.metrics import ReconstructionMetrics
from pipeline.evaluation.measurements import Loss, Measurements, Stand

WIDTH = 100

_RECONSTRUCTION_COLUMNS = {
    "explained_variance": "expl.\nvariance",
    "fraction_unexplained": "unex-\nplained",
    "explained_variance_legacy": "legacy\nratios",
    "explained_variance_of_residual": "of the\nresidual",
    "explained_norm": "1-|e|²\n/|x|²",
    "median_error": "median\n|e|/|x|",
    "best_scalar": "best\nscalar",
    "norm_ratio": "norm\nratio",
}
_NOTES = """\
matched: another layer's activation, moved and scaled to this layer's mean and spread
legacy ratios: mean over positions of 1 - |e|²/|x - mean|²; jointly: in normalized space
"""
_LOSS_COLUMNS = {
    "cross_entropy": "cross-entropy,\nnats",
    "difference": "more than\nclean, nats",
    "kl": "KL to clean,\nnats",
    "recovered_against_zero": "recovered\nagainst zero",
    "recovered_against_mean": "recovered\nagainst mean",
}


def tables(found: Measurements, layers: list[str]) -> str:
    """Reconstruction, cross-entropy, and for each layer a sentence that sets the crosscoder beside taking another layer."""
    text = "\n".join([_reconstruction(found, layers), _cross_entropy(found, layers), *verdicts(found, layers)])
    return re.sub(r"\s*\n{2,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines()))


def verdicts(found: Measurements, layers: list[str]) -> list[str]:
    """One sentence a layer: whether splicing in the reconstruction costs less than the best of the other layers."""
    sentences = []
    for layer in layers:
        others = {stand: loss for stand, loss in found.losses.items() if stand.layer == layer and stand.source}
        if not others:
            continue
        best = min(others, key=lambda stand: others[stand].cross_entropy)
        own, other = found.losses[Stand(layer, "crosscoder")].difference, others[best].difference
        outcome = "BETTER" if own < other else "WORSE"
        sentences.append(f"{layer}: {outcome} than switching layers (costs {number(own)} nats; {_label(best)}: {number(other)})")
    return sentences


def _reconstruction(found: Measurements, layers: list[str]) -> str:
    table = _table("Reconstruction: what may stand in for a layer's activations", list(_RECONSTRUCTION_COLUMNS.values()))
    for layer in layers:
        _section(table, layer, {stand: row for stand, row in found.reconstruction.items() if stand.layer == layer}, _RECONSTRUCTION_COLUMNS)
    together = {Stand(layer, "crosscoder"): found.reconstruction[Stand(layer, "crosscoder")] for layer in _TOGETHER}
    _section(table, "all layers", together, _RECONSTRUCTION_COLUMNS)
    return _text(table) + _NOTES


def _cross_entropy(found: Measurements, layers: list[str]) -> str:
    title = f"Cross-entropy of the language model: {found.clean_cross_entropy:.4f} nats clean; with activations replaced:"
    table = _table(title, list(_LOSS_COLUMNS.values()))
    for layer in [*layers, "all"]:
        heading = "all layers, from one encode" if layer == "all" else layer
        _section(table, heading, {stand: row for stand, row in found.losses.items() if stand.layer == layer}, _LOSS_COLUMNS)
    return _text(table)


_TOGETHER = {"joint": "jointly", "mean_over_layers": "mean of layers"}
_ORDER = ("crosscoder", "other_layer_matched", "other_layer", "mean", "zero")


def _section(table: Table, heading: str, rows: dict[Stand, ReconstructionMetrics] | dict[Stand, Loss], columns: dict[str, str]) -> None:
    """A heading and under it the layer's rows: the crosscoder, what it must beat, and the ablations."""
    table.add_row(heading)
    for stand, row in sorted(rows.items(), key=lambda item: _ORDER.index(item[0].by)):
        table.add_row("  " + _label(stand), *[number(getattr(row, name)) for name in columns])


def _label(stand: Stand) -> str:
    if stand.layer in _TOGETHER:
        return f"{stand.by}, {_TOGETHER[stand.layer]}"
    names = {"other_layer": f"{stand.source}", "other_layer_matched": f"{stand.source}, matched", "mean": "mean", "zero": "zeros"}
    return names.get(stand.by, stand.by)


def number(value: float | None) -> str:
    """In at most eight characters where possible; a dash where there is none."""
    if value is None:
        return "-"
    # Adding 0 makes 0 of -0.
    return f"{round(value, 4) + 0.0:.4f}" if abs(value) < 100 else f"{value:.3g}"


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True, min_width=7)
    return table


def _text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
