"""What a sweep has found so far: a row a task, best first, as a table, as results.csv and as a plot."""

import csv
import io
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record.comparison import flatten
from slurm.record.run_directory import Json, RunDirectory, read_lines

MOST_COLUMNS = 8
"""Of results on the terminal; results.csv has them all."""


def gather(run: RunDirectory) -> list[Json]:
    """A row a task: its number, state, varied fields, and results: those that it ended with, else its last metrics.

    Sorted by the sweep's metric where it names one, best first, tasks without it last.
    """
    if run.stage != "sweep":
        raise UserError(f"{run.reference} is not a sweep; `crosscoder show {run.reference}` shows its result")
    sweep = run.config_values()
    rows = []
    for task, member in enumerate(sweep["members"]):
        own = {"task": task, "state": run.task_state(task), **member}
        rows.append(own | {name: value for name, value in _results(run, task).items() if name not in own})
    metric = sweep["metric"]
    if metric is None:
        return rows
    sign = -1.0 if sweep["maximize"] else 1.0
    return sorted(rows, key=lambda row: (not is_number(row.get(metric)), sign * row[metric] if is_number(row.get(metric)) else 0.0))


def _results(run: RunDirectory, task: int) -> Json:
    result = run.result(task)
    if result is not None and result["result"] is not None:
        return {name: value for name, value in flatten(result["result"]).items() if not isinstance(value, list)}
    lines = read_lines(run.task_directory(task) / "metrics.jsonl")
    return {name: value for name, value in flatten(lines[-1]).items() if is_number(value)} if lines else {}


def is_number(value: Any) -> bool:
    """Whether `value` can be sorted and drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def columns(rows: list[Json]) -> list[str]:
    """Every column that a row has, in the order met."""
    return list(dict.fromkeys(name for row in rows for name in row))


def write_csv(rows: list[Json], path: Path) -> None:
    """Writes all columns of `rows`; a value that a row lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with records.atomic_file(path) as file:
        file.write(text.getvalue().encode())


def table_columns(rows: list[Json], varied: list[str], metric: str | None, wished: list[str]) -> list[str]:
    """The columns for a terminal: task, state, what was varied, the metric, what is `wished`, and a few other numbers that differ."""
    first = ["task", "state", *varied, *([metric] if metric else []), *wished]

    def tells(name: str) -> bool:
        values = {row[name] for row in rows if is_number(row.get(name))}
        return len(values) > 1 and name not in first

    others = [name for name in columns(rows) if tells(name)]
    return [*first, *others[: max(0, MOST_COLUMNS - len(first))]]


def plot(rows: list[Json], varied: list[str], metric: str, path: Path) -> bool:
    """Draws the metric over each varied field that has numbers; False if there is nothing to draw yet."""
    drawn = [name for name in varied if any(is_number(row.get(name)) and is_number(row.get(metric)) for row in rows)]
    if not drawn:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(drawn), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        points = sorted((row[name], row[metric]) for row in rows if is_number(row.get(name)) and is_number(row.get(metric)))
        axes.plot([x for x, _ in points], [y for _, y in points], "o")
        positive = all(x > 0 for x, _ in points)
        if positive and points[-1][0] >= 20 * points[0][0]:
            axes.set_xscale("log")
        axes.set(xlabel=name, ylabel=metric)
    with records.atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True
