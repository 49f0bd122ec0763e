"""What a run waits for in Slurm: the jobs of the runs that must finish first."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.errors import UserError
from slurm.client import slurm_commands
from slurm.record import backlog
from slurm.record.run_directory import Json, RunDirectory, list_runs


def dependency(parents: Sequence[RunDirectory], *, planned: bool = False) -> str | None:
    """Slurm's dependency on what of `parents` has not finished; None if all has.

    planned : the parents may not be queued yet; the job that one will be is then named by its run.

    Raises `UserError` for a parent that Slurm can't wait for.
    """
    ids: list[str] = []
    for parent in parents:
        job = parent.job()
        waiting = [task for task in range(job["num_tasks"]) if (parent.result(task) or {}).get("status") != "finished"]
        if not waiting:
            continue
        known = [entry["id"] for entry in job["jobs"] if set(entry["tasks"]) & set(waiting)]
        if planned and job["executor"] == "slurm" and not job["jobs"]:
            ids.append(f"<{parent.reference}>")
            continue
        if job["executor"] != "slurm" or not known:
            raise UserError(
                f"{parent.reference} has not finished and is no job of Slurm, so a job can't wait for it; finish or submit it first"
            )
        ids += [str(known[-1])] if len(known) == 1 or job["num_tasks"] == 1 else [str(identity) for identity in known]
    return "afterok:" + ":".join(dict.fromkeys(ids)) if ids else None


def not_wholly_queued(job: Json) -> RunDirectory | None:
    """The first of the runs that `job` (a job.json) waits for of which some tasks are not queued yet: no job can wait for those."""
    parents = [RunDirectory(Path(path)) for path in job["after"]]
    return next((parent for parent in parents if (parent.path / "job.json").exists() and backlog.tasks_of(parent)), None)


def let_wait_again(parent: RunDirectory) -> list[str]:
    """Makes the queued jobs that wait for `parent` wait for its newest jobs; gives their ids."""
    moved = []
    for child in list_runs(parent.path.parents[2]):
        job = child.job()
        if str(parent.path) not in job["after"] or job["executor"] != "slurm" or not job["jobs"]:
            continue
        wanted = dependency([RunDirectory(Path(path)) for path in job["after"]])
        for entry in job["jobs"] if wanted else []:
            state = slurm_commands.run("squeue", "-h", "-t", "pending", "-j", str(entry["id"]), "-o", "%T")
            if state.strip():
                slurm_commands.run("scontrol", "update", f"jobid={entry['id']}", f"dependency={wanted}")
                moved.append(str(entry["id"]))
    return moved
