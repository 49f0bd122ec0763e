"""Queues what a submit limit left no room for, wave by wave: each job of a run has a look when it ends.

    python -m slurm.execution.waves ROOT_OF_RUNS

The shell of every job runs this last, if there is a backlog (see `slurm.record.backlog`), so also when its worker failed or was
killed. The job itself still counts as queued then: what it can queue is what earlier jobs made room for. So that a run does
not come to rest when the last jobs end at once, the last of them to look (no other is left that will) stays until those
before it are gone. What nothing queues any more, because the last job's node was lost or others' jobs keep the room for longer
than that, `crosscoder jobs` says, and `crosscoder submit --resume`, or any other submission, goes on with it.
"""

import os
import sys
import time
from pathlib import Path

from pipeline.config.errors import UserError
from slurm.execution import executor
from slurm.record import backlog
from slurm.record.activity import one_submission_at_a_time
from slurm.record.environment import user_name
from slurm.record.run_directory import RunDirectory

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
    while True:
        with one_submission_at_a_time(root):
            known = backlog.read(root)
            queued = {job.raw_id for job in backlog.queued_jobs(root) if job.is_running}
            ended = [*(other for other in known.ended if other in queued and other != job_id), job_id]
            backlog.write(root, known._replace(ended=ended))
            for sentence in queue_what_fits(root):
                print(sentence, flush=True)
            if not backlog.read(root).runs or {job.raw_id for job in backlog.queued_jobs(root)} - set(ended):
                return
        if time.monotonic() > deadline:
            runs = ", ".join(run.reference for run in backlog.read(root).runs)
            print(f"no room in the queue for {patience_seconds:.0f} s; `crosscoder submit --resume` goes on with {runs}", flush=True)
            return
        time.sleep(POLL_SECONDS)


def main() -> None:
    """`python -m slurm.execution.waves ROOT_OF_RUNS`, in a job's shell."""
    look_at_end_of_job(Path(sys.argv[1]), os.environ["SLURM_JOB_ID"])


if __name__ == "__main__":
    main()
