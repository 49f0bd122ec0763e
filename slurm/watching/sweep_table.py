"""The table of `crosscoder results`: best first, what was varied and what came of it; unfinished tasks below."""

from collections.abc import Sequence
from typing import Any

from slurm.client.slurm_values import ranges
from slurm.record.comparison import is_speed
from slurm.record.run_directory import Json
from slurm.record.text_table import Column, Layout, figure, lay_out
from slurm.submission.sweep_results import columns, is_number, short_names

MOST_OTHERS = 3
"""Of results that nobody asked for, shown where the sweep's file names no columns; results.csv has them all."""
WORDS = {"queued": "waiting", "new": "not queued"}


def result_columns(rows: Sequence[Json], varied: Sequence[str], metric: str | None, wished: Sequence[str]) -> list[str]:
    """The results to show: the metric, what the sweep's file wishes for, or else a few numbers that differ between tasks."""
    first = [*([metric] if metric else []), *(name for name in wished if name != metric)]
    if wished:
        return first

    def tells(name: str) -> bool:
        return (
            name not in (*first, *varied, "task")
            and not is_speed(name)
            and len({row[name] for row in rows if is_number(row.get(name))}) > 1
        )

    return [*first, *[name for name in columns(list(rows)) if tells(name)][:MOST_OTHERS]]


def table(rows: Sequence[Json], varied: Sequence[str], results: Sequence[str], width: int | None = None) -> Layout:
    """The rows in their order; tasks that have no result yet and are in one state share a line."""
    names = short_names(varied)
    names |= {result: result for result in results}
    fields = [*varied, *results]
    numeric = {field: all(is_number(row.get(field)) for row in rows if row.get(field) is not None) for field in fields}
    shown = [
        Column("TASK", is_right=True),
        *(Column(names[field], is_right=numeric[field]) for field in varied),
        *(Column(names[field], is_right=numeric[field], dropped=1 if place else 0) for place, field in enumerate(results)),
        Column("STATE"),
    ]
    lines = []
    for members in _folded(rows, results):
        row = members[0]
        texts = [_text(row.get(field), is_result=field in results) if len(members) == 1 else "" for field in fields]
        task = str(row["task"]) if len(members) == 1 else ranges([member["task"] for member in members])
        lines.append([task if len(task) <= 12 else f"{len(members)} tasks", *texts, _state(row, len(members))])
    return lay_out(shown, lines, width)


def _folded(rows: Sequence[Json], results: Sequence[str]) -> list[list[Json]]:
    """Each row alone, but those without any result or error that are in one state together, where they are more than a few."""
    lines: dict[Any, list[Json]] = {}
    for row in rows:
        is_bare = row["state"] != "finished" and "error" not in row and not any(row.get(name) is not None for name in results)
        lines.setdefault(row["state"] if is_bare else row["task"], []).append(row)
    return [part for members in lines.values() for part in ([members] if len(members) > 4 else [[row] for row in members])]


def _text(value: Any, *, is_result: bool) -> str:
    return "" if value is None and is_result else figure(value, is_grouped=is_result)


def _state(row: Json, count: int) -> str:
    """Nothing for what has finished: that is what one expects."""
    word = WORDS.get(row["state"], str(row["state"]))
    if row["state"] == "finished":
        return ""
    return f"{word}: {row['error']}" if "error" in row else word if count == 1 else f"{count} {word}"


def summary(name: str, rows: Sequence[Json], metric: str | None, *, maximize: bool) -> str:
    """`sweep/demo/k3f9: 8 tasks, 6 finished, 1 running, 1 failed; best explained_variance first (higher is better)`."""
    states = [WORDS.get(row["state"], row["state"]) for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    order = f"; best {metric} first ({'higher' if maximize else 'lower'} is better)" if metric else ""
    return f"{name}: {len(rows)} tasks, {counts}{order}"
