"""My jobs: what Slurm's queue, the run directories and their heartbeats know, joined into one row a task. Pure functions.

The truth about success is the run's own record; about waiting, place and time it is Slurm's queue. A job that Slurm has
forgotten (MinJobAge after its end) lives on in its run directory; one that died without a result is told as lost.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.run import duration
from slurm.client import job_reasons, slurm_commands
from slurm.client.job_output import Job
from slurm.record.run_directory import directory_in

STALE_HEARTBEAT_S = 120.0
"""A stage reports every few seconds; silence this long is worth a word."""

MAX_START_AHEAD_S = 30 * 86400.0
"""Slurm plans a day or some ahead (bf_window). For a job that it has no plan for it puts the start a year off, right after a
preemption for one: not a moment to wait for, and not shown."""

NO_SLURM = "no Slurm answers on this machine, so what became of its job is not known here"

ACTIVE = ("running", "waiting", "held")
REQUEUED = re.compile(r"^requeued as job|^Slurm requeues job|submitted anew as job")
"""What a process that stopped wrote down of a job that goes on (see `slurm.execution.requeue`)."""

STATES = (*ACTIVE, "stopped", "failed", "cancelled", "lost", "finished", "new")
"""In the order of the listing's interest. lost: neither queue nor run directory says how it ended."""


class Task(NamedTuple):
    """One task of a run, as its directory tells. `file_state` as `RunDirectory.task_state` gives it."""

    run: str
    stage: str
    name: str
    task: int
    num_tasks: int
    executor: str
    job_id: str | None
    file_state: str
    is_held: bool = False
    """Whether a process works on it now, as far as its lock tells."""
    progress: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    has_begun: bool = False
    """Whether a process ever took it up."""
    last_ending: str | None = None
    """See `RunDirectory.last_ending`."""
    waits_for: tuple[str, ...] = ()
    failed_parents: tuple[str, ...] = ()
    """Those of `waits_for` that failed or were stopped: Slurm cancels what needs them."""
    was_cancelled: bool = False
    """Whether `crosscoder cancel` ended its last job."""
    limit_s: int | None = None
    not_queued: str | None = None
    """Why it is not queued yet, of a task that waits outside Slurm (see `slurm.record.backlog`)."""
    is_served: bool = False
    """Whether a job is left that will queue such a task when it ends."""
    is_kept: bool = False
    """Whether its job, if it has not ended, waits in a private cluster that is stopped now."""
    is_started: bool = False
    """Of a run without Slurm: whether the process lives that is to work on it, now or when its turn comes."""
    submitted: float | None = None
    replaced_jobs: frozenset[str] = frozenset()
    """Ids under which tasks of its run were submitted before: history of the run, no jobs of their own."""


class Row(NamedTuple):
    """One line of the listing. Times are seconds, moments seconds since 1970; None where unknown."""

    job: str
    name: str
    state: str
    run: str = ""
    stage: str = ""
    task: int | None = None
    num_tasks: int = 1
    slurm_state: str = ""
    reason: str = ""
    node: str = ""
    partition: str = ""
    gpus: str = ""
    elapsed_s: float | None = None
    limit_s: int | None = None
    phase: str = ""
    step: float | None = None
    total: float | None = None
    unit: str = ""
    percent: float | None = None
    """Done of the phase that is under way, or of all of what has finished; None of what else does not run, or was started again and
    has not reported yet."""
    stopped_at: float | None = None
    """The same of an earlier attempt, or of the last one: how far it had come in its last phase, if that was not over."""
    rate: float | None = None
    starts: float | None = None
    """When Slurm expects a waiting job to start."""
    ends: float | None = None
    """When a running one is expected to have done its work."""
    warning: str = ""
    submitted: float | None = None
    ended: float | None = None


def join(jobs: Sequence[Job] | None, tasks: Sequence[Task], *, now: float, remembered: Sequence[Job] = ()) -> list[Row]:
    """A row for each task, and for each job of mine that belongs to no run: what runs, what waits, then the rest, newest first.

    jobs : the queue; None where no Slurm answers.
    remembered : what accounting knows of jobs that the queue has forgotten.
    """
    queue = jobs or []
    by_id = {job.id: job for job in remembered} | {job.id: job for job in queue}
    own_jobs = [_job_of(task, by_id) for task in tasks]
    is_known = jobs is not None
    rows = [_row_of_task(task, job, now, is_known) for task, job in zip(tasks, own_jobs, strict=True)]
    if jobs is None:
        pairs = zip(rows, tasks, strict=True)
        rows = [row._replace(reason=NO_SLURM) if row.state == "lost" and task.executor == "slurm" else row for row, task in pairs]
    known = {job.id for job in own_jobs if job is not None}
    rows = [_of_backlog(row, task) if task.not_queued else row for row, task in zip(rows, tasks, strict=True)]
    replaced = frozenset().union(*{task.replaced_jobs for task in tasks})
    rows += [_row_of_foreign_job(job, now) for job in queue if job.id not in known and not _is_past(job, replaced)]
    return sorted(rows, key=_place)


def _of_backlog(row: Row, task: Task) -> Row:
    """The row of a task that is not queued yet."""
    if task.is_served:
        return row._replace(state="waiting", reason=f"not queued yet: {task.not_queued}; queued as earlier jobs end")
    if task.is_kept:
        return row._replace(state="waiting", reason=slurm_commands.CLUSTER_STOPPED)
    again = f"no job is left that would queue it; `crosscoder submit --resume {task.run}` does"
    return row._replace(state="stopped", reason=f"not queued: {task.not_queued}, and {again}")


def _is_past(job: Job, replaced: frozenset[str]) -> bool:
    """Whether the job is an earlier submission of a run, and over: one that still waits or runs is told of."""
    return job.id.partition("_")[0] in replaced and (job.is_final or job.state == "COMPLETING")


def _place(row: Row) -> tuple[int, float, int]:
    state = STATES.index(row.state)
    return (state, 0.0, 0) if row.state in ACTIVE else (len(ACTIVE), -(row.ended or row.submitted or 0.0), state)


def _job_of(task: Task, by_id: Mapping[str, Job]) -> Job | None:
    """The task's job. One of its number that names another run is not: Slurm gives numbers anew when it has lost its state."""
    job = by_id.get(task.job_id or "")
    named = directory_in(job.comment) if job is not None else None
    return job if named is None or "/".join(named.parts[-3:]) == task.run else None


def forgotten(jobs: Sequence[Job], tasks: Sequence[Task]) -> list[str]:
    """Ids of Slurm jobs that have no end on record and are not in the queue: for accounting to explain."""
    queue = {job.id for job in jobs}
    return [
        t.job_id for t in tasks if t.executor == "slurm" and t.job_id and t.job_id not in queue and t.file_state in ("queued", "running")
    ]


def _row_of_task(task: Task, job: Job | None, now: float, is_queue_known: bool) -> Row:
    state, reason = _state(task, job, is_queue_known)
    beat = _current_beat(task, job)
    running = state == "running"
    left = beat.get("seconds_left") if running else None
    ends = beat["time"] + left if left is not None else None
    step, total = beat.get("step"), beat.get("total")
    share = 100 * step / total if step is not None and total else None
    is_at_work = running and not _is_of_earlier_attempt(task, job)
    return Row(
        job=task.job_id or "",
        run=task.run,
        stage=task.stage,
        name=task.name,
        task=task.task if task.num_tasks > 1 else None,
        num_tasks=task.num_tasks,
        state=state,
        slurm_state=job.state if job else "",
        reason=reason,
        node=job.nodes if job else "",
        partition=job.partition if job else "",
        gpus=job.gpus if job else "",
        elapsed_s=_elapsed(task, job, now),
        limit_s=job.limit_s if job else task.limit_s,
        phase=str(beat.get("phase", "")),
        step=step,
        total=total,
        unit=str(beat.get("unit", "")),
        percent=share if is_at_work or state == "finished" else None,
        stopped_at=share if share is not None and share < 100 and not is_at_work and state != "finished" else None,
        rate=beat.get("rate") if running else None,
        starts=_expected_start(job, now) if job and state == "waiting" else None,
        ends=ends,
        warning=_warning(job, beat, ends, now) if running else "",
        submitted=task.submitted,
        ended=None if state in ACTIVE else (task.result or {}).get("ended") or beat.get("time"),
    )


def _row_of_foreign_job(job: Job, now: float) -> Row:
    """A job of mine that no run directory knows: submitted by other means, or its directory is gone."""
    state = slurm_state_in_words(job)
    return Row(
        job=job.id,
        name=job.name,
        state=state,
        slurm_state=job.state,
        reason=job_reasons.in_words(job),
        node=job.nodes,
        partition=job.partition,
        gpus=job.gpus,
        elapsed_s=job.elapsed_s,
        limit_s=job.limit_s,
        starts=_expected_start(job, now) if state == "waiting" else None,
        submitted=job.submitted,
        ended=job.started + job.elapsed_s if job.is_final and job.started else None,
    )


def _expected_start(job: Job, now: float) -> float | None:
    return job.started if job.started is not None and job.started - now <= MAX_START_AHEAD_S else None


def slurm_state_in_words(job: Job) -> str:
    """Slurm's state as one of `STATES`."""
    if job.state == "PENDING":
        return "held" if job.priority == 0 or job.reason.startswith("JobHeld") else "waiting"
    if job.is_running:
        return "running"
    if job.state in ("REQUEUED", "REQUEUE_FED", "UNKNOWN"):
        return "waiting"
    if job.state in ("REQUEUE_HOLD", "RESV_DEL_HOLD"):
        return "held"
    return {"COMPLETED": "finished", "CANCELLED": "cancelled", "PREEMPTED": "stopped"}.get(job.state, "failed")


def _state(task: Task, job: Job | None, is_queue_known: bool = True) -> tuple[str, str]:
    """The state and its reason in words."""
    status = (task.result or {}).get("status")
    if status == "finished":
        return "finished", ""
    if job is not None and not job.is_final:
        return slurm_state_in_words(job), job_reasons.in_words(job, task.waits_for)
    if status is None and task.last_ending == "finished" and not (task.is_held or task.is_started):
        return (
            "lost",
            f"it finished, but its result.json is missing: restore it, or do it again with `crosscoder submit --resume {task.run}`",
        )
    if status == "stopped" and _is_cancelled(task, job):  # whatever became of it before: one word and one way on for a whole array
        return "cancelled", f"{job_reasons.STATE_WORDS['CANCELLED']}; {_again(task)}"
    if status == "stopped" and task.is_kept:
        return "waiting", slurm_commands.CLUSTER_STOPPED
    if status == "stopped":
        return "stopped", _how_it_stopped(task, is_gone=is_queue_known and task.executor == "slurm")
    if status == "failed":
        return "failed", _first_line((task.result or {}).get("error"))
    if job is not None:
        state = slurm_state_in_words(job)
        if state == "finished":  # Slurm saw it end well, but there is no result: its process was not ours, or the disk was full
            return "failed", "ended without a result; its log may say why"
        words = job_reasons.in_words(job, task.waits_for)
        return state, f"{words}; {_again(task)}" if words == job_reasons.STATE_WORDS["CANCELLED"] else words
    return _state_without_job(task)


def _again(task: Task) -> str:
    return f"`crosscoder submit --resume {task.run}` goes on from there"


def _is_cancelled(task: Task, job: Job | None) -> bool:
    """Whether a task that saved and stopped was cancelled: by us, by whom its process heard of, or later, while it waited again."""
    heard = "was cancelled; " in str((task.result or {}).get("next"))
    return task.was_cancelled or heard or (job is not None and job.state == "CANCELLED")


def _how_it_stopped(task: Task, *, is_gone: bool) -> str:
    """What stopped it, and what becomes of it: it saved what it had.

    is_gone : no queue has it any more, so that it was requeued is true no longer.
    """
    result = task.result or {}
    error, following = _first_line(result.get("error")), str(result.get("next") or _again(task))
    if is_gone and REQUEUED.search(following):
        following = f"Slurm no longer knows its job; {_again(task)}"
    return f"was stopped{f' ({error})' if error else ''}; {following}"


def _state_without_job(task: Task) -> tuple[str, str]:
    again = _again(task)
    if task.file_state == "new" and not task.has_begun and not task.is_started:
        return "new", "was never submitted"
    if task.is_held:
        return "running", "" if task.executor != "slurm" else "its process lives, but Slurm no longer knows its job"
    if task.was_cancelled and not (task.failed_parents and task.job_id is None):
        return "cancelled", f"was cancelled; {again}"
    if task.is_started:
        return "waiting", _why_it_has_not_begun(task)
    if task.failed_parents:
        return "cancelled", f"it needed {', '.join(task.failed_parents)}, which failed or was cancelled"
    if task.is_kept:
        return "waiting", slurm_commands.CLUSTER_STOPPED
    if task.executor == "slurm":
        return "lost", f"Slurm no longer knows it and it left no result: cancelled or killed; {again}"
    if task.file_state == "queued" and task.executor == "local":
        return "lost", f"the process that was to run it is gone; {again}"
    return "lost", f"its process is gone and left no result; {again}"


def _why_it_has_not_begun(task: Task) -> str:
    """Of a task whose process lives, without Slurm, and has not taken it up."""
    if task.waits_for:
        return f"waits for {', '.join(task.waits_for)}"
    return "is starting, or waits for other tasks of its run to end" if task.num_tasks > 1 else "is starting"


def _current_beat(task: Task, job: Job | None) -> dict[str, Any]:
    """The last heartbeat. Of an earlier attempt only how far it came: its rate and its end say nothing of this one."""
    beat = dict(task.progress or {})
    if job is not None and _is_of_earlier_attempt(task, job):
        beat |= {"rate": None, "seconds_left": None, "time": job.started}
    return beat


def _is_of_earlier_attempt(task: Task, job: Job | None) -> bool:
    """Whether the last heartbeat is older than the attempt that is under way."""
    return bool(task.progress and job is not None and job.started and task.progress.get("time", 0.0) < job.started)


def _elapsed(task: Task, job: Job | None, now: float) -> float | None:
    if job is not None:
        return float(job.elapsed_s)
    if task.result and task.result.get("started") and task.result.get("ended"):
        return float(task.result["ended"] - task.result["started"])
    if task.progress and task.is_held:
        return now - float(task.progress["started"])
    return None


def _warning(job: Job | None, beat: dict[str, Any], ends: float | None, now: float) -> str:
    silent = now - beat["time"] if beat else 0.0
    if silent > STALE_HEARTBEAT_S:
        return f"no sign of life for {duration(silent)}"
    if job is None or job.limit_s is None or job.started is None or ends is None:
        return ""
    over = ends - (job.started + job.limit_s)
    return f"needs {duration(over)} more than its time limit" if over > 0 else ""


def _first_line(error: Any) -> str:
    lines = [line for line in str(error or "").strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
