"""A run directory: the complete record of one run (see `slurm.record.run_reference` for the names that it is found by).

    runs/train/demo/20261123-091530-k3f9/
      config.yaml        the resolved configuration; what the job reads
      code/              the code that the job runs; code.json and code.diff say what it is (see `slurm.record.snapshot`)
      environment.json   interpreter, packages, torch, CUDA, driver, host (see `slurm.record.environment`)
      inputs.json        {"tokens": {"path": "/data/tokens/demo/train", "data_id": "9f2c..."}}; (see `slurm.record.run_inputs`)
      job.json           who submitted it, where to, under which job ids (below)
      setup.json         ["module load cuda"]: the site's shell lines that a job begins with; for the owner alone, as they may hold a secret
      bound/             for a run that is divided into an array: inputs that the first task to read them bound, one file a field
      tasks/<i>/         for such a run: the files below, once a task
      log/<job id>.log   what the task printed; submitit/ holds the files that submitit needs, for the owner alone as well
      attempts.jsonl     one line when a process takes up the task, one when it leaves it
      lock.json          the process that holds the task now (see `slurm.record.holder`)
      progress.json      heartbeat, metrics.jsonl, tensorboard/, checkpoints/: written by the stage
      result.json        how the task ended (below); seal.json: what a finished one left, by hash (see `slurm.record.seal`)

A run of one task has no `tasks/`: its task directory is the run directory itself. A sweep's tasks have a config.yaml,
inputs.json and job.json of their own (see `slurm.submission.sweep`).

job.json, written when the run is frozen and when something about its submission changes:

    {"format": "job/1", "id": "20261123-091530-k3f9", "stage": "train", "name": "demo",
     "executor": "slurm",                      run, debug, local or slurm; `run` is `crosscoder run`
     "cluster": "dev",                         Slurm's ClusterName, the host for other executors
     "submitted": 1795424130.5, "submitted_by": "ana@login1", "submitted_from": "/home/ana/crosscoder",
     "command": ["crosscoder", "submit", "configs/demo/train.yaml"],
     "resources": {"gpus": 1, "timeout_min": 60, ...},        as in config.yaml
     "config_hash": "77d0...", "code_hash": "5b1e...",        of config.yaml and code/
     "num_tasks": 4,
     "after": ["/runs/cache/demo/20261123-091529-x2aa"],      runs that must finish first
     "jobs": [{"id": "1042", "tasks": [0, 1, 2, 3], "array": true, "submitted": 1795424130.9, "sbatch": "#!/bin/bash\n..."}],
     "changes": [{"time": 1795424200.0, "by": "ana@login1", "what": {"partition": ["main", "low"]}, "how": "scontrol"}]}

`jobs` has one entry a submission, oldest first. Position k of an array job (`1042_k`) works on task `tasks[k]`; a plain
job (`"array": false`, id `1042`) has one task. Ids of the local executor are process ids. A task that was submitted
again is in several entries; the last one holds. Slurm gives ids out anew when its database is lost, so a job is known by
`cluster` and id and, better, by the run directory that its comment names. Two keys are there only at times: `not_queued`, the
tasks that the queue has no room for yet (see `slurm.record.backlog`), and `submitting`, the tasks of an sbatch under way.

attempts.jsonl: {"event": "start", "time": 1795424131.2, "job": "1042_0", "restart": 0, "host": "n1", "pid": 4711, "driver": ...} and
{"event": "end", "time": ..., "job": "1042_0", "restart": 0, "status": "stopped", "reason": "SIGTERM", "next": "requeued"}.

result.json, written when an attempt ends by itself: {"status": "finished", "started": ..., "ended": ..., "job": "1042_0",
"error": null, "result": {...}}. `status` is finished, failed (`error` says why) or stopped; `result` is what the stage
returned. One that was stopped has `next` too, what becomes of it; one that finished has `seal`, the format of seal.json. A task that is
killed leaves none: its lock, or the queue, tells.
"""

import json
import os
import re
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config import load, yaml_file
from pipeline.config.errors import UserError
from pipeline.config.schema import build
from pipeline.config.stage import StageConfig
from slurm.record import holder
from slurm.record.printable import print

Json = dict[str, Any]

STATES = ("new", "queued", "running", "stopped", "cancelled", "failed", "finished")
"""new: frozen, not queued. queued: submitted, no process has it now. running: a process holds it. stopped: it was asked to, or
its process was killed. cancelled: taken by `crosscoder cancel` out of the queue, or of what waits for room in it, before it began."""

AT_A_TERMINAL = ("run", "debug")
"""Executors whose runs are worked on in the process of who started them; no queue has them."""

SETUP = "setup.json"

_ALWAYS_RECORDED = ("stage", "name", "executor", "submitted", "num_tasks", "after", "jobs")

_ID = re.compile(r"\d{8}-\d{6}-[0-9a-z]{4}")
_ID_LETTERS = "0123456789abcdefghijkmnpqrstvwxyz"


class RunDirectory:
    """The files of one run, as they are whenever one is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._known_job: tuple[tuple[int, int], Json] | None = None

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def reference(self) -> str:
        """`stage/name/id`, of a task's own directory `stage/name/id/tasks/3`: short, unique, and what every command accepts."""
        return "/".join(self.path.parts[-5 if self.path.parent.name == "tasks" else -3 :])

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunDirectory) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    # -- the frozen record ------------------------------------------------------------------------------------------

    @property
    def code(self) -> Path:
        return self.path / "code"

    def config_values(self) -> Json:
        """The resolved configuration as plain values."""
        return yaml_file.read(self.path / "config.yaml")

    def config(self) -> StageConfig:
        """The frozen configuration, typed. It is resolved already: the site's settings play no part."""
        values = self.config_values()
        return build(load.config_class(values["stage"]), values, str(self.path / "config.yaml"))

    def job(self) -> Json:
        return _read_object(self.path / "job.json")

    def check_record(self) -> None:
        """Raises `UserError` where job.json can't be read, or lacks what every listing needs."""
        if missing := [key for key in _ALWAYS_RECORDED if key not in self._job()]:
            raise UserError(f"{self.path / 'job.json'} lacks {', '.join(missing)}: the file is damaged")

    def _job(self) -> Json:
        """job.json to read from only; parsed again when it was replaced: the thousand tasks of an array ask for it often."""
        path = self.path / "job.json"
        stat = path.stat() if path.exists() else None
        version = (stat.st_ino, stat.st_mtime_ns) if stat else (0, 0)
        if self._known_job is None or self._known_job[0] != version:
            self._known_job = (version, self.job())
        return self._known_job[1]

    def write_job(self, job: Json) -> None:
        records.write_json(self.path / "job.json", job)

    def setup(self) -> list[str]:
        """The site's shell lines that a job of this run begins with."""
        job = self._job()
        return list(job["setup"]) if "setup" in job else list(records.read_json(self.path / SETUP))  # the former: of an earlier version

    def inputs(self) -> Json:
        """inputs.json, with what the first task of a divided run bound."""
        bound = {path.stem: _read_object(path) for path in sorted((self.path / "bound").glob("[!.]*.json"))}
        return (_read_or_none(self.path / "inputs.json") or {}) | bound

    @property
    def stage(self) -> str:
        return str(self._job()["stage"])

    def record_of_task(self, task: int) -> "RunDirectory":
        """The directory with the task's config.yaml, inputs.json and job.json: of a sweep its own, else the run's."""
        return RunDirectory(self.task_directory(task)) if self.stage == "sweep" else self

    @property
    def submitted(self) -> float:
        """When it was frozen for its first submission."""
        return float(self._job()["submitted"])

    @property
    def num_tasks(self) -> int:
        return int(self._job()["num_tasks"])

    # -- tasks ------------------------------------------------------------------------------------------------------

    def task_directory(self, task: int, num_tasks: int | None = None) -> Path:
        """Where task `task` keeps its progress, log, checkpoints and result."""
        alone = (num_tasks or self.num_tasks) == 1 and not (self.path / "tasks").exists()
        return self.path if alone else self.path / "tasks" / str(task)

    def progress(self, task: int = 0) -> Json | None:
        """The last heartbeat (see `pipeline.run.Run.report`), or None before the first."""
        return read_heartbeat(self.task_directory(task) / "progress.json")

    def result(self, task: int = 0) -> Json | None:
        """How the task ended, or None while it hasn't."""
        return read_result(self.task_directory(task) / "result.json")

    def attempts(self, task: int = 0) -> list[Json]:
        """The lines of attempts.jsonl, oldest first; a half-written last line is left out."""
        return read_lines(self.task_directory(task) / "attempts.jsonl")

    def last_ending(self, task: int = 0) -> str | None:
        """The status that the last attempt wrote down as it ended; None where it goes on, was killed, or there was none."""
        return ending(self.attempts(task))

    def job_of_task(self, task: int) -> str | None:
        """The id under which the task was last submitted (`1042` or `1042_3`), or None if it never was."""
        for entry in reversed(self._job()["jobs"]):
            if task in entry["tasks"]:
                return f"{entry['id']}_{entry['tasks'].index(task)}" if entry["array"] else str(entry["id"])
        return None

    def task_state(self, task: int = 0) -> str:
        """One of `STATES`, from the files alone: a job that Slurm dropped before it began still reads as queued."""
        directory = self.task_directory(task)
        if (directory / "lock.json").exists():
            return "running" if holder.looks_held(directory / "lock.json") else "stopped"
        result = self.result(task)
        if result is not None:
            return str(result["status"])
        job_id = self.job_of_task(task)
        if task in (self._job().get("not_queued") or {}).get("tasks", ()):
            return "new"
        if job_id is not None:
            return "cancelled" if job_id in self.cancelled_jobs() else "queued"
        if task in self.cancelled_tasks():
            return "cancelled"
        return "stopped" if (directory / "attempts.jsonl").exists() else "new"

    def cancelled_jobs(self) -> set[str]:
        """The ids of jobs that `crosscoder cancel` took out of the queue."""
        return self._changed("cancelled")

    def cancelled_tasks(self) -> set[int]:
        """The tasks that were given up before the queue had room for them."""
        return self._changed("cancelled_tasks")

    def _changed(self, key: str) -> set[Any]:
        return {value for change in self._job().get("changes", ()) for value in change["what"].get(key, [])}

    def states(self) -> dict[str, int]:
        """How many tasks are in each state; states without any are left out."""
        counts = dict.fromkeys(STATES, 0)
        for task in range(self.num_tasks):
            counts[self.task_state(task)] += 1
        return {state: count for state, count in counts.items() if count}

    def state(self) -> str:
        """The run's state: running if any task is, else failed, stopped, cancelled, queued or new if any is, else finished."""
        states = self.states()
        return next(s for s in ("running", "failed", "stopped", "cancelled", "queued", "new", "finished") if s in states)

    def log_files(self, task: int = 0) -> list[Path]:
        """The task's logs, oldest attempt first."""
        return sorted((self.task_directory(task) / "log").glob("*.log"), key=lambda path: path.stat().st_mtime)

    def start_files(self) -> list[Path]:
        """What jobs printed before they reached the run's own code: where to look when a job left no log."""
        return sorted(path for ending in ("out", "err") for path in (self.path / "submitit").glob(f"*_log.{ending}"))


def read_lines(path: Path) -> list[Json]:
    """The JSON values of a file that processes append lines to; lines that a kill cut short are left out."""
    if not path.exists():
        return []
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        values += [value] if isinstance(value, dict) else []
    return values


def ending(attempts: list[Json]) -> str | None:
    """The status in the last line of attempts.jsonl, if it tells of an end.

    That line comes after result.json: where it says finished and there is no result, the result was lost or deleted since.
    """
    return attempts[-1].get("status") if attempts and attempts[-1].get("event") == "end" else None


def append_line(path: Path, value: Json) -> None:
    """Appends one JSON line in one write, so that two processes never mix theirs; on a line of its own after one cut short."""
    with records.open_to_append(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write((("\n" if torn else "") + json.dumps(value) + "\n").encode())


def _read_object(path: Path) -> Json:
    value = records.read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object: the file is damaged")
    return value


def _read_or_none(path: Path) -> Json | None:
    return _read_object(path) if path.exists() else None


def read_heartbeat(path: Path) -> Json | None:
    """What progress.json tells; None where it is missing or damaged: the next heartbeat replaces it."""
    try:
        return _read_or_none(path)
    except UserError:
        return None


def read_result(path: Path) -> Json | None:
    """What result.json tells; of a damaged one, that the task failed for that reason: taken up again, it ends anew."""
    try:
        result = _read_or_none(path)
        if result is not None and not isinstance(result.get("status"), str):
            raise UserError(f"{path} has no status: the file is damaged")
    except UserError as error:
        return {"status": "failed", "error": str(error), "result": None}
    return result


# -- creating, listing ------------------------------------------------------------------------------------------------


def new_id(now: float | None = None) -> str:
    """An id that sorts by time: `20261123-091530-k3f9`."""
    letters = "".join(secrets.choice(_ID_LETTERS) for _ in range(4))
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(now)) + "-" + letters


def create(runs: Path, stage: str, name: str) -> RunDirectory:
    """A new, empty run directory under the root `runs`."""
    while True:
        path = runs / stage / name / new_id()
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return RunDirectory(path)


def list_runs(runs: Path, stage: str = "*", name: str = "*") -> list[RunDirectory]:
    """Every run under the root `runs`, oldest first. One whose job.json is damaged is left out, which stderr hears of, once."""
    paths = [path.parent for path in runs.glob(f"{stage}/{name}/*/job.json") if _ID.fullmatch(path.parent.name)]
    found = [RunDirectory(path) for path in sorted(paths, key=lambda path: (path.name, path))]
    return [run for run in found if has_record(run)]


_named_as_damaged: set[Path] = set()


def has_record(run: RunDirectory) -> bool:
    """Whether job.json can be read; where it can't, stderr hears of it, once."""
    try:
        run.check_record()
    except UserError as error:
        if run.path not in _named_as_damaged:
            print(f"crosscoder: left out: {error}", file=sys.stderr)
        _named_as_damaged.add(run.path)
        return False
    return True


def directory_in(comment: str) -> Path | None:
    """The run directory that a job's comment names; None for a comment of another kind."""
    try:
        value = json.loads(comment)["directory"]
    except (ValueError, KeyError, TypeError):
        return None
    return Path(value) if isinstance(value, str) else None


def newest_finished(runs: Path, stage: str, name: str) -> RunDirectory | None:
    """The newest run of that name whose every task finished, or None."""
    return next((run for run in reversed(list_runs(runs, stage, name)) if run.state() == "finished"), None)
