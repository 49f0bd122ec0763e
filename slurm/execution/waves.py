"""Queues what a submit limit left no room for, wave by wave: each job of a run has a look when it ends.

    python -m slurm.execution.waves ROOT_OF_RUNS

The shell of every job runs this last, if there is a backlog (see `slurm.record.backlog`), so also when its worker failed or was
killed; of a run whose job somebody cancelled nothing more is queued. The job itself still counts as queued then: what it can
queue is what earlier jobs made room for. So that a run does not come to rest when the last jobs end at once, the last of them
to look (no other is left that will) stays until those before it are gone. What nothing queues any more, because the last job's
node was lost or others' jobs keep the room for longer than that, `crosscoder jobs` says, and `crosscoder submit --resume`, or
any other submission, goes on with it.
"""

import os
import sys
import time
from pathlib import Path

from pipeline.config.errors import UserError
from slurm.client import slurm_commands, slurm_queries
from slurm.execution import executor, requeue
from slurm.record import backlog
from slurm.record.activity import one_submission_at_a_time
from slurm.record.environment import user_name
from slurm.record.run_directory import RunDirectory, directory_in

PATIENCE_SECONDS = 120.0
POLL_SECONDS = 1.0


def queue_what_fits(root: Path) -> list[str]:
    """Queues what now fits of each run in the backlog under `root`, oldest first, and says so; the caller holds the submission lock."""
    said = []
    for run in backlog.read(root).runs:
        if not run.path.exists():
            backlog.forget(root, run)
            continue
        if failed := _failed_parent(run):
            said.append(give_up(run, f"needed {failed.reference}, which failed or was cancelled"))
            continue
        try:
            entries = executor.launch(run, backlog.tasks_of(run))
        except UserError as error:
            said.append(f"{run.reference}: {error}")
            continue
        said += [f"{run.reference}: job {entry['id']} with {len(entry['tasks'])} task(s) queued" for entry in entries]
    return said


def give_up(run: RunDirectory, how: str) -> str:
    """Takes the run's tasks that are not queued out of the backlog for good, and says so; the caller holds the submission lock."""
    tasks = backlog.tasks_of(run)
    job = run.job()
    by = f"{user_name()}@{os.uname().nodename}"
    job["changes"].append({"time": time.time(), "by": by, "what": {"cancelled_tasks": tasks}, "how": how})
    run.write_job(job)
    backlog.set_tasks(run, [], "")
    return f"{len(tasks)} task(s) of {run.reference} that were not queued yet cancelled ({how})"


def _failed_parent(run: RunDirectory) -> RunDirectory | None:
    """A run that this one needs and that failed: Slurm too cancels a job then."""
    parents = [RunDirectory(Path(path)) for path in run.job()["after"]]
    return next((parent for parent in parents if parent.path.exists() and {"failed", "cancelled"} & set(parent.states())), None)


def look_at_end_of_job(root: Path, job_id: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Queues what fits while the job `job_id` ends, and stays as long as there is something left and nobody else to queue it."""
    deadline = time.monotonic() + patience_seconds
    while _look(root, job_id):
        if time.monotonic() > deadline:
            runs = ", ".join(run.reference for run in backlog.read(root).runs)
            print(f"no room in the queue for {patience_seconds:.0f} s; `crosscoder submit --resume` goes on with {runs}", flush=True)
            return
        time.sleep(POLL_SECONDS)


def _look(root: Path, job_id: str) -> bool:
    """Queues what fits; whether the job `job_id` has to stay and look again."""
    with one_submission_at_a_time(root):
        before = backlog.read(root)
        running = {job.raw_id for job in backlog.queued_jobs(root) if job.is_running}
        ended = [*(other for other in before.ended if other in running and other != job_id), job_id]
        backlog.write(root, before._replace(ended=ended))
        for sentence in queue_what_fits(root):
            print(sentence, flush=True)
        after = backlog.read(root)
        is_last = bool(after.runs) and not {job.raw_id for job in backlog.queued_jobs(root)} - set(ended)
        # Only one stays: two would keep from each other the room that they wait for.
        stays = is_last and (after.staying in (None, job_id) or after.staying not in running)
        if stays or after.staying == job_id:
            backlog.write(root, after._replace(staying=job_id if stays else None))
        return stays


def stop_if_cancelled(root: Path, job_id: str, restart: int) -> None:
    """Takes the run of the job `job_id` out of the backlog if somebody cancelled the job: who calls scancel wants it to stop."""
    fate = requeue.fate_of(slurm_commands.run("scontrol", "-o", "show", "job", job_id), restart)
    if fate is not requeue.Fate.CANCELLED:
        return
    with one_submission_at_a_time(root):
        path = next((directory_in(job.comment) for job in slurm_queries.my_jobs() if job.raw_id == job_id), None)
        for run in backlog.read(root).runs:
            if run.path == path:
                print(give_up(run, f"job {job_id} was cancelled"), flush=True)


def main() -> None:
    """`python -m slurm.execution.waves ROOT_OF_RUNS`, in a job's shell."""
    root, job_id = Path(sys.argv[1]), os.environ["SLURM_JOB_ID"]
    stop_if_cancelled(root, job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    look_at_end_of_job(root, job_id)


if __name__ == "__main__":
    main()
