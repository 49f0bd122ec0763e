"""Gathers what `crosscoder jobs` and `watch` show, and puts it into a table."""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import records
from pipeline.config.site_file import Site
from pipeline.run import duration, quantity
from slurm.client import slurm_queries
from slurm.client.job_output import Job
from slurm.record import holder, run_directory
from slurm.record.run_directory import RunDirectory
from slurm.watching import jobs
from slurm.watching.jobs import Line, Row, Task

if TYPE_CHECKING:
    from rich.table import Table

REMEMBERED_DAYS = 3.0
"""Runs submitted longer ago are shown only while they are in the queue, or with --all."""


class Gathered(NamedTuple):
    """`jobs` is None where no Slurm answers."""

    jobs: list[Job] | None
    tasks: list[Task]
    remembered: list[Job]

    def rows(self, now: float | None = None) -> list[Row]:
        """A row a task and a job, as they stand `now`."""
        return jobs.join(self.jobs, self.tasks, now=time.time() if now is None else now, remembered=self.remembered)


def gather(site: Site, *, everything: bool = False, ask_accounting: bool = True) -> Gathered:
    """One squeue, the run directories, and, for jobs that ended without a trace, sacct where the cluster has it."""
    queue = slurm_queries.my_jobs_if_any()
    tasks = [task for run in _runs(site.runs.absolute(), queue or [], everything) for task in read_tasks(run)]
    lost = jobs.forgotten(queue, tasks) if ask_accounting and queue is not None else []
    remembered = slurm_queries.finished_jobs(lost) if lost and slurm_queries.has_accounting(slurm_queries.configuration()) else []
    return Gathered(queue, tasks, remembered)


def _runs(root: Path, queue: Iterable[Job], everything: bool) -> list[RunDirectory]:
    since = run_directory.new_id(time.time() - REMEMBERED_DAYS * 86400)
    known = {run for run in run_directory.list_runs(root) if everything or run.id >= since}
    queued = {RunDirectory(path) for job in queue if (path := directory_in(job.comment)) and (path / "job.json").exists()}
    return sorted(queued | known, key=lambda run: run.submitted)  # ids of one second, those of a chain, are in no order


def directory_in(comment: str) -> Path | None:
    """The run directory that a job's comment names; None for a comment of another kind."""
    try:
        value = json.loads(comment)["directory"]
    except (ValueError, KeyError, TypeError):
        return None
    return Path(value) if isinstance(value, str) else None


def read_tasks(run: RunDirectory) -> list[Task]:
    """Every task of a run as its directory tells now. Reads job.json once, however many tasks there are."""
    job = run.job()
    num_tasks = int(job["num_tasks"])
    parents = [RunDirectory(Path(path)) for path in job["after"]]
    minutes = job["resources"].get("timeout_min")
    cancelled = run.cancelled_jobs()
    shared = {
        "run": run.reference,
        "stage": job["stage"],
        "name": job["name"],
        "num_tasks": num_tasks,
        "executor": job["executor"],
        "waits_for": tuple(parent.reference for parent in parents),
        "failed_parents": tuple(p.reference for p in parents if p.path.exists() and {"failed", "stopped", "cancelled"} & set(p.states())),
        "limit_s": minutes * 60 if minutes else None,
    }
    job_ids = _job_ids(job)
    return [
        _read_task(
            run.task_directory(task, num_tasks), task, job_ids.get(task), was_cancelled=job_ids.get(task) in cancelled, shared=shared
        )
        for task in range(num_tasks)
    ]


def _job_ids(job: dict[str, Any]) -> dict[int, str]:
    """The id under which each task was last submitted."""
    return {
        task: f"{entry['id']}_{position}" if entry["array"] else str(entry["id"])
        for entry in job["jobs"]
        for position, task in enumerate(entry["tasks"])
    }


def _read_task(directory: Path, task: int, job_id: str | None, *, was_cancelled: bool, shared: dict[str, Any]) -> Task:
    lock, result = directory / "lock.json", _read(directory / "result.json")
    is_locked = lock.exists()
    otherwise = "new" if job_id is None else "cancelled" if was_cancelled else "queued"
    return Task(
        task=task,
        job_id=job_id,
        file_state="running" if is_locked else str(result["status"]) if result else otherwise,
        is_held=is_locked and holder.looks_held(lock),
        progress=_read(directory / "progress.json"),
        result=result,
        was_cancelled=was_cancelled,
        **shared,
    )


def _read(path: Path) -> dict[str, Any] | None:
    return dict(records.read_json(path)) if path.exists() else None


def summary(rows: Sequence[Row]) -> str:
    """`3 running, 12 waiting`, in the order of `jobs.STATES`."""
    counts = {state: sum(row.state == state for row in rows) for state in jobs.STATES}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no jobs"


COLORS = {"running": "green", "waiting": "cyan", "held": "yellow", "stopped": "yellow", "failed": "red", "cancelled": "red", "lost": "red"}


def table(rows: Sequence[Row], *, now: float | None = None, max_lines: int | None = None) -> "Table":
    """The rows, tasks of one run that read alike in one line. `max_lines` cuts the end and says so."""
    from rich.table import Table
    from rich.text import Text

    now = time.time() if now is None else now
    lines = jobs.fold(rows)
    cut = lines[:max_lines] if max_lines is not None else lines
    left_out = f"; {len(lines) - len(cut)} lines more" if len(cut) < len(lines) else ""
    shown = Table(title=summary(rows) + left_out, title_justify="left", box=None, pad_edge=False)
    rows_of_cells = [(line.job, run, state, *rest) for line in cut for state, run, *rest in [cells(line, now)]]
    names = ("JOB", "RUN", "STATE", "NODE", "TIME", "PROGRESS", "RATE", "ENDS", "WHY")
    # A column that says nothing gives its room to the others; a line is never broken, `show` and --json have the whole of it.
    kept = [i for i, name in enumerate(names) if i < 3 or any(texts[i] for texts in rows_of_cells)]
    for i in kept:
        shown.add_column(names[i], overflow="ellipsis", no_wrap=True, min_width={"JOB": 9, "STATE": 9, "TIME": 7}.get(names[i]))
    for texts in rows_of_cells:
        state = Text(texts[2], style=COLORS.get(texts[2].split()[0], ""))
        shown.add_row(*(state if i == 2 else texts[i] for i in kept))
    return shown


def cells(line: Line, now: float) -> list[str]:
    """The texts of a line, state first: state, run, node, time, progress, rate, end, why."""
    row, count = line.rows[0], len(line.rows)
    state = row.state if count == 1 else f"{row.state} x{count}"
    run = f"{row.run}" if row.run else f"({row.name})"
    if row.task is not None and count == 1:
        run += f" {row.task}/{row.num_tasks}"
    nodes = ",".join(dict.fromkeys(r.node for r in line.rows if r.node))
    why = row.warning or row.reason
    return [state, run, nodes, _time(row, count), _progress(row, count), _rate(row), _end(row, now), why]


def _time(row: Row, count: int) -> str:
    if row.state == "finished" and row.elapsed_s is not None and count == 1:
        return clock(row.elapsed_s)
    limit = clock(row.limit_s) if row.limit_s is not None else "no limit"
    elapsed = clock(row.elapsed_s) if row.elapsed_s is not None and count == 1 else "-"
    return f"{elapsed} / {limit}"


def _progress(row: Row, count: int) -> str:
    if count > 1 or row.step is None:
        return ""
    share = f"{row.percent:.0f} % " if row.percent is not None else ""
    of = f"/{quantity(row.total)}" if row.total else ""
    return f"{share}{row.phase} {quantity(row.step)}{of} {row.unit}"


def _rate(row: Row) -> str:
    return f"{quantity(row.rate)}/s" if row.rate else ""


def _end(row: Row, now: float) -> str:
    if row.ends is not None:
        return f"{_clock_time(row.ends, now)} ({duration(max(0.0, row.ends - now))})"
    if row.starts is not None and row.starts > now:
        return f"starts {_clock_time(row.starts, now)}"
    return ""


def _clock_time(moment: float, now: float) -> str:
    """`14:05`, with the day where it is another than today's."""
    then = time.localtime(moment)
    return time.strftime("%H:%M" if then[:3] == time.localtime(now)[:3] else "%a %d %b %H:%M", then)


def clock(seconds: float) -> str:
    """`1:02:03`, from a day on `2-01:02:03`, as squeue writes them."""
    whole = int(seconds)
    days, rest = divmod(whole, 86400)
    return (f"{days}-" if days else "") + f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
