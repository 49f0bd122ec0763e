"""Hands a frozen run to what will run it: this process, a process through submitit, or Slurm through submitit.

The executor's own folder, `submitit/` in the run directory, holds what submitit needs; nothing in it is read back. The
truth about a run is in its run directory.
"""

import os
import re
import subprocess
import time
from collections.abc import Sequence

from pipeline.config.errors import UserError
from pipeline.config.resources import Resources
from pipeline.config.schema import build
from slurm.client import slurm_commands, slurm_queries, submit_limits
from slurm.execution.dependencies import not_wholly_queued
from slurm.execution.frozen_code import check_startable, frozen_variables
from slurm.execution.frozen_task import FrozenTask
from slurm.execution.slurm_job import SUBMITIT_FOLDER, make_submitit_folder, max_array_size, recorded_text, slurm_executor
from slurm.execution.submission_environment import clean_environment, detached, time_limit, variables_after
from slurm.record import backlog
from slurm.record.run_directory import Json, RunDirectory, directory_in

LOCAL_TIMEOUT_MIN = 60.0 * 24 * 365
"""submitit's local controller counts from the submission, waiting included; `LocalQueue` keeps the time limit itself."""


def launch(run: RunDirectory, tasks: Sequence[int], *, may_wait: bool = True) -> list[Json]:
    """Submits `tasks` of a frozen run to its executor and records the jobs; gives the entries added to job.json.

    A run that waits for others (`after`) is told to. What Slurm has no room for joins the backlog, from where the jobs that end
    queue it (see `slurm.execution.waves`); without `may_wait` it is an error. The caller holds `one_submission_at_a_time`.
    Raises `UserError` with what the queue said when it refuses.
    """
    job = run.job()
    if job["executor"] not in ("local", "slurm"):
        raise UserError(f"{run.reference} is of executor {job['executor']}, which has no queue")
    check_startable(run)
    return _launch_local(run, list(tasks), job) if job["executor"] == "local" else _launch_slurm(run, list(tasks), may_wait=may_wait)


def _record(run: RunDirectory, entry: Json) -> Json:
    job = run.job()
    job.pop("submitting", None)
    job["jobs"].append(entry)
    run.write_job(job)
    return entry


# -- local --------------------------------------------------------------------------------------------------------


def _launch_local(run: RunDirectory, tasks: list[int], job: Json) -> list[Json]:
    """One process of submitit's local executor, which works on as many tasks at a time as the cores allow (see `share_of`).

    submitit would start all tasks of an array at once.
    """
    import submitit

    from slurm.execution.local_queue import THREADS, LocalQueue, share_of

    resources = build(Resources, job["resources"], f"{run.path / 'job.json'}: resources")
    if resources.nodes > 1:
        raise UserError(f"resources.nodes is {resources.nodes}, but the local executor has this machine alone; use 1, or --executor slurm")
    parents = [str(parent) for parent in job["after"]]
    share = share_of(resources, len(tasks), len(os.sched_getaffinity(0)))
    work = LocalQueue(str(run.path), tasks, share.num_parallel, parents, 60.0 * resources.timeout_min)
    variables = variables_after(run.setup()) | frozen_variables(run)
    if len(tasks) > 1 and THREADS not in os.environ | variables:
        variables[THREADS] = str(share.num_threads)
    make_submitit_folder(run)
    with clean_environment(variables), detached(run.path / SUBMITIT_FOLDER / "controller_log.out"):
        executor = submitit.LocalExecutor(folder=run.path / SUBMITIT_FOLDER)
        executor.update_parameters(
            timeout_min=LOCAL_TIMEOUT_MIN,
            gpus_per_node=resources.gpus,
            tasks_per_node=resources.tasks_per_node,
            stderr_to_stdout=True,
        )
        submitted = executor.submit(work)
    entry = {"id": str(submitted.job_id), "tasks": tasks, "array": False, "submitted": time.time(), "sbatch": None}
    return [_record(run, entry)]


# -- Slurm --------------------------------------------------------------------------------------------------------


class NoRoom(Exception):
    """sbatch refused because too many jobs of mine would be queued; `word` is Slurm's for the limit."""

    def __init__(self, word: str, refusal: str) -> None:
        super().__init__(word)
        self.word = word
        self.refusal = refusal


def _launch_slurm(run: RunDirectory, tasks: list[int], *, may_wait: bool) -> list[Json]:
    """One `sbatch` for all tasks; several where MaxArraySize, or the room that a submit limit leaves, is lower than their number."""
    _cancel_unrecorded(run)
    waiting = backlog.tasks_of(run)
    others = [task for task in waiting if task not in tasks]
    left, entries = list(tasks), list[Json]()
    size = min(len(left), max_array_size()) if len(left) > 1 else 1
    room, why = _room_of(run)
    try:
        while left and (room is None or room > 0):
            chunk = left[: size if room is None else min(size, room)]
            try:
                entries.append(_record(run, _sbatch(run, chunk, left)))
            except NoRoom as full:
                if not may_wait or (len(chunk) == 1 and not backlog.queued_jobs(backlog.root_of(run))):  # nothing would queue it later
                    raise UserError(full.refusal) from full
                expected, why = _room_under_limit(run, full.word)
                room = 0 if len(chunk) == 1 else expected
                size = len(chunk) // 2 if room is None or room >= len(chunk) else size
                continue
            left = left[len(chunk) :]
            room = None if room is None else room - len(chunk)
    except UserError as error:
        if waiting:  # of what stands in the backlog only what was queued goes out of it
            backlog.set_tasks(run, [task for task in waiting if task in [*left, *others]], str(error))
        raise
    backlog.set_tasks(run, [*left, *others], why)
    return entries


def _room_of(run: RunDirectory) -> tuple[int | None, str]:
    """How many tasks may be queued whatever Slurm's limits are, None for any number, and why no more."""
    job = run.job()
    if parent := not_wholly_queued(job):
        return 0, f"{parent.reference}, which it waits for, is not wholly queued yet"
    most = job["resources"]["max_parallel"]
    if most is None or not backlog.tasks_of(run):
        return None, ""
    # An array's throttle holds for it alone: of a run in several arrays no more is queued than may run at once.
    num_open = sum(run.task_state(task) in ("queued", "running") for task in range(run.num_tasks))
    return max(0, most - num_open), f"at most {most} of its tasks run at once"


def _room_under_limit(run: RunDirectory, word: str) -> tuple[int | None, str]:
    """How many jobs the limit that Slurm calls `word` still lets in, at least 1, None where it isn't known; and the limit in words.

    Raises `UserError` where a job that ends can never queue another, since it counts itself.
    """
    resources = run.job()["resources"]
    limits = submit_limits.of_me(resources["account"], resources["qos"])
    if not limits:
        return None, submit_limits.why(word, limits)
    if min(limits).num_jobs < 2:
        raise UserError(
            f"{submit_limits.why(word, limits)}: a task that ends, and still counts, can't queue the next; use --executor local"
        )
    queued = sum(not job.is_final for job in slurm_queries.my_jobs())
    return max(1, min(limits).num_jobs - queued), submit_limits.why(word, limits)


def _sbatch(run: RunDirectory, tasks: list[int], left: list[int]) -> Json:
    """Queues `tasks` as one job, or one array, and gives its entry for job.json. Raises `NoRoom`, or `UserError` for other refusals."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    job = run.job()
    run.write_job(job | {"submitting": tasks})
    with clean_environment({}):
        executor = slurm_executor(run, job)  # a new one each time: submitit can't unset a parameter
        try:
            with time_limit(slurm_commands.TIMEOUT_S):
                submitted = executor.submit_array([FrozenTask(str(run.path), task) for task in tasks])
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            refusal = _refusal(run, error, left)
            is_answered = isinstance(error.__cause__, subprocess.CalledProcessError)
            if is_answered and not slurm_commands.is_out_of_contact(UserError(refusal)):  # else it may have been queued all the same
                run.write_job(job)
            if word := submit_limits.word_of_refusal(str(error)):
                _remove_orphans(run)
                raise NoRoom(word, refusal) from error
            raise UserError(refusal) from error
    array_id = str(submitted[0].job_id).partition("_")[0]
    text = (run.path / SUBMITIT_FOLDER / f"{array_id}_submission.sh").read_text(encoding="utf-8")
    entry = {"id": array_id, "tasks": tasks, "array": len(tasks) > 1, "submitted": time.time()}
    return entry | {"sbatch": recorded_text(run, text)}


def _remove_orphans(run: RunDirectory) -> None:
    """The pickles, one a task, that submitit leaves of a submission that was refused."""
    for path in (run.path / SUBMITIT_FOLDER).glob("*.pkl"):
        if re.fullmatch("[0-9a-f]{32}", path.stem):
            path.unlink()


def _cancel_unrecorded(run: RunDirectory) -> None:
    """Cancels the job of a submission that was killed before it wrote the job down: its tasks may lack their files."""
    job = run.job()
    if "submitting" not in job:
        return
    known = {str(entry["id"]) for entry in job["jobs"]}
    mine = [other for other in backlog.queued_jobs(backlog.root_of(run)) if directory_in(other.comment) == run.path]
    if unknown := {other.array_id or other.id for other in mine} - known:
        slurm_commands.run("scancel", *sorted(unknown))


def _refusal(run: RunDirectory, error: Exception, left: list[int]) -> str:
    cause = error.__cause__
    code = f" exited {cause.returncode}" if isinstance(cause, subprocess.CalledProcessError) else ""
    said = str(cause if isinstance(cause, TimeoutError) else error).replace("sbatch: error: ", "").strip()
    kept = ""
    if run.job()["jobs"]:
        kept = f"; {len(left)} of its tasks are not queued: mend it and run `crosscoder submit --resume {run.reference}`"
    return f'sbatch{code}: "{said}"; accounts you may use: sacctmgr show assoc user=$USER; partitions: sinfo{kept}'
