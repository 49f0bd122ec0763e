"""Whether somebody works on a run now, or will: asked of its lock, its process or the queue."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import IO

from pipeline import records
from pipeline.config.errors import UserError
from slurm.client import processes, slurm_commands
from slurm.client.job_output import FINAL_STATES
from slurm.cluster.configuration import CLUSTER_NAME
from slurm.record import holder
from slurm.record.run_directory import RunDirectory, directory_in, list_runs

SUBMISSION_LOCK = ".submission.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: ContextVar[frozenset[Path]] = ContextVar("_held", default=frozenset())
"""The roots whose submission lock this thread has: a second one on the same file would wait for the first for ever."""


@contextlib.contextmanager
def one_submission_at_a_time(runs: Path) -> Iterator[None]:
    """Waits until no other command submits under the root `runs`: between the look at what is busy and the new job's record.

    Who changes a run's job.json holds it too; who has it may take it again.
    On a file system without locks two commands at the very same moment may both submit; their jobs still don't work on one
    run at once (see `slurm.record.holder`).
    """
    root = runs.resolve()
    if root in _held.get():
        yield
        return
    runs.mkdir(parents=True, exist_ok=True)
    with _open_lock(runs / SUBMISSION_LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        before = _held.set(_held.get() | {root})
        try:
            yield
        finally:
            _held.reset(before)


def _open_lock(path: Path) -> IO[bytes]:
    """The lock's file; to read only where another user made it, who shares the root: a lock can be taken on it all the same."""
    try:
        return records.open_to_append(path)
    except PermissionError:
        return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def is_busy(run: RunDirectory, task: int) -> bool:
    """Whether a process holds the task, or its last job still waits or runs."""
    if holder.looks_held(run.task_directory(task) / "lock.json"):
        return True
    identity = run.job_of_task(task)
    if identity is None:
        return False
    executor_name = run.job()["executor"]
    if executor_name == "local":
        result = run.result(task)
        return result is None and is_local_job(int(identity.partition("_")[0]))
    return executor_name == "slurm" and _slurm_has(identity, run)


def is_local_job(pid: int) -> bool:
    """Whether the process is a controller of submitit's local executor: after a reboot the number may be anyone's."""
    return holder.process_started(pid) is not None and "submitit" in processes.command_line(pid)


def _slurm_has(job: str, run: RunDirectory) -> bool:
    """Whether Slurm still has the run's job: one of that number that names another run is another's, the number was given anew."""
    try:
        lines = slurm_commands.run("squeue", "-h", "-a", "-r", "-t", "all", "-j", job, "-o", "%T %k").splitlines()
    except slurm_commands.CommandFailed as error:
        if "Invalid job id" in error.stderr:
            return False
        raise
    found = [line.partition(" ") for line in lines]
    return any(state not in FINAL_STATES and directory_in(comment) in (None, run.path) for state, _, comment in found)


def waits_for_cluster(run: RunDirectory) -> bool:
    """Whether the run was submitted to the private cluster of this checkout, which is stopped now."""
    job = run.job()
    return job["executor"] == "slurm" and job["cluster"] == CLUSTER_NAME and slurm_commands.stopped_private_cluster() is not None


def writer_of(paths: Iterable[Path], runs: Path, stage: str) -> RunDirectory | None:
    """A queued or running run of `stage` that writes one of `paths`, or None."""
    wanted = {path.resolve() for path in paths}  # through links: two names of one directory are one output
    if not wanted:
        return None
    for run in reversed(list_runs(runs, stage)):
        open_tasks = [task for task in range(run.num_tasks) if run.task_state(task) in ("queued", "running")]
        if not open_tasks or not wanted & {path.resolve() for path in _outputs(run)}:
            continue
        if any(is_busy(run, task) for task in open_tasks):
            return run
    return None


def _outputs(run: RunDirectory) -> list[Path]:
    """What the run writes; nothing where its config.yaml was damaged since it was frozen: its job will refuse to start."""
    try:
        return list(run.config().outputs().values())
    except UserError:
        return []
