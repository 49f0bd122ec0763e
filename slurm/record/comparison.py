"""What differs between two runs: settings, code, environment, inputs, results."""

from typing import Any

from pipeline import records
from slurm.record.run_directory import RunDirectory

Differences = dict[str, list[dict[str, Any]]]

PLACES = ("config", "code", "environment", "inputs", "results")


def compare_runs(first: RunDirectory, second: RunDirectory) -> Differences:
    """By place, a row for each thing that differs: its name and its value in either run (None: it has none)."""
    return {
        "config": _differing(flatten(first.config_values()), flatten(second.config_values())),
        "code": _code(first, second),
        "environment": _environment(first, second),
        "inputs": _differing(_identities(first), _identities(second)),
        "results": _differing(_results(first), _results(second)),
    }


def phrases(differences: Differences) -> list[str]:
    """A line for each difference."""
    return [f"{place}: {row['name']}: {_short(row['first'])} -> {_short(row['second'])}" for place in PLACES for row in differences[place]]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: leaf for name, inner in value.items() for key, leaf in flatten(inner, f"{prefix}.{name}" if prefix else str(name)).items()}


def _differing(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    names = [*first, *(name for name in second if name not in first)]
    return [{"name": n, "first": first.get(n), "second": second.get(n)} for n in names if first.get(n) != second.get(n)]


def _code(first: RunDirectory, second: RunDirectory) -> list[dict[str, Any]]:
    one, other = (records.read_json(run.path / "code.json") for run in (first, second))
    files = _differing(one["files"], other["files"])
    if not files:
        return []
    return [*_differing({"commit": one["commit"]}, {"commit": other["commit"]}), *files]


def _environment(first: RunDirectory, second: RunDirectory) -> list[dict[str, Any]]:
    one, other = (records.read_json(run.path / "environment.json") for run in (first, second))
    plain = [{k: v for k, v in flatten(record).items() if k not in ("user",)} for record in (one, other)]
    return _differing(*plain)


def _identities(run: RunDirectory) -> dict[str, Any]:
    return {field: entry.get("data_id") or entry.get("content") or entry.get("made_by") for field, entry in run.inputs().items()}


def _results(run: RunDirectory) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for task in range(run.num_tasks):
        result = run.result(task)
        if result is not None:
            prefix = f"{task}." if run.num_tasks > 1 else ""
            flat |= flatten({prefix + "status": result["status"], **{prefix + k: v for k, v in (result["result"] or {}).items()}})
    return flat


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
