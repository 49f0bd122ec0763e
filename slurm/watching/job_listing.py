"""Gathers what `crosscoder jobs` and `watch` show: one squeue, the run directories and their heartbeats."""

import fnmatch
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.client import slurm_commands, slurm_queries
from slurm.client.job_output import Job
from slurm.cluster.configuration import CLUSTER_NAME
from slurm.record import activity, backlog, holder, run_directory
from slurm.record.run_directory import AT_A_TERMINAL, RunDirectory, directory_in
from slurm.record.run_reference import TASK_OF_JOB, TASK_OF_RUN, has_job
from slurm.watching import jobs
from slurm.watching.jobs import Row, Task

REMEMBERED_DAYS = 3.0
"""Runs submitted longer ago are shown only while they are in the queue, or with --all."""


class Gathered(NamedTuple):
    """`jobs` is None where no Slurm answers."""

    jobs: list[Job] | None
    tasks: list[Task]
    remembered: list[Job]
    num_older: int = 0
    """Runs that were left out because they ended long ago."""

    def rows(self, now: float | None = None) -> list[Row]:
        """A row a task and a job, as they stand `now`."""
        return jobs.join(self.jobs, self.tasks, now=time.time() if now is None else now, remembered=self.remembered)


def gather(site: Site, *, wanted: Sequence[str] = (), everything: bool = False, ask_accounting: bool = True) -> Gathered:
    """One squeue, the run directories, and, for jobs that ended without a trace, sacct where the cluster has it.

    wanted : only what one of these names (see `is_wanted`); none: all.
    everything : old runs too. Runs that are asked for by name are never too old.
    """
    is_stopped = slurm_commands.stopped_private_cluster() is not None
    # With SLURM_CONF naming a cluster that is stopped, squeue would try for 9 s.
    queue = None if is_stopped and os.environ.get("SLURM_CONF") else slurm_queries.my_jobs_if_any()
    runs, num_older = _runs(site.runs, queue or [], wanted, everything or bool(wanted))
    is_served = bool(backlog.queued_jobs(site.runs, queue or []))
    tasks = [task for run in runs for task in _wanted_tasks(run, wanted, is_stopped=is_stopped, is_served=is_served)]
    if wanted and queue is not None:
        own = {task.job_id for task in tasks}
        queue = [job for job in queue if job.id in own or is_wanted(wanted, job=job.id, name=job.name)]
    lost = jobs.forgotten(queue, tasks) if ask_accounting and queue is not None else []
    remembered = slurm_queries.finished_jobs(lost) if lost and slurm_queries.has_accounting(slurm_queries.configuration()) else []
    return Gathered(queue, tasks, remembered, num_older)


def _runs(root: Path, queue: Iterable[Job], wanted: Sequence[str], everything: bool) -> tuple[list[RunDirectory], int]:
    """The runs to show, oldest first, and how many were left out as too old."""
    since = run_directory.new_id(time.time() - REMEMBERED_DAYS * 86400)
    known = set(run_directory.list_runs(root))
    queued = {RunDirectory(path) for job in queue if (path := directory_in(job.comment)) and (path / "job.json").exists()}
    runs = {run for run in known | queued if _is_wanted_run(run, wanted)}
    recent = {run for run in runs if everything or run.id >= since or run in queued}
    return sorted(recent, key=lambda run: run.submitted), len(runs) - len(recent)  # ids of one second are in no order


def _is_wanted_run(run: RunDirectory, wanted: Sequence[str]) -> bool:
    chosen = _chosen_tasks(run, wanted)
    return chosen is None or bool(chosen)


def _wanted_tasks(run: RunDirectory, wanted: Sequence[str], *, is_stopped: bool, is_served: bool) -> list[Task]:
    chosen = _chosen_tasks(run, wanted)
    return [task for task in read_tasks(run, is_stopped=is_stopped, is_served=is_served) if chosen is None or task.task in chosen]


def _chosen_tasks(run: RunDirectory, wanted: Sequence[str]) -> set[int] | None:
    """The tasks that the words name one by one; None where one of them names the whole run, or there are none."""
    stage, name, identity = run.path.parts[-3:]
    chosen = set[int]()
    for word in wanted:
        if (of_job := TASK_OF_JOB.fullmatch(word)) and has_job(run, word):
            entry = next(entry for entry in reversed(run.job()["jobs"]) if str(entry["id"]) == of_job[1])
            chosen |= set(entry["tasks"][int(of_job[2]) :][:1])
        elif (of_run := TASK_OF_RUN.fullmatch(word)) and is_wanted([of_run[1]], stage=stage, name=name, identity=identity):
            chosen.add(int(of_run[2]))
        elif is_wanted([word], stage=stage, name=name, identity=identity) or has_job(run, word):
            return None
    return chosen if wanted else None


def standing_of(run: RunDirectory) -> dict[int, tuple[str, str]]:
    """The state and reason of each task of `run`, as `crosscoder jobs` says them; empty where the queue gives no answer.

    A run that has finished is not asked for: its own record is the truth.
    """
    if run.state() == "finished":
        return {}
    is_stopped = slurm_commands.stopped_private_cluster() is not None
    try:
        queue = None if is_stopped or run.job()["executor"] != "slurm" else slurm_queries.my_jobs_if_any()
    except UserError:
        return {}
    is_served = bool(backlog.queued_jobs(backlog.root_of(run), queue or []))
    tasks = read_tasks(run, is_stopped=is_stopped, is_served=is_served)
    own = {task.job_id for task in tasks}
    rows = jobs.join(None if queue is None else [job for job in queue if job.id in own], tasks, now=time.time())
    return {row.task or 0: (row.state, row.reason) for row in rows}


def is_wanted(wanted: Sequence[str], *, stage: str = "", name: str = "", identity: str = "", job: str = "") -> bool:
    """Whether one of the words names it: a stage, a name, `stage/name`, `stage/name/id`, an id or its end, or a job id.

    `*` and `?` in a word stand for any letters and for one, as in a shell: `jobs 'sparsity-*'`.
    """
    forms = [form for form in (stage, name, f"{stage}/{name}", f"{stage}/{name}/{identity}", identity, job, job.partition("_")[0]) if form]
    ends = (identity[-4:], f"{stage}/{name}/{identity[-4:]}") if identity else ()
    return any(fnmatch.fnmatchcase(form, word.rstrip("/")) for word in wanted for form in (*forms, *ends))


def read_tasks(run: RunDirectory, *, is_stopped: bool = False, is_served: bool = False) -> list[Task]:
    """Every task of a run as its directory tells now. Reads job.json once, however many tasks there are.

    is_served : whether jobs are left that will queue what is not queued yet.
    is_stopped : whether the private cluster is (see `slurm_commands.stopped_private_cluster`).
    """
    job = run.job()
    num_tasks = int(job["num_tasks"])
    parents = {parent: set(parent.states()) if parent.path.exists() else set() for parent in map(RunDirectory, map(Path, job["after"]))}
    minutes = job["resources"].get("timeout_min")
    cancelled, cancelled_tasks = run.cancelled_jobs(), run.cancelled_tasks()
    not_queued = job.get("not_queued") or {"tasks": [], "why": None}
    shared = {
        "run": run.reference,
        "stage": job["stage"],
        "name": job["name"],
        "num_tasks": num_tasks,
        "executor": job["executor"],
        "waits_for": tuple(parent.reference for parent, states in parents.items() if states != {"finished"}),
        "failed_parents": tuple(parent.reference for parent, states in parents.items() if states & {"failed", "stopped", "cancelled"}),
        "limit_s": minutes * 60 if minutes else None,
        "is_served": is_served,
        "is_kept": is_stopped and job["executor"] == "slurm" and job["cluster"] == CLUSTER_NAME,
        "submitted": job.get("submitted"),
        "replaced_jobs": frozenset(str(entry["id"]) for entry in job["jobs"]),
    }
    local_ids = [str(entry["id"]) for entry in job["jobs"]] if job["executor"] == "local" else []
    started = {job_id for job_id in local_ids if activity.is_local_job(int(job_id))}
    is_behind = job["executor"] in AT_A_TERMINAL and _has_process(run)
    job_ids = {task: job_id for task, job_id in _job_ids(job).items() if task not in not_queued["tasks"]}
    return [
        _read_task(
            run.task_directory(task, num_tasks),
            task,
            job_ids.get(task),
            is_started=is_behind or job_ids.get(task) in started,
            was_cancelled=job_ids[task] in cancelled if task in job_ids else task in cancelled_tasks,
            not_queued=not_queued["why"] if task in not_queued["tasks"] else None,
            shared=shared,
        )
        for task in range(num_tasks)
    ]


def _has_process(run: RunDirectory) -> bool:
    """Of a run at a terminal: whether it, or one that its chain does before it, is being worked on, so that its turn comes."""
    parents = [parent for parent in map(RunDirectory, map(Path, run.job()["after"])) if parent.path.exists()]
    return "running" in run.states() or any(parent.job()["executor"] in AT_A_TERMINAL and _has_process(parent) for parent in parents)


def _job_ids(job: dict[str, Any]) -> dict[int, str]:
    """The id under which each task was last submitted."""
    return {
        task: f"{entry['id']}_{position}" if entry["array"] else str(entry["id"])
        for entry in job["jobs"]
        for position, task in enumerate(entry["tasks"])
    }


def _read_task(
    directory: Path, task: int, job_id: str | None, *, is_started: bool, was_cancelled: bool, not_queued: str | None, shared: dict[str, Any]
) -> Task:
    lock, result = directory / "lock.json", run_directory.read_result(directory / "result.json")
    attempts = run_directory.read_lines(directory / "attempts.jsonl") if result is None else []
    is_locked = lock.exists()
    otherwise = "cancelled" if was_cancelled else "new" if job_id is None else "queued"
    return Task(
        task=task,
        job_id=job_id,
        file_state="running" if is_locked else str(result["status"]) if result else otherwise,
        is_held=is_locked and holder.looks_held(lock),
        progress=run_directory.read_heartbeat(directory / "progress.json"),
        result=result,
        has_begun=bool(attempts) or result is not None,
        last_ending=run_directory.ending(attempts),
        not_queued=not_queued,
        is_started=is_started,
        was_cancelled=was_cancelled,
        **shared,
    )
