"""A task that was stopped goes on later: requeued in Slurm, or submitted anew, unless that leads nowhere.

Slurm itself requeues a preempted job where the partition's mode is REQUEUE. It does not after a time limit, nor where
preemption cancels: there the job sees to it before it ends.
"""

import time
from enum import Enum

from pipeline.config.errors import UserError
from slurm.client import slurm_commands, slurm_values
from slurm.execution import dependencies, executor
from slurm.execution.job_process import Process
from slurm.record import backlog
from slurm.record.activity import one_submission_at_a_time
from slurm.record.run_directory import Json, RunDirectory

MAX_ATTEMPTS = 100
MAX_ATTEMPTS_WITHOUT_PROGRESS = 10
"""Several preemptions in a row before the first shard is written are bad luck; ten look like a time limit shorter than one
unit of work."""
SLURM_TIMEOUT_S = 20.0
"""Short: Slurm kills a preempted job when its grace time is over."""
POLL_SECONDS = 1.0


def go_on_later(run: RunDirectory, task: int, process: Process) -> str:
    """Sees to it that the stopped task is taken up again, if something has to be done; says in words what comes next."""
    by_hand = f"`crosscoder submit --resume {run.reference}` goes on from there"
    if process.executor != "slurm":
        return by_hand
    if reason := leads_nowhere(run.attempts(task), run.progress(task)):
        return f"not requeued: {reason}; {by_hand}"
    try:
        fate = _requeue_what_runs(process.job, process.restart)
    except UserError as error:
        return _submit_anew(run, task, f"Slurm would not requeue job {process.job} ({error})", by_hand)
    if fate is Fate.RUNNING:
        return f"requeued as job {process.job}"
    if fate is Fate.REQUEUED:
        return f"Slurm requeues job {process.job} itself"
    if fate is Fate.CANCELLED:
        return f"was cancelled; {by_hand}"
    return _submit_anew(run, task, f"Slurm ended job {process.job}: {fate.value}", by_hand)


class Fate(Enum):
    """What Slurm does to a job that was told to stop."""

    RUNNING = "it runs"
    REQUEUED = "it will be started again"
    PREEMPTED = "preemption cancels here"
    TIMED_OUT = "its time limit is over"
    CANCELLED = "somebody cancelled it"


def fate_of(text: str, restart: int) -> Fate:
    """From what `scontrol show job` says to a process of the job's attempt number `restart`.

    A job being ended reads COMPLETING whatever becomes of it. A requeued one has one restart more; a preempted one that
    is not requeued has a preemption time.
    """
    details = slurm_values.parse_records(text)[0]
    if details.get("JobState") in ("RUNNING", "SIGNALING"):
        return Fate.RUNNING
    if details.get("JobState") == "PENDING" or int(details.get("Restarts") or 0) > restart:
        return Fate.REQUEUED
    if slurm_values.present(details.get("PreemptTime")):
        return Fate.PREEMPTED
    ran, limit = slurm_values.seconds(details.get("RunTime", "")), slurm_values.seconds(details.get("TimeLimit", ""))
    return Fate.TIMED_OUT if ran is not None and limit is not None and ran >= limit else Fate.CANCELLED


def _requeue_what_runs(job: str, restart: int) -> Fate:
    """The job's fate, once it is requeued if it was RUNNING; asked again while the controller is away, for `SLURM_TIMEOUT_S`."""
    deadline = time.monotonic() + SLURM_TIMEOUT_S
    while True:
        left_s = max(POLL_SECONDS, deadline - time.monotonic())
        try:
            fate = fate_of(slurm_commands.run("scontrol", "-o", "show", "job", job, timeout_s=left_s), restart)
            if fate is Fate.RUNNING:
                slurm_commands.run("scontrol", "requeue", job, timeout_s=left_s)
            return fate
        except UserError as error:
            if not slurm_commands.is_out_of_contact(error) or time.monotonic() + POLL_SECONDS > deadline:
                raise
        time.sleep(POLL_SECONDS)


def _submit_anew(run: RunDirectory, task: int, why: str, by_hand: str) -> str:
    try:
        with one_submission_at_a_time(backlog.root_of(run)):
            entries = executor.launch(run, [task])
            waiting = dependencies.let_wait_again(run) if entries else []
    except (UserError, OSError) as error:
        said = f"{why}, and a new submission failed: {error}"
        return said if f"`crosscoder submit --resume {run.reference}`" in said else f"{said}; {by_hand}"
    if not entries:
        return f"{why}; not queued yet, for {run.job()['not_queued']['why']}: queued as this job ends"
    return f"{why}; submitted anew as job {entries[0]['id']}" + (f", for which {', '.join(waiting)} wait now" if waiting else "")


def leads_nowhere(attempts: list[Json], progress: Json | None) -> str | None:
    """Why no further attempt should be made; None while there is hope.

    Each start line in attempts.jsonl carries the progress that the attempt began with.
    """
    starts = [line for line in attempts if line["event"] == "start"]
    if len(starts) >= MAX_ATTEMPTS:
        return f"it was attempted {len(starts)} times"
    recent = starts[-MAX_ATTEMPTS_WITHOUT_PROGRESS:]
    now = place(progress)
    if len(recent) == MAX_ATTEMPTS_WITHOUT_PROGRESS and all(start["place"] == now for start in recent):
        return f"its last {len(recent)} attempts got no further than {now or 'the start'}"
    return None


def place(progress: Json | None) -> str | None:
    """Where a heartbeat says that the task stands: phase and step."""
    return f"{progress['phase']} {progress['step']}" if progress else None
