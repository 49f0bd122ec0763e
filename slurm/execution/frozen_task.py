"""A task as submitit pickles it."""

import importlib
from pathlib import Path
from typing import Any


class FrozenTask:
    """Two plain values, so that what runs is decided by the run directory alone.

    The worker is named rather than imported: it is the frozen one that runs, in the job's process.
    """

    def __init__(self, directory: str, task: int) -> None:
        self.directory = directory
        self.task = task

    def __call__(self) -> None:
        """Runs the task in this job's process. Ends the process unless it finished: submitit's result means nothing here."""
        code = importlib.import_module("slurm.execution.worker").work_logged(Path(self.directory), self.task)
        if code:
            raise SystemExit(code)

    def checkpoint(self) -> Any:
        """What submitit queues again where it, rather than the worker, sees the signal: the same task."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
