"""What resuming one run of a chain means for the others: which must be resumed before it, and which were cancelled for it."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.errors import UserError
from slurm.client import slurm_queries
from slurm.record import backlog
from slurm.record.activity import is_local_job
from slurm.record.holder import looks_held
from slurm.record.run_directory import RunDirectory, list_runs


class Chain:
    """The runs under `root` as they stand now; Slurm is asked once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._queued: set[str] | None = None

    def check_needed(self, run: RunDirectory) -> None:
        """Raises `UserError` where a run that `run` needs has come to rest unfinished: its job would be cancelled at once."""
        if (needed := self._first_at_rest(run)) is not None:
            raise UserError(
                f"{run.reference} needs {needed.reference}, which did not finish and is not queued; "
                f"resume that first: `crosscoder submit --resume {needed.reference}`"
            )

    def check_can_finish(self, parents: Sequence[RunDirectory], executor: str) -> None:
        """Raises `UserError` for one of `parents` that came to rest unfinished, or that a job of `executor` can't wait for."""
        for parent in parents:
            if parent.state() == "finished":
                continue
            if (kind := parent.job()["executor"]) != executor:
                raise UserError(
                    f"{parent.reference} has not finished and is of executor {kind}: what is of executor {executor} can't wait for it"
                )
            if self._is_at_rest(parent):
                again = f"resume it first: `crosscoder submit --resume {parent.reference}`"
                raise UserError(f"{parent.reference} did not finish and is not queued, so nothing can wait for it; {again}")

    def behind(self, run: RunDirectory) -> list[RunDirectory]:
        """The runs that need `run`, or one of these, and came to rest unfinished; in the order in which they can be resumed."""
        found, concerned = list[RunDirectory](), {run.path}
        # By their submission: who waits was submitted after whom it waits for.
        for other in sorted(list_runs(self.root), key=lambda run: run.submitted):
            if concerned & {Path(path) for path in other.job()["after"]}:
                concerned.add(other.path)
                found += [other] if self._is_at_rest(other) else []
        return found

    def _first_at_rest(self, run: RunDirectory) -> RunDirectory | None:
        for parent in (RunDirectory(Path(path)) for path in run.job()["after"]):
            if (parent.path / "job.json").exists() and self._is_at_rest(parent):
                return self._first_at_rest(parent) or parent
        return None

    def _is_at_rest(self, run: RunDirectory) -> bool:
        """Whether tasks of it are left that have not finished, and that nobody works on or will."""
        unfinished = [task for task in range(run.num_tasks) if (run.result(task) or {}).get("status") != "finished"]
        waiting = backlog.tasks_of(run)
        return any(task not in waiting and not self._is_active(run, task) for task in unfinished)

    def _is_active(self, run: RunDirectory, task: int) -> bool:
        if looks_held(run.task_directory(task) / "lock.json"):
            return True
        identity, executor = run.job_of_task(task), run.job()["executor"]
        if identity is None:
            return False
        return is_local_job(int(identity)) if executor == "local" else executor == "slurm" and identity in self._queue()

    def _queue(self) -> set[str]:
        if self._queued is None:
            self._queued = {job.id for job in slurm_queries.my_jobs_if_any() or [] if not job.is_final}
        return self._queued
