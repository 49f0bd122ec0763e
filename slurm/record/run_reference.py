"""What a person calls a run, or one task of it: the one place where such a name becomes a run directory.

    a run     its path; stage/name (its newest run); stage/name/id; an id or the id's end, of four letters at least; a job id (1042)
    a task    any of these with /tasks/3 behind it; the path of the task's directory; its job id (1042_3)

In a configuration `crosscoder: 1042_3` is such a name too (see `slurm.submission.run_fields`).
"""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.config.errors import UserError
from slurm.record.run_directory import RunDirectory, list_runs

TASK_OF_JOB = re.compile(r"([0-9]+)_([0-9]+)")
TASK_OF_RUN = re.compile(r"(.+)/tasks/([0-9]+)/*")


class Named(NamedTuple):
    """A run, or one task of a run that is divided into several."""

    run: RunDirectory
    task: int | None = None
    """None: the whole run."""

    @property
    def reference(self) -> str:
        """What every command accepts for it."""
        return self.run.reference if self.task is None else f"{self.run.reference}/tasks/{self.task}"

    @property
    def tasks(self) -> Sequence[int]:
        """The tasks that are meant."""
        return range(self.run.num_tasks) if self.task is None else [self.task]

    @property
    def record(self) -> RunDirectory:
        """The directory with the config.yaml, inputs.json and job.json that hold for it."""
        return self.run if self.task is None else self.run.record_of_task(self.task)

    def whole(self, what: str) -> RunDirectory:
        """The run. Raises `UserError` for one task of it, which `what` can't take."""
        if self.task is not None:
            raise UserError(f"{self.reference} is one task; {what} takes a whole run: name {self.run.reference}")
        return self.run


def find(reference: str, runs: Path) -> Named:
    """The run or the task that `reference` names, of those under the root `runs`.

    Raises `UserError` when there is none, or when several fit.
    """
    path = Path(os.path.abspath(Path(reference).expanduser()))
    if path.parent.name == "tasks" and path.name.isdecimal() and (path.parents[1] / "job.json").exists():
        return _task_of(_run_at(path.parents[1]), int(path.name))
    if (path / "job.json").exists():
        return Named(_run_at(path))
    if of_run := TASK_OF_RUN.fullmatch(reference):
        return _task_of(_by_name(of_run[1], runs), int(of_run[2]))
    if of_job := TASK_OF_JOB.fullmatch(reference):
        return _task_of_job(of_job[1], int(of_job[2]), runs)
    return Named(_by_name(reference, runs))


def has_job(run: RunDirectory, job_id: str) -> bool:
    """Whether the run was submitted as the job `job_id` (`1042`, or `1042_3` for one task of an array)."""
    array, underscore, position = job_id.partition("_")
    return array.isdigit() and any(
        str(entry["id"]) == array and (not underscore or (position.isdecimal() and int(position) < len(entry["tasks"])))
        for entry in run.job()["jobs"]
    )


def _run_at(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    run.check_record()
    return run


def _task_of(run: RunDirectory, task: int) -> Named:
    if task >= run.num_tasks:
        last = run.num_tasks - 1
        raise UserError(f"{run.reference} has {f'tasks 0 to {last}' if last else 'one task, 0'}, not {task}")
    return Named(run, task if _is_divided(run) else None)


def _is_divided(run: RunDirectory) -> bool:
    return run.num_tasks > 1 or run.stage == "sweep"


def _task_of_job(array: str, position: int, runs: Path) -> Named:
    """Position k of an array job works on the k-th of the tasks that it was submitted with."""
    found = [run for run in list_runs(runs) if has_job(run, array)]
    if not found:
        raise UserError(f"no run under {runs} was submitted as job {array}; `crosscoder jobs --all` lists all there are")
    run = _only(found, array)
    tasks = next(entry["tasks"] for entry in reversed(run.job()["jobs"]) if str(entry["id"]) == array)
    if position >= len(tasks):
        raise UserError(f"job {array}, of {run.reference}, has {len(tasks)} tasks, {array}_0 to {array}_{len(tasks) - 1}, not {position}")
    return Named(run, tasks[position] if _is_divided(run) else None)


def _by_name(reference: str, runs: Path) -> RunDirectory:
    path = Path(reference).expanduser()
    if (path / "job.json").exists():
        return _run_at(path)
    parts = [part for part in reference.strip("/").split("/") if part]
    found = [] if path.is_absolute() else list(_matching(parts, runs))
    if not found and path.absolute().is_relative_to(runs):
        parts = list(path.absolute().relative_to(runs).parts)
        found = list(_matching(parts, runs))
    if not found:
        known = sorted({"/".join(run.path.parts[-3:-1]) for run in list_runs(runs)})
        near = difflib.get_close_matches("/".join(parts[:2]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"runs there: {', '.join(known[:20]) or 'none'}"
        raise UserError(f"no run is called {reference!r} under {runs}; {hint}")
    if len(parts) == 1:
        return _only(found, reference)
    at_once = [run for run in found if run.id[:15] == found[-1].id[:15]]  # ids of one second are in no order
    return max(at_once, key=lambda run: run.submitted) if len(at_once) > 1 else found[-1]


def _only(found: Sequence[RunDirectory], reference: str) -> RunDirectory:
    if len(found) > 1:
        raise UserError(f"{reference!r} fits {len(found)} runs: {', '.join(run.reference for run in found[-5:])}; name one")
    return found[0]


def _matching(parts: list[str], runs: Path) -> Iterator[RunDirectory]:
    if any(re.search(r"[*?\[]", part) for part in parts) or not 1 <= len(parts) <= 3:
        return
    if len(parts) == 1:
        yield from (run for run in list_runs(runs) if _ends_so(run, parts[0]) or has_job(run, parts[0]))
        return
    yield from (run for run in list_runs(runs, parts[0], parts[1]) if len(parts) == 2 or _ends_so(run, parts[2]))


def _ends_so(run: RunDirectory, part: str) -> bool:
    """Whether `part` is the run's id or its end, of four letters at least: `7` is a job, not every run whose id ends so."""
    return len(part) >= 4 and run.id.endswith(part)
