"""What makes Python run a run's frozen code, and whether these commands can start it."""

import os
from pathlib import Path

from pipeline.config.errors import UserError
from slurm.record.run_directory import RunDirectory

STARTED_BY_NAME = ("start_with_signals_kept.py", "frozen_task.py", "local_queue.py", "worker.py")
"""Files of slurm/execution/ that a submission names: the code of today submits, the frozen code runs."""


def frozen_variables(run: RunDirectory) -> dict[str, str]:
    """What makes Python import the frozen code, an editable install and the current directory notwithstanding.

    PYTHONSAFEPATH keeps the current directory out of `sys.path`, where it would come before PYTHONPATH.
    """
    if os.pathsep in str(run.code):
        raise UserError(f"{run.code} has a {os.pathsep} in its path, where PYTHONPATH would end it; use a root of runs without")
    others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and not (Path(part) / "pipeline").is_dir()]
    return {"PYTHONPATH": os.pathsep.join([str(run.code), *others]), "PYTHONSAFEPATH": "1"}


def check_startable(run: RunDirectory) -> None:
    """Raises `UserError` if the run's frozen code lacks a file by whose name today's code would start it."""
    folder = run.code / "slurm" / "execution"
    missing = [name for name in STARTED_BY_NAME if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{run.reference} was frozen with another version of this code, which has no slurm/execution/{missing[0]}: today's commands "
            "can't start it; go on from a checkout of its own version (code.json names the commit), or submit its config.yaml as a new run"
        )
