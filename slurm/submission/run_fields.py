"""A run that a configuration names (`crosscoder: 1042_3`) becomes its directory; `train/demo` stays, a chain may be about to make it."""

from pathlib import Path
from typing import Any

from pipeline.config.errors import UserError
from pipeline.config.schema import RUN
from pipeline.config.stage import StageConfig
from slurm.record.run_reference import find


def with_runs_found(config: StageConfig, runs: Path, where: str) -> StageConfig:
    """`config` with the directory of each run or task that it names by an id, a job id, or as a task.

    Raises `UserError` for a name that no run has, and for a run of several tasks: one of them is meant.
    """
    update: dict[str, Any] = {}
    for key, field in type(config).model_fields.items():
        value = getattr(config, key)
        if field.json_schema_extra != RUN:
            continue
        if isinstance(value, list):
            update[key] = [_found(path, runs, f"{where}: {key}[{number}]") for number, path in enumerate(value)]
        else:
            update[key] = _found(value, runs, f"{where}: {key}")
    return config.model_copy(update=update)


def _found(path: Path, runs: Path, where: str) -> Path:
    if not path.is_relative_to(runs):
        return path
    is_inside_a_run = path.exists() and not (path / "job.json").exists()  # a checkpoint, or the folder of a name
    parts = path.relative_to(runs).parts
    is_name = len(parts) == 2 and parts[0] != "sweep"  # of a sweep one task is meant, whose name says which
    return path if is_name or (is_inside_a_run and len(parts) > 2) else _directory("/".join(parts), runs, where)


def _directory(reference: str, runs: Path, where: str) -> Path:
    try:
        named = find(reference, runs)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if len(named.tasks) > 1:
        last = named.run.num_tasks - 1
        raise UserError(f"{where} is {named.reference}, which has tasks 0 to {last}; name one: {named.reference}/tasks/0")
    return named.run.path if named.task is None else named.run.task_directory(named.task)
