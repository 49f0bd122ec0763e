"""Which tasks of frozen runs wait outside Slurm, because a limit on queued jobs left no room for them.

The tasks stand in their run's job.json, under `not_queued`: `{"tasks": [5, 6, 7], "why": "your submit limit is 5"}`; the runs that
have some, oldest first, in `.backlog.json` under the root of runs, which is there as long as there are any:

    {"format": "backlog/1", "runs": ["/runs/tokenize/demo/20261123-091530-k3f9"], "ended": ["1042"], "staying": "1042"}

`ended` are jobs (Slurm's raw ids) that have had their look at the backlog, and may still count as queued; `staying` is the one of
them, or null, that stays until the others are gone. Who writes holds `one_submission_at_a_time`. See `slurm.execution.waves` for
how the tasks get into the queue.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline import records
from pipeline.config.errors import UserError
from slurm.client import slurm_queries
from slurm.client.job_output import Job
from slurm.record.run_directory import RunDirectory, directory_in, list_runs
from slurm.record.text_table import number_of

FILE = ".backlog.json"


class Backlog(NamedTuple):
    """What `.backlog.json` holds."""

    runs: list[RunDirectory]
    ended: list[str]
    staying: str | None


def root_of(run: RunDirectory) -> Path:
    """The root of runs that `run` lies under."""
    return run.path.parents[2]


def read(root: Path) -> Backlog:
    """The backlog under `root`; empty where there is no file, and gathered from the runs where it is damaged."""
    path = root / FILE
    if not path.exists():
        return Backlog([], [], None)
    try:
        facts = records.read_json(path)
        return Backlog([RunDirectory(Path(run)) for run in facts["runs"]], list(facts["ended"]), facts["staying"])
    except (UserError, KeyError, TypeError):
        return Backlog([run for run in list_runs(root) if tasks_of(run)], [], None)


def write(root: Path, backlog: Backlog) -> None:
    """Replaces the backlog under `root`; an empty one has no file."""
    if not backlog.runs:
        (root / FILE).unlink(missing_ok=True)
        return
    facts = {"format": "backlog/1", "runs": [str(run.path) for run in backlog.runs], "ended": backlog.ended, "staying": backlog.staying}
    records.write_json(root / FILE, facts)


def tasks_of(run: RunDirectory) -> list[int]:
    """The tasks of `run` that are not queued yet."""
    return list((run.job().get("not_queued") or {}).get("tasks", []))


def in_words(run: RunDirectory) -> str:
    """How many tasks of `run` are not queued yet, and why; empty where all are."""
    waiting = run.job().get("not_queued")
    if not waiting:
        return ""
    return f"{len(waiting['tasks'])} of {number_of(run.num_tasks, 'task')} not queued yet: {waiting['why']}; queued as earlier jobs end"


def set_tasks(run: RunDirectory, tasks: Sequence[int], why: str) -> None:
    """Records that `tasks`, and no others, of `run` are not queued yet; none takes the run out of the backlog."""
    job, backlog = run.job(), read(root_of(run))
    wanted = {"tasks": sorted(tasks), "why": why} if tasks else None
    if job.get("not_queued") != wanted:
        job = {key: value for key, value in job.items() if key != "not_queued"}
        run.write_job(job | ({"not_queued": wanted} if wanted else {}))
    if bool(tasks) != (run in backlog.runs):
        runs = [*backlog.runs, run] if tasks else [other for other in backlog.runs if other != run]
        write(root_of(run), backlog._replace(runs=runs))


def forget(root: Path, run: RunDirectory) -> None:
    """Takes a run whose directory is gone out of the backlog."""
    backlog = read(root)
    write(root, backlog._replace(runs=[other for other in backlog.runs if other != run]))


def queued_jobs(root: Path, jobs: Sequence[Job] | None = None) -> list[Job]:
    """Those of my jobs that wait or run for runs under `root`: each looks at the backlog when it ends.

    jobs : my jobs, where they are known; else Slurm is asked.
    """
    waiting = [job for job in (slurm_queries.my_jobs() if jobs is None else jobs) if not job.is_final]
    return [job for job in waiting if (path := directory_in(job.comment)) is not None and path.is_relative_to(root)]
