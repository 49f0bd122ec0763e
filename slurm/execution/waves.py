"""Queues what a submit limit left no room for, wave by wave: each job of a run has a look when it ends.

    python -m slurm.execution.waves ROOT_OF_RUNS

The shell of every job runs this last, if there is a backlog (see `slurm.record.backlog`), so also when its worker failed or was
killed. The job itself still counts as queued then: what it can queue is what earlier jobs made room for. So that a run does not
come to rest when the last jobs end at once, the last of them to look (no other is left that will) stays until those before it are
gone. It stays only for room: what Slurm refuses for another reason is left to the next job that ends, and to the next submission.
What nothing queues any more, because the last job's node was lost or others' jobs keep the room for longer than that, `crosscoder
jobs` says, and `crosscoder submit --resume`, or any other submission, goes on with it.

A run that was cancelled as a whole is not gone on with: `crosscoder cancel` of the run takes it out of the backlog, and so does the
job that ends when scancel leaves the run no other. One task that is cancelled among others concerns that task alone.
"""

import os
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from pipeline.config.errors import UserError
from slurm.client import slurm_commands, slurm_queries
from slurm.execution import executor, requeue
from slurm.execution.dependencies import not_wholly_queued
from slurm.record import backlog, run_directory
from slurm.record.activity import one_submission_at_a_time
from slurm.record.environment import user_name
from slurm.record.printable import print
from slurm.record.run_directory import RunDirectory, directory_in
from slurm.record.text_table import number_of

PATIENCE_SECONDS = 120.0
POLL_SECONDS = 1.0


class Outcome(NamedTuple):
    """What became of the backlog: sentences for what was done, and the runs for which waiting may help, or can't."""

    said: list[str]
    want_room: list[RunDirectory]
    refused: list[RunDirectory]


def queue_what_fits(root: Path) -> list[str]:
    """Queues what now fits of each run in the backlog under `root`, oldest first, and says so; the caller holds the submission lock.

    What is wrong with one run is said, and stops neither the others nor the caller.
    """
    return _queue_each(root, frozenset()).said


def queue_first(root: Path) -> None:
    """The same for a command that submits something else: tells it on stderr."""
    for sentence in queue_what_fits(root):
        print(f"crosscoder: {sentence}", file=sys.stderr, flush=True)


def _queue_each(root: Path, refused_before: Collection[RunDirectory]) -> Outcome:
    """What `queue_what_fits` does; those of `refused_before` are not tried again."""
    outcome = Outcome([], [], [])
    for run in backlog.read(root).runs:
        if _is_anothers(run):
            continue
        try:
            run.check_record()
        except UserError as error:
            backlog.forget(root, run)
            outcome.said.append(f"{run.reference} is not waited with any more: {error}")
            continue
        if run in refused_before:
            continue
        try:
            if lost := _lost_parent(run):
                outcome.said.append(give_up(run, lost))
                continue
            entries = executor.launch(run, backlog.tasks_of(run))
            is_blocked = not_wholly_queued(run.job()) is not None  # by a parent that is in the backlog, and may want room, itself
        except (ValueError, KeyError, TypeError, OSError) as error:  # a `UserError`, or a record with something wrong in it
            comes_back = isinstance(error, UserError) and slurm_commands.is_out_of_contact(error)
            (outcome.want_room if comes_back else outcome.refused).append(run)
            outcome.said.append(f"{run.reference}: {error if isinstance(error, UserError) else repr(error)}")
            continue
        outcome.said.extend(f"{run.reference}: job {entry['id']} with {number_of(len(entry['tasks']), 'task')} queued" for entry in entries)
        outcome.want_room.extend([run] if backlog.tasks_of(run) and not is_blocked else [])
    return outcome


def _is_anothers(run: RunDirectory) -> bool:
    """Whether another user, who shares the root, made the run: his jobs queue it, as his."""
    return run.path.exists() and run.path.stat().st_uid != os.geteuid()


def give_up(run: RunDirectory, how: str) -> str:
    """Takes the run's tasks that are not queued out of the backlog for good, and says so; the caller holds the submission lock."""
    tasks = backlog.tasks_of(run)
    job = run.job()
    by = f"{user_name()}@{os.uname().nodename}"
    job["changes"].append({"time": time.time(), "by": by, "what": {"cancelled_tasks": tasks}, "how": how})
    run.write_job(job)
    backlog.set_tasks(run, [], "")
    return f"{number_of(len(tasks), 'task')} of {run.reference} that were not queued yet cancelled ({how})"


def _lost_parent(run: RunDirectory) -> str | None:
    """Why the runs that this one needs will never have finished; None while they may: Slurm too cancels a job then."""
    for parent in (RunDirectory(Path(path)) for path in run.job()["after"]):
        if not (parent.path / "job.json").exists():
            return f"needed {parent.reference}, whose directory was deleted"
        if {"failed", "cancelled"} & set(parent.states()):
            return f"needed {parent.reference}, which failed or was cancelled"
    return None


class Look:
    """What the job `job_id` does about the backlog under `root` while it ends."""

    def __init__(self, root: Path, job_id: str) -> None:
        self.root = root
        self.job_id = job_id
        self.refused: set[RunDirectory] = set()
        self._said: set[str] = set()

    def say(self, sentence: str) -> None:
        """Prints what was not said before: a look may be the hundredth."""
        if sentence not in self._said:
            print(sentence, flush=True)
        self._said.add(sentence)

    def stop_if_cancelled(self, restart: int) -> bool:
        """Takes the job's run out of the backlog if somebody cancelled all that is queued of it; False: there is no more to do.

        `crosscoder cancel` knows what it was asked to cancel, and has seen to the backlog itself. Of scancel only the effect is
        seen: who cancels the last jobs of a run wants it to stop.
        """
        fate = requeue.fate_of(slurm_commands.run("scontrol", "-o", "show", "job", self.job_id), restart)
        if fate is not requeue.Fate.CANCELLED:
            return False
        with one_submission_at_a_time(self.root):
            mine = backlog.queued_jobs(self.root, slurm_queries.my_jobs())
            own = next((job for job in mine if job.raw_id == self.job_id), None)
            run = next((run for run in backlog.read(self.root).runs if own and run.path == directory_in(own.comment)), None)
            if own is None or run is None or not run_directory.has_record(run) or own.id in run.cancelled_jobs():
                return False
            if all(job.state == "COMPLETING" for job in mine if job.raw_id != self.job_id and directory_in(job.comment) == run.path):
                self.say(give_up(run, f"job {self.job_id} was cancelled"))
            return False

    def queue(self) -> bool:
        """Queues what fits; whether the job has to stay and look again."""
        with one_submission_at_a_time(self.root):
            before = backlog.read(self.root)
            running = {job.raw_id for job in backlog.queued_jobs(self.root) if job.is_running}
            ended = [*(other for other in before.ended if other in running and other != self.job_id), self.job_id]
            backlog.write(self.root, before._replace(ended=ended))
            outcome = _queue_each(self.root, self.refused)
            self.refused.update(outcome.refused)
            for sentence in outcome.said:
                self.say(sentence)
            after = backlog.read(self.root)
            is_last = bool(outcome.want_room) and not {job.raw_id for job in backlog.queued_jobs(self.root)} - set(ended)
            # Only one stays: two would keep from each other the room that they wait for.
            stays = is_last and (after.staying in (None, self.job_id) or after.staying not in running)
            if stays or after.staying == self.job_id:
                backlog.write(self.root, after._replace(staying=self.job_id if stays else None))
            return stays

    def repeat(self, step: Callable[[], bool], deadline: float) -> str | None:
        """Takes `step` until it gives False; while it gives True, or Slurm doesn't answer, again and again until `deadline`.

        Gives what was missing then; None where it came to its end.
        """
        while True:
            try:
                if not step():
                    return None
                missing = "no room in the queue"
            except UserError as error:
                if not slurm_commands.is_out_of_contact(error):
                    raise
                self.say(str(error))
                missing = "no answer from Slurm"
            if time.monotonic() > deadline:
                return missing
            time.sleep(POLL_SECONDS)


def look_at_end_of_job(root: Path, job_id: str, patience_seconds: float = PATIENCE_SECONDS, restart: int = 0) -> None:
    """Queues what fits while the job `job_id` ends, and stays as long as there is something left and nobody else to queue it."""
    look = Look(root, job_id)
    deadline = time.monotonic() + patience_seconds
    try:
        look.repeat(lambda: look.stop_if_cancelled(restart), deadline)
    except UserError as error:  # a job that Slurm knows no more: whether somebody cancelled it is not known
        look.say(str(error))
    if missing := look.repeat(look.queue, deadline):
        runs = ", ".join(run.reference for run in backlog.read(root).runs)
        look.say(f"{missing} for {patience_seconds:.0f} s; `crosscoder submit --resume` goes on with {runs}")


def main() -> None:
    """`python -m slurm.execution.waves ROOT_OF_RUNS`, in a job's shell."""
    try:
        look_at_end_of_job(Path(sys.argv[1]), os.environ["SLURM_JOB_ID"], restart=int(os.environ.get("SLURM_RESTART_COUNT") or "0"))
    except UserError as error:
        raise SystemExit(f"crosscoder: {error}") from None


if __name__ == "__main__":
    main()
