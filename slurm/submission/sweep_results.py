"""What a sweep has found so far: a row a task, best first, and as results.csv."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record.comparison import flatten
from slurm.record.run_directory import Json, RunDirectory, read_lines


def gather(run: RunDirectory, states: Mapping[int, str] | None = None) -> list[Json]:
    """A row a task: its number, state, varied fields, results (those that it ended with, else its last metrics), and its error.

    What has finished comes first, sorted by the sweep's metric where it names one, the best on top.

    states : what the queue says of the tasks, where it was asked; the run directory tells of the others.
    """
    if run.stage != "sweep":
        raise UserError(f"{run.reference} is not a sweep; `crosscoder show {run.reference}` shows its result")
    sweep = run.config_values()
    rows = []
    for task, member in enumerate(sweep["members"]):
        own = {"task": task, "state": (states or {}).get(task) or run.task_state(task), **member}
        rows.append(own | {name: value for name, value in _results(run, task).items() if name not in own})
    metric, sign = sweep["metric"], -1.0 if sweep["maximize"] else 1.0

    def place(row: Json) -> tuple[bool, bool, float]:
        value = row.get(metric) if metric else None
        known = float(value) if value is not None and is_number(value) and not math.isnan(value) else None
        return row["state"] != "finished", known is None, sign * (known or 0.0)

    return sorted(rows, key=place)


def _results(run: RunDirectory, task: int) -> Json:
    result = run.result(task)
    is_failed = result is not None and result["status"] == "failed"
    error = {"error": str((result or {})["error"]).strip().splitlines()[-1]} if is_failed else {}
    if result is not None and result["result"] is not None:
        return {name: value for name, value in flatten(result["result"]).items() if not isinstance(value, list)} | error
    lines = read_lines(run.task_directory(task) / "metrics.jsonl")
    return ({name: value for name, value in flatten(lines[-1]).items() if is_number(value)} if lines else {}) | error


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


def varied_fields(members: Sequence[Json]) -> list[str]:
    """The fields that are not the same in every task, in the sweep's order; all of them where nothing differs."""
    fields = list(dict.fromkeys(name for member in members for name in member))
    return [name for name in fields if len({repr(member.get(name)) for member in members}) > 1] or fields


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Each dotted field by as few of its last parts as tell it from the others; `kind` alone would say nothing."""
    short = {}
    for field in fields:
        parts = field.split(".")
        for count in range(2 if parts[-1] == "kind" else 1, len(parts) + 1):
            short[field] = ".".join(parts[-count:])
            if not any(other != field and f".{other}".endswith("." + short[field]) for other in fields):
                break
    return short
