"""Hold, release and cancel: jobs by id, tasks of an array, whole runs, or all that is mine."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.client import job_output, processes, slurm_commands, slurm_queries, slurm_values
from slurm.execution import waves
from slurm.record import backlog, environment, run_directory
from slurm.record.activity import is_local_job, one_submission_at_a_time
from slurm.record.run_directory import RunDirectory
from slurm.record.run_reference import Named, find, has_job


class Target(NamedTuple):
    """What one reference names: Slurm jobs (ids as squeue shows them) or processes of the local executor, and their run."""

    ids: list[str]
    run: RunDirectory | None = None
    is_local: bool = False
    is_whole: bool = False
    """Whether all of the run is meant, what of it is not queued yet too."""


def find_targets(references: Sequence[str], site: Site, queue: Sequence[job_output.Job]) -> list[Target]:
    """What the references name: a job (`1042`), tasks (`1042_3`, `1042_[1-3]`), or a run or task in any form that `find` takes.

    Only what has not ended counts. Raises `UserError` for a reference that names nothing of that kind.
    """
    return [_target(reference, site.runs, queue) for reference in references]


def all_targets(site: Site, queue: Sequence[job_output.Job]) -> list[Target]:
    """Every job of mine that has not ended, each with its run where it has one, and the runs of which no job is queued yet."""
    active = [job for job in queue if not job.is_final]
    arrays = list(dict.fromkeys(job.array_id or job.id for job in active))
    targets = [_target(array, site.runs, queue)._replace(is_whole=True) for array in arrays]
    left = [run for run in backlog.read(site.runs).runs if run_directory.has_record(run)]
    return targets + [Target([], run, is_whole=True) for run in left if run not in {target.run for target in targets}]


def _target(reference: str, runs: Path, queue: Sequence[job_output.Job]) -> Target:
    active = [job for job in queue if not job.is_final]
    array, underscore, tasks = reference.partition("_")
    if array.isdigit() and (not underscore or tasks):
        wanted = set(slurm_values.parse_ranges(tasks)) if underscore else None
        ids = [job.id for job in active if _is_part(job, array, wanted)]
        if ids:
            run = _run_of(array, runs)
            others = run is not None and any(job.id not in ids for job in active if run_directory.directory_in(job.comment) == run.path)
            return Target(ids, run, is_whole=not underscore and not others)
    try:
        named = find(reference, runs)
    except UserError as error:
        if array.isdigit():
            raise UserError(f"no job {reference} of yours is waiting or running; `crosscoder jobs --all` lists what there was") from None
        raise error
    run = named.run
    if run.job()["executor"] == "local":
        return _local_target(named)
    mine = {task_id for task in named.tasks if (task_id := run.job_of_task(task))}
    # Slurm gives numbers anew when it has lost its state: a job that names another run is that run's.
    ids = [job.id for job in active if job.id in mine and run_directory.directory_in(job.comment) in (None, run.path)]
    if not ids and named.task in backlog.tasks_of(run):
        raise UserError(f"{named.reference} is not queued yet; what is not queued yet of a run is told together: name {run.reference}")
    if not ids and not backlog.tasks_of(run):
        state = run.state() if named.task is None else run.task_state(named.task)
        raise UserError(f"{named.reference} has no job that is waiting or running; it is {state}")
    return Target(ids, run, is_whole=named.task is None)


def _is_part(job: job_output.Job, array: str, tasks: set[int] | None) -> bool:
    own, _, task = job.id.partition("_")
    return own == array and (tasks is None or (task.isdigit() and int(task) in tasks))


def _run_of(job_id: str, runs: Path) -> RunDirectory | None:
    return next((run for run in reversed(run_directory.list_runs(runs)) if has_job(run, job_id)), None)


def _local_target(named: Named) -> Target:
    if named.task is not None:
        raise UserError(f"{named.reference} is one task, and one process works on all of them: name {named.run.reference}")
    run = named.run
    ids = [str(entry["id"]) for entry in run.job()["jobs"] if is_local_job(int(entry["id"]))]
    if not ids:
        raise UserError(f"no process works on {run.reference}; it is {run.state()}")
    return Target(ids, run, is_local=True)


def slurm_names(ids: Sequence[str]) -> list[str]:
    """Ids for one command of Slurm, the tasks of an array together: `1042_[1-3,7]`."""
    arrays: dict[str, list[int]] = {}
    for job_id in ids:
        array, underscore, task = job_id.partition("_")
        arrays.setdefault(array, []).extend([int(task)] if underscore else [])
    return [f"{array}_[{slurm_values.ranges(tasks)}]" if tasks else array for array, tasks in arrays.items()]


# -- doing it ---------------------------------------------------------------------------------------------------------


def hold(target: Target) -> str:
    """Keeps what waits from starting, and says so. Raises `UserError` where nothing waits."""
    names = slurm_names(_waiting(target, "held"))
    for name in names:
        slurm_commands.run("scontrol", "uhold", name)  # not `hold`: an administrator's hold only an administrator can release
    _note(target, {"held": names})
    return f"{', '.join(names)} held; `crosscoder release {names[0]}` frees it"


def release(target: Target) -> str:
    """Frees what is held, and says so. Raises `UserError` where nothing waits."""
    names = slurm_names(_waiting(target, "released"))
    for name in names:
        slurm_commands.run("scontrol", "release", name)
    _note(target, {"released": names})
    return f"{', '.join(names)} released"


def cancel(targets: Sequence[Target]) -> Iterator[str]:
    """Ends what runs, after it has had its time to save, and takes what waits out of the queue; says so, target by target.

    Of a run that is meant as a whole, what is not queued yet is given up; of another it is queued later as if nothing had happened.
    """
    for run in dict.fromkeys(target.run for target in targets if target.run is not None and target.is_whole):
        with one_submission_at_a_time(backlog.root_of(run)):
            if backlog.tasks_of(run):
                yield waves.give_up(run, "crosscoder cancel")
    for target in targets:
        if target.ids:
            yield _cancel_one(target)
    for root in dict.fromkeys(backlog.root_of(target.run) for target in targets if target.run is not None and not target.is_local):
        with one_submission_at_a_time(root):
            yield from waves.queue_what_fits(root)  # jobs that never started don't look at the backlog when they end


def _cancel_one(target: Target) -> str:
    if target.is_local:
        for controller in target.ids:
            processes.signal_all(_children(int(controller)), signal.SIGTERM)
        _note(target, {"cancelled": target.ids})
        return f"process {', '.join(target.ids)} told to save and stop"
    names = slurm_names(target.ids)
    with one_submission_at_a_time(backlog.root_of(target.run)) if target.run else contextlib.nullcontext():
        slurm_commands.run("scancel", *names)
        _note(target, {"cancelled": target.ids})  # before the jobs' own look at who cancelled them, which takes the lock too
    return f"{', '.join(names)} cancelled"


def _waiting(target: Target, done: str) -> list[str]:
    if target.is_local:
        raise UserError(f"{', '.join(target.ids)} is a process of the local executor, which can't be {done}; only jobs of Slurm can")
    queue = {job.id: job for job in slurm_queries.my_jobs()}
    waiting = [job_id for job_id in target.ids if job_id in queue and queue[job_id].state in ("PENDING", "REQUEUED", "REQUEUE_HOLD")]
    if not waiting:
        states = ", ".join(dict.fromkeys(queue[i].state.lower() for i in target.ids if i in queue)) or "gone"
        raise UserError(f"{', '.join(slurm_names(target.ids))} can't be {done}: it is {states}, and only what waits can be")
    return waiting


def _note(target: Target, what: dict[str, list[str]]) -> None:
    if target.run is not None:
        note_change(target.run, what, how="scancel" if "cancelled" in what else "scontrol")


def note_change(run: RunDirectory, what: dict[str, object] | dict[str, list[str]], *, how: str) -> None:
    """Adds to the changes in the run's job.json: what, when, by whom, and by which way."""
    with one_submission_at_a_time(backlog.root_of(run)):
        job = run.job()
        job["changes"].append({"time": time.time(), "by": f"{environment.user_name()}@{os.uname().nodename}", "what": what, "how": how})
        run.write_job(job)


def _children(pid: int) -> list[int]:
    """The processes that `pid` started and that live."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] not in ("Z", "X"):
            found.append(int(entry))
    return found
