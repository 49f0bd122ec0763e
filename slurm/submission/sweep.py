"""A sweep: one configuration with some fields varied, one array, a directory a task.

    name: sparsity
    base: ../demo/train.yaml            relative to this file; `base` may be varied itself: `grid: {base: [v1.yaml, v1a.yaml]}`
    changes: {num_tokens: 1e6}          the same in every task
    grid:                               every combination of these
      loss.l1.coefficient: [1.0, 2.0, 4.0]
      seed: [0, 1]
    zip:                                these go together: first with first, second with second
      crosscoder.num_features: [4096, 8192]
      optimizer.learning_rate: [3e-4, 1e-4]
    list:                               whole sets of changes; combined with grid and zip where those are given
      - {crosscoder.activation.kind: relu}
    metric: explained_variance          what `crosscoder results` sorts by, one of the stage's RESULT_NAMES
    maximize: true
    columns: [dead_features]            results that its table shows beside the metric, before others that differ
    max_parallel: 4

The run directory is `runs/sweep/<name>/<id>/`: config.yaml holds the above with `members`, the changes of each task; code
and environment are shared; `tasks/<i>/` has its own config.yaml, inputs.json and job.json beside what any task has.
"""

import difflib
import fnmatch
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from pipeline.config import load, yaml_file
from pipeline.config.errors import UserError
from pipeline.config.schema import Config, DataPath, PositiveCount, build
from pipeline.config.site_file import Site
from pipeline.config.stage import Name, StageConfig
from slurm.record import run_directory, run_inputs, snapshot
from slurm.record.run_directory import Json, RunDirectory
from slurm.submission.freezing import Freezer, bind_runs, write_config
from slurm.submission.run_fields import with_runs_found

BASE = "base"
"""The varied field that is no setting of the stage: the file whose settings they are."""

Values = dict[str, Any]
"""Dotted keys of the base configuration, and their values."""


class SweepConfig(Config):
    """The settings of a sweep's file."""

    name: Name
    base: DataPath | None = None
    """None where every task names a base of its own, as a varied field."""
    changes: Values = {}
    grid: dict[str, list[Any]] = {}
    zip: dict[str, list[Any]] = {}
    points: list[Values] = Field(default=[], alias="list")
    metric: str | None = None
    maximize: bool = True
    columns: list[str] = []
    max_parallel: PositiveCount | None = None


class Sweep(NamedTuple):
    """A sweep's file, read: the changes of each task, and the configuration that they make."""

    config: SweepConfig
    members: list[Values]
    stage_configs: list[StageConfig]


def read_sweep(path: Path, changes: Sequence[str], site: Site) -> Sweep:
    """The sweep in the file at `path`, with `changes` (`key=value`) to the base configuration of every task; `name=` renames the sweep.

    Raises `UserError` naming the task whose configuration is not valid.
    """
    config = build(SweepConfig, _sweep_values(path, changes), str(path))
    changes = [change for change in changes if not change.startswith("name=")]
    members = combinations(config, str(path))
    stage_configs = []
    for number, member in enumerate(members):
        values = yaml_file.read(_base_of(member, config, path))
        for key, value in (config.changes | member).items():
            if key != BASE:
                put(values, key, value, f"{path}: task {number}")
        for change in changes:
            load.set_value(values, change, where=str(path))
        where = f"{path}: task {number} ({describe(member)})"
        stage_configs.append(with_runs_found(load.from_values(values, where=where, site=site), site.runs, where))
    _check_alike(stage_configs, str(path))
    _check_results(config, members, type(stage_configs[0]), str(path))
    return Sweep(config, members, stage_configs)


def _base_of(member: Values, config: SweepConfig, path: Path) -> Path:
    """The file that a task's changes are laid over: its own, else the sweep's; relative to the sweep's file."""
    base = member.get(BASE, config.base)
    if base is None:
        raise UserError(f"{path}: base is missing; name the configuration that is varied, or one a task under grid, zip or list")
    return path.parent / Path(base).expanduser()


def _sweep_values(path: Path, changes: Sequence[str]) -> Values:
    values = yaml_file.read(path)
    if "stage" in values and "base" not in values:
        raise UserError(f"{path} is a stage's configuration ({values['stage']}), not a sweep; use `crosscoder submit {path}`")
    for change in changes:
        if change.startswith("name="):
            load.set_value(values, change, where=str(path))
    return values


def combinations(config: SweepConfig, where: str) -> list[Values]:
    """The changes of each task: every point of `list` with every row of `zip` with every combination of `grid`."""
    lengths = {key: len(values) for key, values in config.zip.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{where}: the lists under zip differ in length: {', '.join(f'{k} {n}' for k, n in lengths.items())}")
    rows = [dict(zip(config.zip, row, strict=True)) for row in zip(*config.zip.values(), strict=True)] or [{}]
    grid = [dict(zip(config.grid, values, strict=True)) for values in itertools.product(*config.grid.values())]
    members = [point | row | values for point in config.points or [{}] for row in rows for values in grid]
    if members in ([], [{}]):
        raise UserError(f"{where}: nothing is varied; give fields and their values under grid, zip or list")
    return members


def put(values: Values, key: str, value: Any, where: str) -> None:
    """Sets the dotted `key` in nested `values`."""
    *groups, last = key.split(".")
    for group in groups:
        values = values.setdefault(group, {})
        if not isinstance(values, dict):
            raise UserError(f"{where}: {key}: `{group}` is a value, not a group of settings")
    values[last] = value


def describe(member: Values) -> str:
    """A task's changes on one line."""
    return ", ".join(f"{key}={value}" for key, value in member.items())


def _check_alike(configs: Sequence[StageConfig], where: str) -> None:
    """One array has one set of resources and one program, and no two tasks may write the same data set."""
    if any(config.resources != configs[0].resources or config.stage != configs[0].stage for config in configs):
        raise UserError(f"{where}: stage and resources can't be varied in a sweep: its tasks are one array; submit two sweeps")
    if configs[0].resources.array_tasks != 1:
        raise UserError(f"{where}: the base configuration is divided into {configs[0].resources.array_tasks} tasks; a sweep needs 1")
    outputs = [path for config in configs for path in config.outputs().values()]
    if len(set(outputs)) < len(outputs):
        raise UserError(f"{where}: several tasks would write {outputs[0]}; vary the output as well")


def _check_results(config: SweepConfig, members: Sequence[Values], stage: type[StageConfig], where: str) -> None:
    """Raises `UserError` for a metric or column that no task will have: what all that was trained could not be sorted by."""
    if not (known := stage.RESULT_NAMES):
        return
    wished = {"metric": [config.metric] if config.metric is not None else [], "columns": config.columns}
    for field, names in wished.items():
        others = [key for member in members for key in member] if field == "columns" else []
        for name in names:
            if name not in others and not any(fnmatch.fnmatchcase(name, pattern) for pattern in known):
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"results are {', '.join(known)}"
                raise UserError(f"{where}: {field}: {name} is not a result of {stage.model_fields['stage'].default}; {hint}")


MAKERS = {"tokens": "tokenize", "training_tokens": "tokenize", "held_out": "tokenize", "activations": "cache", "crosscoder": "train"}
"""The stage that makes what a field names."""


def check_inputs_are_there(sweep: Sweep, path: Path, runs: Path) -> None:
    """Raises `UserError` for the first input that no task could read: a sweep waits for no stage that makes it."""
    for config, member in zip(sweep.stage_configs, sweep.members, strict=True):
        for field, place in config.inputs().items():
            if fault := _missing(place, runs):
                first = _submission_of(MAKERS[field], _base_of(member, sweep.config, path)) if field in MAKERS else "what makes it"
                raise UserError(
                    f"{path}: {config.field_of_input(field)} is {place}, {fault}; run {first} first: a sweep can't be part of a chain"
                )


def _missing(place: Path, runs: Path) -> str | None:
    is_name_of_runs = place.is_relative_to(runs) and len(place.relative_to(runs).parts) == 2
    if is_name_of_runs and run_directory.newest_finished(runs, *place.relative_to(runs).parts) is None:
        return "but no run of that name has finished"
    is_pattern = any(letter in str(place) for letter in "*?[")
    return None if place.exists() or is_pattern else "which does not exist"


def _submission_of(stage: str, base: Path) -> str:
    """The command that runs the stage; with the very file where there is one beside the base configuration."""
    file = Path(os.path.relpath(base.parent / f"{stage}.yaml"))
    return f"`crosscoder submit {file if file.exists() else file.name}`"


def freeze_sweep(sweep: Sweep, freezer: Freezer, *, where: str, cluster: str | None = None) -> RunDirectory:
    """A new run directory for the sweep, complete; nothing stays of it if an error is raised."""
    runs = freezer.site.runs
    bound = [bind_runs(config, {}, runs) for config in sweep.stage_configs]
    inputs = [run_inputs.describe_all(config, {}, where, hash_file=freezer.hash_file) for config in bound]
    run = run_directory.create(runs, "sweep", sweep.config.name)
    try:
        _write(run, sweep, bound, inputs, freezer, cluster)
    except BaseException:
        snapshot.remove(run.path)
        raise
    return run


def _write(
    run: RunDirectory, sweep: Sweep, configs: Sequence[StageConfig], inputs: Sequence[Json], freezer: Freezer, cluster: str | None
) -> None:
    code = freezer.write_surroundings(run)
    wanted = configs[0].resources.model_dump() | {"array_tasks": len(configs), "max_parallel": sweep.config.max_parallel}
    resources = type(configs[0].resources)(**wanted)
    own = sweep.config.model_dump(mode="json", by_alias=True)
    config_hash = write_config(run.path, {"stage": "sweep", **own, "members": sweep.members}, {})
    job = freezer.job_record(run, "sweep", sweep.config.name, resources, [], cluster)
    job |= {"config_hash": config_hash, "code_hash": code["hash"]}
    for task, config in enumerate(configs):
        directory = run.path / "tasks" / str(task)
        task_hash = write_config(directory, config.resolved(), inputs[task])
        record = job | {"stage": config.stage, "name": config.name, "num_tasks": 1, "config_hash": task_hash}
        RunDirectory(directory).write_job(record)
    run.write_job(job)
