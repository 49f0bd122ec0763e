"""A task that was stopped goes on later: requeued in Slurm, or submitted anew, unless that leads nowhere.

Slurm itself requeues a preempted job where the partition's mode is REQUEUE. It does not after a time limit, nor where
preemption cancels: there the job sees to it before it ends.
"""

from typing import TYPE_CHECKING

from pipeline.config.errors import UserError
from slurm import slurm_commands
from slurm.run_directory import Json

if TYPE_CHECKING:
    from slurm.job_process import Process
    from slurm.run_directory import RunDirectory

MAX_ATTEMPTS = 100
MAX_ATTEMPTS_WITHOUT_PROGRESS = 3
SLURM_TIMEOUT_S = 20.0
"""Short: Slurm kills a preempted job when its grace time is over."""


def go_on_later(run: "RunDirectory", task: int, process: "Process") -> str:
    """Sees to it that the stopped task is taken up again, if something has to be done; says in words what comes next."""
    by_hand = f"`crosscoder submit --resume {run.reference}` goes on from there"
    if process.executor != "slurm":
        return by_hand
    if reason := leads_nowhere(run.attempts(task), run.progress(task)):
        return f"not requeued: {reason}; {by_hand}"
    try:
        state = job_state(process.job)
    except UserError as error:
        return f"Slurm did not say what becomes of job {process.job} ({error}); {by_hand}"
    if state == "RUNNING":
        try:
            slurm_commands.run("scontrol", "requeue", process.job, timeout_s=SLURM_TIMEOUT_S)
        except UserError as error:
            return _submit_anew(run, task, f"Slurm refused to requeue ({error})", by_hand)
        return f"requeued as job {process.job}"
    if state == "PREEMPTED":  # preemption that cancels; one that requeues shows PENDING or COMPLETING
        return _submit_anew(run, task, "preemption cancels jobs here", by_hand)
    if state == "CANCELLED":
        return f"job {process.job} was cancelled; {by_hand}"
    return f"left to Slurm, where job {process.job} is {state}"


def job_state(job: str) -> str:
    """The state of one job, as squeue names it."""
    lines = slurm_commands.run("squeue", "-h", "-a", "-t", "all", "-j", job, "-o", "%T", timeout_s=SLURM_TIMEOUT_S).split()
    return lines[0] if lines else "gone"


def _submit_anew(run: "RunDirectory", task: int, why: str, by_hand: str) -> str:
    from slurm import executor

    try:
        entries = executor.launch(run, [task])
    except (UserError, OSError) as error:
        return f"{why}, and a new submission failed: {error}; {by_hand}"
    return f"{why}: submitted anew as job {entries[0]['id']}"


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
