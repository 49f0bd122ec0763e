"""What differs between two runs, or tasks: settings, code, environment, inputs, results, and, apart from those, speed."""

import re
from typing import Any

from pipeline import records
from slurm.record.run_directory import RunDirectory
from slurm.record.run_reference import Named
from slurm.record.text_table import figure

Row = dict[str, Any]
Differences = dict[str, list[Row]]

PLACES = ("config", "code", "environment", "inputs", "results", "speed")
SPEED = re.compile(r"(^|[._])(seconds|minutes|hours|duration|elapsed)($|[._])|_per_(second|s|minute|hour)($|[._])")
"""Names of results that are never the same twice."""
MOST_FILES = 10
"""Of code that differs, in the text."""
IDENTITIES = ("data_id", "content", "made_by")
"""What an input is known by, the surest first."""
HASH = re.compile(r"[0-9a-f]{32,}")


def compare_runs(first: Named, second: Named) -> Differences:
    """By place, a row for each thing that differs: its name and its value in either run (None: it has none)."""
    results = _result_rows(first, second)
    return {
        "config": _differing(flatten(first.record.config_values()), flatten(second.record.config_values())),
        "code": _code(first.run, second.run),
        "environment": _environment(first.run, second.run),
        "inputs": _input_rows(first.record.inputs(), second.record.inputs()),
        "results": [row for row in results if not is_speed(row["name"])],
        "speed": [row for row in results if is_speed(row["name"])],
    }


def is_speed(name: str) -> bool:
    """Whether a result of that name measures time: it differs between runs that are alike in all else."""
    return SPEED.search(name) is not None


def phrases(differences: Differences) -> list[str]:
    """A line for each difference."""
    return [
        f"{place}: {row['name']}: {_of(place, row['first'])} -> {_of(place, row['second'])}"
        for place in PLACES
        for row in differences[place]
    ]


def as_text(first: Named, second: Named, differences: Differences) -> str:
    """The differences for a terminal, by place."""
    lines = [f"{first.reference} -> {second.reference}"]
    for place in PLACES:
        rows = differences[place]
        if not rows:
            continue
        heading = "speed (no two runs are alike in it)" if place == "speed" else place
        texts = [(row["name"], _of(place, row["first"]), _of(place, row["second"])) for row in rows]
        cut = texts[:MOST_FILES] if place == "code" else texts
        name, value = (max(len(row[i]) for row in cut) for i in (0, 1))
        lines += ["", heading, *(f"  {row[0]:<{name}}  {row[1]:<{value}}  -> {row[2]}" for row in cut)]
        if place == "code":
            left = f"{len(texts) - len(cut)} more; " if len(texts) > len(cut) else ""
            lines.append(f"  {left}diff -r {first.run.code} {second.run.code}")
    same = [place for place in ("config", "code", "environment", "inputs", "results") if not differences[place]]
    return "\n".join([*lines, "", f"the same: {', '.join(same)}"] if same else lines)


def _of(place: str, value: Any) -> str:
    return shown(value, is_grouped=place in ("results", "speed"))


def shown(value: Any, *, is_grouped: bool = True) -> str:
    """A value for reading; hashes by their first letters."""
    if isinstance(value, list):
        return ", ".join(shown(item, is_grouped=is_grouped) for item in value)
    if isinstance(value, str) and HASH.fullmatch(value):
        return value[:12]
    text = figure(value, is_grouped=is_grouped)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-29:]}"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: leaf for name, inner in value.items() for key, leaf in flatten(inner, f"{prefix}.{name}" if prefix else str(name)).items()}


def _differing(first: dict[str, Any], second: dict[str, Any]) -> list[Row]:
    names = [*first, *(name for name in second if name not in first)]
    return [{"name": n, "first": first.get(n), "second": second.get(n)} for n in names if first.get(n) != second.get(n)]


def _code(first: RunDirectory, second: RunDirectory) -> list[Row]:
    one, other = (records.read_json(run.path / "code.json") for run in (first, second))
    files = _differing(one["files"], other["files"])
    if not files:
        return []
    return [*_differing({"commit": one["commit"]}, {"commit": other["commit"]}), *files]


def _environment(first: RunDirectory, second: RunDirectory) -> list[Row]:
    one, other = (records.read_json(run.path / "environment.json") for run in (first, second))
    plain = [{k: v for k, v in flatten(record).items() if k not in ("user",)} for record in (one, other)]
    return _differing(*plain)


def _input_rows(first: dict[str, Any], second: dict[str, Any]) -> list[Row]:
    """A row for each input that differs, and one for each file of a language model or tokenizer that does."""
    rows = []
    for field in dict.fromkeys([*first, *second]):
        pair = first.get(field, {}), second.get(field, {})
        # Before its stage has loaded a tokenizer, a run knows only the files: what both know decides.
        key = next((key for key in IDENTITIES if all(entry.get(key) for entry in pair)), None)
        one, other = (entry[key] if key is not None else _identity(entry) for entry in pair)
        if one != other:
            files = ({f"{field}: {name}": content for name, content in entry.get("files", {}).items()} for entry in pair)
            rows += [{"name": field, "first": one, "second": other}, *_differing(*files)]
    return rows


def _identity(entry: dict[str, Any]) -> Any:
    return next((entry[key] for key in IDENTITIES if entry.get(key)), None)


def _result_rows(first: Named, second: Named) -> list[Row]:
    """Of a run that has no result yet only its state, not each number that it lacks; nothing of one that was never submitted."""
    one, other = _results(first), _results(second)
    if one and other:
        return _differing(one, other)
    states = _state(first), _state(second)
    return [{"name": "state", "first": states[0], "second": states[1]}] if (one or other) and "new" not in states else []


def _state(named: Named) -> str:
    return named.run.state() if named.task is None else named.run.task_state(named.task)


def _results(named: Named) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for task in named.tasks:
        result = named.run.result(task)
        if result is not None:
            prefix = f"{task}." if len(named.tasks) > 1 else ""
            flat |= flatten({prefix + "status": result["status"], **{prefix + k: v for k, v in (result["result"] or {}).items()}})
    return flat
