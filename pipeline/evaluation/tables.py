"""The wide tables of an evaluation, as text for a terminal of 100 columns or a log file."""

import io
import re

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline.crosscoder.metrics import ReconstructionMetrics
from pipeline.evaluation.driving import DrivingLayers
from pipeline.evaluation.measurements import JOINT, MEAN_OVER_LAYERS, SPLIT, Loss, Measurements
from pipeline.evaluation.model_diffing import ModelDifference
from pipeline.evaluation.outliers import FEW, LayerOutliers
from pipeline.evaluation.predictions import Stand
from pipeline.evaluation.splicing import of_model
from pipeline.evaluation.verdict import ORDER, compared_run, number
from pipeline.language_models import sites_of

WIDTH = 100

_RECONSTRUCTION_COLUMNS = {
    "explained_variance": "expl.\nvariance",
    "explained_variance_with_outliers": "with\noutliers",
    "explained_variance_legacy": "legacy\nratios",
    "explained_variance_of_residual": "of the\nresidual",
    "explained_norm": "1-|e|²\n/|x|²",
    "median_error": "median\n|e|/|x|",
    "best_scalar": "best\nscalar",
    "norm_ratio": "norm\nratio",
}
_NOTES = """\
matched: another layer's activation, moved and scaled to this layer's mean and spread
legacy ratios: mean over positions of 1 - |e|²/|x - mean|²; jointly: layers over their spread
"""
_LOSS_COLUMNS = {
    "cross_entropy": "cross-entropy,\nnats",
    "difference": "more than\nclean, nats",
    "kl": "KL to clean,\nnats",
    "recovered_against_zero": "recovered\nagainst zero",
    "recovered_against_mean": "recovered\nagainst mean",
}
_OUTLIER_COLUMNS = {
    "norm_limit": "outliers are\nover norm",
    "share_of_squared_norm": "they hold\nof |x|²",
    "share_of_variance": "they hold of\nthe variance",
    "share_of_few": f"{100 * FEW:g} % of the\nrest hold of it",
}


def tables(found: Measurements, layers: list[str]) -> str:
    """Outliers, reconstruction, cross-entropy, and what drives the features, for all layers that the crosscoder reads."""
    parts = [_outliers(found.outliers), _reconstruction(found, found.layers), _cross_entropy(found, found.layers)]
    if len(found.sweep) > 1:
        parts.append(_sweep(found))
    if len(layers) > 1:
        parts.append(_driving(found.driving.results(), layers))
    parts += [_model_difference(pair) for pair in found.model_differences]
    return re.sub(r"\s*\n{2,}", "\n\n", "\n".join(line.rstrip() for line in "\n".join(parts).splitlines()))


def _outliers(rows: list[LayerOutliers]) -> str:
    table = _table("Outliers: positions left out", list(_OUTLIER_COLUMNS.values()))
    for row in rows:
        norm, *shares = (getattr(row, name) for name in _OUTLIER_COLUMNS)
        table.add_row(row.layer, f"{norm:,.0f}" if norm is not None and norm >= 100 else number(norm), *map(number, shares))
    return _text(table)


def _reconstruction(found: Measurements, layers: list[str]) -> str:
    table = _table("Reconstruction: what may stand in for a layer's activations", list(_RECONSTRUCTION_COLUMNS.values()))
    for layer in layers:
        _section(table, layer, {stand: row for stand, row in found.reconstruction.items() if stand.layer == layer}, _RECONSTRUCTION_COLUMNS)
    for name, heading in {JOINT: "all layers jointly", MEAN_OVER_LAYERS: "mean over layers"}.items():
        rows = {stand: row for stand, row in found.reconstruction.items() if stand.layer == name and stand.by in _IN_ALL_LAYERS}
        _section(table, heading, rows, _RECONSTRUCTION_COLUMNS)
    runs = [f"{compared_run(found, label)}: another run\n" for label in found.compared_firing]
    return _text(table) + _NOTES + "".join(runs)


def _cross_entropy(found: Measurements, layers: list[str]) -> str:
    clean = ", ".join(f"{nats:.4f} nats clean" + (f" ({name})" if name else "") for name, nats in found.clean_by_model.items())
    whose = "the language model" if len(found.clean_by_model) == 1 else "each language model"
    table = _table(f"Cross-entropy of {whose}: {clean}; with activations replaced:", list(_LOSS_COLUMNS.values()))
    headings = {MEAN_OVER_LAYERS: "mean over layers, each alone"}
    for name in found.clean_by_model:
        own, of = sites_of(name, layers), f" of {name}" if name else ""
        headings |= {of_model(name, MEAN_OVER_LAYERS): f"mean over layers{of}, each alone"} if name and len(own) > 1 else {}
        headings |= {of_model(name, SPLIT): f"each position at one layer{of}"} if len(own) > 1 else {}
    for layer in [*layers, *(headings if len(layers) > 1 else [])]:
        rows = {stand: row for stand, row in found.losses.items() if stand.layer == layer}
        _section(table, headings.get(layer, layer), rows, _LOSS_COLUMNS)
    return _text(table)


def _sweep(found: Measurements) -> str:
    table = _table(
        "At other L0s: the crosscoder with its thresholds times a factor",
        ["factor", "L0", *(f"explained,\n{layer}" for layer in found.layers)],
    )
    for point in found.sweep:
        shares = [number(point.explained_variance[layer]) for layer in found.layers]
        table.add_row("as trained" if point.threshold_factor == 1 else "", number(point.threshold_factor), f"{point.l0:.2f}", *shares)
    return _text(table)


def _driving(found: DrivingLayers, layers: list[str]) -> str:
    table = _table("What drives the features, mean over those that fire", ["activation lost\nwithout it", "firings left\nwith it alone"])
    for layer, drop, alone in zip(layers, found.drop_L, found.survives_alone_L, strict=True):
        table.add_row(layer, number(drop), number(alone))
    return _text(table)


def _model_difference(pair: ModelDifference) -> str:
    title = f"Model diffing, {pair.one} to {pair.other}, of {int(pair.fires_F.sum()):,} features"
    table = _table(title, ["features", "share", "median\nnu error", "median nu\nreconstr.", "absent from\nthe other"])
    for row in pair.classes():
        absent = f"{row.absent:,}" if row.absent is not None and row.name.startswith("only_") else "-"
        numbers = (f"{100 * row.fraction:.1f} %", number(row.nu_error), number(row.nu_reconstruction), absent)
        table.add_row(row.name.replace("only_", "only "), f"{row.features:,}", *numbers)
    return _text(table)


_IN_ALL_LAYERS = ("crosscoder", "compared", "affine", "affine_all")


def _section(table: Table, heading: str, rows: dict[Stand, ReconstructionMetrics] | dict[Stand, Loss], columns: dict[str, str]) -> None:
    """A heading and under it the layer's rows: the crosscoder, what it must beat, and the ablations."""
    table.add_row(heading)
    for stand, row in sorted(rows.items(), key=lambda item: ORDER.index(item[0].by)):
        table.add_row("  " + _label(stand), *[number(getattr(row, name)) for name in columns])


def _label(stand: Stand) -> str:
    names = {
        "dense_path": "its dense path alone",
        "compared": f"{stand.source}",
        "affine": f"affine of {stand.source}" if stand.source else "affine",
        "affine_all": "affine of the others",
        "other_layer": f"{stand.source}" if stand.source else "other layer",
        "other_layer_matched": f"{stand.source}, matched" if stand.source else "other, matched",
        "pca": "PCA",
        "pca_joint": "PCA over layers",
        "random_dictionary": "random dictionary",
        "strongest_baseline": "strongest baseline",
        "zero": "zeros",
    }
    return names.get(stand.by, stand.by)


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
