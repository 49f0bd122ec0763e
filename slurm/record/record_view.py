"""The record of a run as `crosscoder show` gives it: values for `--json`, text for reading."""

import time
from pathlib import Path

from pipeline import records
from pipeline.config import yaml_file
from pipeline.run import duration, quantity
from slurm.record.run_directory import Json, RunDirectory

MOST_TASKS = 20
"""Of a run divided into more, the text shows only those that have not finished, up to so many."""


def as_values(run: RunDirectory) -> Json:
    """Everything that the run directory records, but the hash of each file of the code and the packages' versions."""
    code = dict(records.read_json(run.path / "code.json"))
    code["files"] = len(code["files"])
    return {
        "run": run.reference,
        "directory": str(run.path),
        "state": run.state(),
        "tasks": [_task_values(run, task) for task in range(run.num_tasks)],
        "config": run.config_values(),
        "inputs": run.inputs(),
        "code": code,
        "environment": dict(records.read_json(run.path / "environment.json")),
        "job": run.job(),
    }


def _task_values(run: RunDirectory, task: int) -> Json:
    return {
        "task": task,
        "state": run.task_state(task),
        "job": run.job_of_task(task),
        "progress": run.progress(task),
        "attempts": run.attempts(task),
        "result": run.result(task),
    }


def as_text(run: RunDirectory) -> str:
    """The record for a terminal."""
    values = as_values(run)
    job, code, environment = values["job"], values["code"], values["environment"]
    commit = f"commit {code['commit'][:12]}" + (" with edits (code.diff)" if code["edited"] else "") if code["commit"] else "no git"
    lines = [
        f"{values['run']}: {values['state']}",
        f"  directory    {values['directory']}",
        f"  submitted    {_when(job['submitted'])} by {job['submitted_by']}: {' '.join(job['command'])}",
        f"  executor     {job['executor']} on {job['cluster']}; jobs {', '.join(str(e['id']) for e in job['jobs']) or 'none'}",
        f"  code         {code['hash'][:12]}, {code['files']} files, {commit}",
        f"  environment  python {environment['python_version']}, torch {environment['torch']}, {len(environment['packages'])} packages",
    ]
    lines += [f"  after        {_parent_text(Path(parent))}" for parent in job["after"]]
    lines += [f"  input        {field}: {_input_text(entry)}" for field, entry in values["inputs"].items()]
    lines += [f"  changed      {_when(change['time'])} by {change['by']}: {change['what']}" for change in job["changes"]]
    lines += ["", *_task_lines(values["tasks"]), "", "config.yaml", *_indented(yaml_file.write(values["config"]))]
    return "\n".join(lines)


def _parent_text(path: Path) -> str:
    if not (path / "job.json").exists():
        return f"{path}, which is gone"
    parent = RunDirectory(path)
    return f"{parent.reference}, {parent.state()}"


def _input_text(entry: Json) -> str:
    identity = entry.get("data_id") or entry.get("content")
    shown = identity[:12] if identity else f"made by {entry.get('made_by')}"
    return f"{entry.get('path', '')} {entry.get('kind', '')} {shown}".strip()


def _task_lines(tasks: list[Json]) -> list[str]:
    if len(tasks) <= MOST_TASKS:
        return [line for task in tasks for line in _one_task(task, named=len(tasks) > 1)]
    open_tasks = [task for task in tasks if task["state"] != "finished"]
    finished = len(tasks) - len(open_tasks)
    lines = [line for task in open_tasks[:MOST_TASKS] for line in _one_task(task, named=True)]
    return [f"{finished} of {len(tasks)} tasks finished", *lines, *(["..."] if len(open_tasks) > MOST_TASKS else [])]


def _one_task(task: Json, *, named: bool) -> list[str]:
    lines = [f"{'task ' + str(task['task']) if named else 'state'}: {task['state']}" + (f", job {task['job']}" if task["job"] else "")]
    if progress := task["progress"]:
        total = f" of {quantity(progress['total'])}" if progress["total"] else ""
        lines.append(f"  {progress['phase']}: {quantity(progress['step'])}{total} {progress['unit']}, {_when(progress['time'])}")
    starts = [line for line in task["attempts"] if line["event"] == "start"]
    ends = {(line["job"], line["restart"]): line for line in task["attempts"] if line["event"] == "end"}
    for start in starts:
        end = ends.get((start["job"], start["restart"]))
        how = f"{end['status']} after {duration(end['time'] - start['time'])}; {end['next']}" if end else "no end recorded"
        lines.append(f"  attempt      {_when(start['time'])} on {start['host']}, job {start['job']}: {how}")
    if result := task["result"]:
        if result["error"]:
            lines.append(f"  error        {result['error']}")
        lines += [f"  {name:<12} {value}" for name, value in (result["result"] or {}).items() if not isinstance(value, dict | list)]
    return lines


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _indented(text: str) -> list[str]:
    return ["  " + line for line in text.splitlines()]
