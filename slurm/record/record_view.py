"""The record of a run as `crosscoder show` gives it: values for `--json`, text for reading."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config import load, yaml_file
from pipeline.config.errors import UserError
from pipeline.run import amount, duration
from slurm.record.comparison import flatten, is_speed, shown
from slurm.record.run_directory import Json, RunDirectory

MOST_TASKS = 20
"""Of a run divided into more, the text shows only those that neither wait nor have finished, up to so many."""
MOST_ATTEMPTS = 6
"""Of a task's attempts the text shows the newest."""

Standing = tuple[str, str]
"""A task's state and why, as `crosscoder jobs` says them."""


def as_values(run: RunDirectory, standing: Mapping[int, Standing] | None = None, *, task: int | None = None) -> Json:
    """Everything that the run directory records, but the hash of each file of the code and the packages' versions.

    standing : what the queue says of the tasks, where it was asked.
    task : only this one of them; of a sweep with its own configuration and inputs.
    """
    record = run if task is None else run.record_of_task(task)
    code = dict(records.read_json(run.path / "code.json"))
    code["files"] = len(code["files"])
    return {
        "run": run.reference,
        "directory": str(run.path),
        "state": run.state(),
        "tasks": [_task_values(run, i, (standing or {}).get(i)) for i in (range(run.num_tasks) if task is None else [task])],
        "config": record.config_values(),
        "inputs": record.inputs(),
        "code": code,
        "environment": dict(records.read_json(run.path / "environment.json")),
        "job": run.job(),
    }


def _task_values(run: RunDirectory, task: int, standing: Standing | None) -> Json:
    return {
        "task": task,
        "state": run.task_state(task),
        "queue": {"state": standing[0], "reason": standing[1]} if standing else None,
        "job": run.job_of_task(task),
        "progress": run.progress(task),
        "attempts": run.attempts(task),
        "result": run.result(task),
    }


def as_text(
    run: RunDirectory, standing: Mapping[int, Standing] | None = None, *, whole_config: bool = False, task: int | None = None
) -> str:
    """The record for a terminal: how it stands and what came out first, then the settings, then where all is from."""
    values = as_values(run, standing, task=task)
    record = run if task is None else run.record_of_task(task)
    settings = _settings_lines(record, values["config"])
    if whole_config:
        settings = ["config.yaml", *_indented(yaml_file.write(values["config"]))]
    parts = [_task_lines(values, run, task), _varied_lines(run, task), settings, _record_lines(run, values)]
    return "\n\n".join("\n".join(part) for part in parts if part)


# -- state and results ------------------------------------------------------------------------------------------------


def _task_lines(values: Json, run: RunDirectory, only: int | None) -> list[str]:
    tasks = values["tasks"]
    if len(tasks) == 1:
        (task,) = tasks
        results = _result_lines(task, str(run.task_directory(task["task"])))
        title = values["run"] if only is None else f"{values['run']} task {only}" + (f" (job {task['job']})" if task["job"] else "")
        return [f"{title}: {_state_of(task)}", *_progress_lines(task), *_error_lines(task), *results, *_attempt_lines(task)]
    states = [_word(task) for task in tasks]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    told = [task for task in tasks if _word(task) not in ("finished", "waiting", "queued", "new")] if len(tasks) > MOST_TASKS else tasks
    lines = [f"{values['run']}: {counts}"]
    for task in told[:MOST_TASKS]:
        where = [f"job {task['job']}"] if task["job"] else []
        num_attempts = sum(line["event"] == "start" for line in task["attempts"])
        where += [f"{num_attempts} attempts"] if num_attempts > 1 else []
        lines.append(f"  task {task['task']:<4} " + "; ".join([_state_of(task), *where, *map(str.strip, _progress_lines(task))]))
        lines += ["  " + line for line in _error_lines(task)]
    more = len(told) - MOST_TASKS
    return lines + ([f"  ... and {more} more; --json has all"] if more > 0 else [])


def _word(task: Json) -> str:
    """The state in the queue's word where it was asked, else the run directory's."""
    return str(task["queue"]["state"] if task["queue"] else task["state"])


def _state_of(task: Json) -> str:
    """`waiting: waits for nodes to become free`, `finished in 2 min 42 s`. Errors have lines of their own."""
    word, result = _word(task), task["result"]
    if word == "finished" and result and result.get("started") and result.get("ended"):
        return f"finished in {duration(result['ended'] - result['started'])}, {_when(result['ended'])}"
    reason = task["queue"]["reason"] if task["queue"] and word not in ("finished", "failed") else ""
    if reason.startswith(f"was {word}"):  # `was stopped (SIGTERM); goes on ...` is `stopped (SIGTERM): goes on ...` here
        cause, _, reason = reason.removeprefix(f"was {word}").partition("; ")
        word += cause
    return f"{word}: {reason}" if reason else word


def _progress_lines(task: Json) -> list[str]:
    progress = task["progress"]
    if not progress or _word(task) == "finished":
        return []
    came = "" if _word(task) == "running" else "came as far as "
    return [f"  {came}{progress['phase']}: {amount(progress['step'], progress['total'], progress['unit'])}, {_when(progress['time'])}"]


def _error_lines(task: Json) -> list[str]:
    error = (task["result"] or {}).get("error")
    return _indented(f"error: {error.strip()}") if error else []


def _result_lines(task: Json, directory: str) -> list[str]:
    """What was found, then how fast; files of the run directory by their names in it."""
    flat = flatten((task["result"] or {}).get("result") or {})
    named = [(name, _result_text(flat[name], directory)) for name in sorted(flat, key=is_speed)]
    return ["", "results", *_aligned(named)] if named else []


def _result_text(value: Any, directory: str) -> str:
    if isinstance(value, list):
        return ", ".join(_result_text(item, directory) for item in value)
    return shown(value.removeprefix(directory + "/") if isinstance(value, str) else value)


def _attempt_lines(task: Json) -> list[str]:
    """A line for each time that a process took up the task."""
    starts = [line for line in task["attempts"] if line["event"] == "start"]
    ends = {(line["job"], line["restart"]): line for line in task["attempts"] if line["event"] == "end"}
    lines = []
    for start in starts[-MOST_ATTEMPTS:]:
        end = ends.get((start["job"], start["restart"]))
        again = f" (restart {start['restart']})" if start["restart"] else ""
        if end:
            how = f"{end['status']} after {duration(end['time'] - start['time'])}"
            how += f"; {end['next']}" if end["next"] and end["status"] != "finished" else ""
        else:
            how = "under way" if start is starts[-1] and _word(task) == "running" else "ended without a word: killed, or its node was lost"
        lines.append((_when(start["time"]), f"job {start['job']}{again}", f"on {start['host']}", how))
    if not lines:
        return []
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    shown_lines = ["  " + "  ".join(text.ljust(width) for text, width in zip(line, [*widths, 0], strict=True)).rstrip() for line in lines]
    earlier = len(starts) - len(lines)
    return ["", "attempts" + (f" ({earlier} earlier ones in attempts.jsonl)" if earlier else ""), *shown_lines]


# -- settings ---------------------------------------------------------------------------------------------------------


def _settings_lines(run: RunDirectory, values: Json) -> list[str]:
    """The settings that are not at their defaults; of a sweep its own."""
    if run.stage == "sweep":
        own = {k: v for k, v in values.items() if k not in ("stage", "name", "members") and v not in (None, [], {})}
        return ["the sweep", *_aligned(_typed(own)), f"  tasks: {len(values['members'])}; crosscoder results {run.reference}"]
    if run.stage not in load.STAGES:
        return ["settings", *_aligned(_typed(values))]
    try:
        chosen = run.config().chosen()
    except UserError:  # frozen by code whose settings were others
        return ["settings", *_aligned(_typed(values))]
    return ["settings that are not at their defaults (--config shows all)", *_aligned(_typed(chosen, without=("stage", "name")))]


def _varied_lines(run: RunDirectory, task: int | None) -> list[str]:
    """What the sweep varies, as task `task` has it."""
    if task is None or run.stage != "sweep":
        return []
    return ["of what the sweep varies", *_aligned(_typed(run.config_values()["members"][task]))]


def _typed(values: Json, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    flat = flatten({key: value for key, value in values.items() if key not in without})
    return [(key, shown(value, is_grouped=False)) for key, value in flat.items()]


# -- where it is from -------------------------------------------------------------------------------------------------


def _record_lines(run: RunDirectory, values: Json) -> list[str]:
    job, code, environment = values["job"], values["code"], values["environment"]
    commit = f"commit {code['commit'][:12]}" + (" with edits (code.diff)" if code["edited"] else "") if code["commit"] else "no git"
    lines = [
        ("directory", values["directory"]),
        ("submitted", f"{_when(job['submitted'])} by {job['submitted_by']}: {' '.join(job['command'])}"),
        ("executor", f"{job['executor']} on {job['cluster']}{_jobs_text(job['jobs'])}"),
        ("code", f"{code['hash'][:12]}, {code['files']} files, {commit}"),
        ("environment", f"python {environment['python_version']}, torch {environment['torch']}, {len(environment['packages'])} packages"),
        *(("after", _parent_text(Path(parent))) for parent in job["after"]),
        *(("input", f"{field}: {_input_text(entry)}") for field, entry in values["inputs"].items()),
        *(("changed", f"{_when(change['time'])} by {change['by']}: {change_text(change)}") for change in job["changes"]),
    ]
    return ["record", *_aligned(lines)]


def _jobs_text(entries: list[Json]) -> str:
    """The newest submission's job, and those that it replaced."""
    if not entries:
        return ""
    *earlier, last = [str(entry["id"]) for entry in entries]
    return f"; job {last}" + (f" (before it {', '.join(earlier)})" if earlier else "")


def change_text(change: Json) -> str:
    """`timeout_min 60 -> 30, partition main -> low (scontrol)`: what `crosscoder change`, `hold` and the like did."""
    parts = []
    for key, value in change["what"].items():
        if key == "tasks":
            continue
        if key in ("cancelled", "held", "released", "cancelled_tasks"):
            parts.append(f"{key.partition('_')[0]} {'task ' if key.endswith('_tasks') else ''}{_few(value)}")
        elif key == "dependants":
            parts += [f"{_few(value)} now wait for it" if len(value) > 1 else f"{value[0]} now waits for it"] if value else []
        elif isinstance(value, list) and len(value) == 2:
            parts.append(f"{key} {_setting(value[0])} -> {_setting(value[1])}")
        else:
            parts.append(f"{key} {_setting(value)}")
    how = f" ({change['how']})" if change["how"] not in ("scancel", "scontrol") else ""
    tasks = change["what"].get("tasks", [])
    of = f"task{'s' if len(tasks) > 1 else ''} {_few(tasks)}: " if tasks else ""
    return of + ", ".join(parts) + how


def _few(values: Sequence[Any], most: int = 4) -> str:
    text = ", ".join(str(value) for value in values[:most])
    return text if len(values) <= most else f"{text} and {len(values) - most} more"


def _setting(value: Any) -> str:
    """A value of a change: runs by their references, mappings as `key=value`."""
    if isinstance(value, list):
        return ", ".join("/".join(Path(item).parts[-3:]) if str(item).startswith("/") else str(item) for item in value) or "none"
    if isinstance(value, dict):
        return " ".join(f"{key}={shown(inner, is_grouped=False)}" for key, inner in flatten(value).items())
    return shown(value, is_grouped=False)


def _parent_text(path: Path) -> str:
    if not (path / "job.json").exists():
        return f"{path}, which is gone"
    parent = RunDirectory(path)
    return f"{parent.reference}, {parent.state()}"


def _input_text(entry: Json) -> str:
    identity = entry.get("data_id") or entry.get("content")
    if "name" in entry:
        commit = f" (commit {entry['commit'][:12]})" if "commit" in entry else ""
        return f"{entry['name']}{commit} {entry['kind']} {identity[:12] if identity else 'bound when it is first used'}"
    told = identity[:12] if identity else f"made by {entry.get('made_by')}"
    return f"{entry.get('path', '')} {entry.get('kind', '')} {told}".strip()


def _aligned(pairs: Any) -> list[str]:
    rows = list(pairs)
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {text}".rstrip() for name, text in rows]


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _indented(text: str) -> list[str]:
    return ["  " + line for line in text.splitlines()]
