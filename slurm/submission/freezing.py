"""Freezes runs: a configuration, the code, the environment and the inputs, as they are now, into a run directory.

Several configurations are a chain. A run waits for those before it whose outputs it reads, or whose run it names; what
it reads from them is bound to those very runs. A stage whose output stands there already, made by the same settings from
the same inputs, is skipped.
"""

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipeline import records
from pipeline.config import yaml_file
from pipeline.config.errors import UserError, broken_link
from pipeline.config.resources import Resources
from pipeline.config.schema import Config
from pipeline.config.site_file import Site
from pipeline.config.stage import StageConfig
from pipeline.model_files import HashFile
from slurm.record import environment, run_directory, run_inputs, snapshot
from slurm.record.activity import writer_of
from slurm.record.known_hashes import KnownHashes
from slurm.record.printable import print
from slurm.record.run_directory import SETUP, RunDirectory

C = TypeVar("C", bound=Config)

CODE_STORE = ".code"
"""Directory under the root of runs that keeps each frozen file once."""


class Planned(NamedTuple):
    """One configuration of a chain: frozen as `run`, or skipped because of `skipped`."""

    config: StageConfig
    run: RunDirectory | None
    skipped: str | None
    after: list[RunDirectory]


class Freezer:
    """Freezes the configurations of one command, so that all get the same code and environment."""

    def __init__(self, site: Site, *, executor: str, command: Sequence[str] | None = None) -> None:
        self.site = site
        self.executor = executor
        self.command = list(command or ["crosscoder", *sys.argv[1:]])
        self.hash_file = KnownHashes(site.runs.absolute()).hash_file
        self._environment: dict[str, Any] | None = None
        self._told: set[str] = set()

    def freeze(
        self,
        config: StageConfig,
        *,
        where: str,
        pending: dict[str, Path] | None = None,
        after: Sequence[RunDirectory] = (),
        code_of: RunDirectory | None = None,
        cluster: str | None = None,
    ) -> RunDirectory:
        """A new run directory, complete; nothing stays of it if an error is raised.

        pending : for each field whose input doesn't exist yet, the run that will make it.
        code_of : take the code of this run instead of the code that is running; what both read has to be what it was.
        """
        before = code_of.inputs() if code_of is not None else {}
        inputs = run_inputs.describe_all(config, pending or {}, where, hash_file=self.hash_file, before=before)
        if code_of is not None:
            run_inputs.check_unchanged(before, inputs, code_of.reference)
        check_outputs(config, where)
        self._check_alone(config, where)
        run = run_directory.create(self.site.runs, config.stage, config.name)
        try:
            self._write(run, config, inputs, after, code_of, cluster)
        except BaseException:
            snapshot.remove(run.path)
            raise
        return run

    def _check_alone(self, config: StageConfig, where: str) -> None:
        """Two runs that write one data set at once would only be in each other's way."""
        other = writer_of(config.outputs().values(), self.site.runs, config.stage)
        if other is not None:
            raise UserError(
                f"{where}: {other.reference} is queued or being worked on (job {other.job_of_task(0)}) and writes the same output; wait "
                "for it, cancel it first, or choose another output"
            )

    def _write(
        self,
        run: RunDirectory,
        config: StageConfig,
        inputs: dict[str, Any],
        after: Sequence[RunDirectory],
        code_of: RunDirectory | None,
        cluster: str | None,
    ) -> None:
        code = self.write_surroundings(run, code_of)
        config_hash = write_config(run.path, config.resolved(), inputs)
        job = self.job_record(run, config.stage, config.name, config.resources, after, cluster)
        run.write_job(job | {"config_hash": config_hash, "code_hash": code["hash"]})

    def write_surroundings(self, run: RunDirectory, code_of: RunDirectory | None = None) -> dict[str, Any]:
        """Freezes code and environment into `run` and gives code.json."""
        store = self.site.runs / CODE_STORE
        if self._environment is None:
            self._environment = environment.describe()
        records.write_json(run.path / "environment.json", self._environment)
        records.write_json(run.path / SETUP, self.site.setup, mode=0o600)
        if code_of is not None:
            return snapshot.freeze_again(code_of.path, run.path, store)
        code = snapshot.freeze(snapshot.source_root(), run.path, store)
        self._tell_left_out(code["left_out"])
        return code

    def _tell_left_out(self, left_out: dict[str, str]) -> None:
        """Names on stderr what of the code is not frozen; once, however many runs a command freezes."""
        if news := {name: reason for name, reason in left_out.items() if name not in self._told}:
            print(f"crosscoder: not frozen with the code, so not there in the job: {snapshot.in_words(news)}", file=sys.stderr)
        self._told |= set(news)

    def job_record(
        self, run: RunDirectory, stage: str, name: str, resources: Resources, after: Sequence[RunDirectory], cluster: str | None
    ) -> dict[str, Any]:
        """job.json of a run that is not queued yet, but for the hashes."""
        return {
            "format": "job/1",
            "id": run.id,
            "stage": stage,
            "name": name,
            "executor": self.executor,
            "cluster": cluster or socket.gethostname(),
            "submitted": time.time(),
            "submitted_by": f"{environment.user_name()}@{socket.gethostname()}",
            "submitted_from": os.getcwd(),
            "command": self.command,
            "resources": resources.resolved(),
            "num_tasks": resources.array_tasks,
            "after": [str(parent.path) for parent in after],
            "jobs": [],
            "changes": [],
        }

    # -- chains -----------------------------------------------------------------------------------------------------

    def plan(
        self,
        configs: Sequence[tuple[str, StageConfig]],
        *,
        after: Sequence[RunDirectory] = (),
        again: bool = False,
        cluster: str | None = None,
    ) -> list[Planned]:
        """Freezes a chain, in its order; a run's parents are those before it, or in `after`, that make what it reads.

        again : do what has been done already once more, rather than skip it.
        Raises `UserError`, and leaves nothing frozen, if any of the configurations can't be run.
        """
        makers = [(run, outputs_of(run)) for run in after]
        planned: list[Planned] = []
        try:
            for where, config in configs:
                planned.append(self._plan_one(config, where, makers, list(after), again, cluster))
        except BaseException:
            for item in planned:
                if item.run is not None:
                    snapshot.remove(item.run.path)
            raise
        return planned

    def _plan_one(
        self,
        config: StageConfig,
        where: str,
        makers: list[tuple[RunDirectory, list[Path]]],
        after: list[RunDirectory],
        again: bool,
        cluster: str | None,
    ) -> Planned:
        pending = {field: run.path for field, path in config.inputs().items() if (run := _maker(path, makers, self.site.runs))}
        config = bind_runs(config, pending, self.site.runs)
        if not pending and not again and (reason := already_made(config, self.site.runs, self.hash_file)):
            return Planned(config, None, reason, [])
        parents = [*after, *(RunDirectory(path) for path in dict.fromkeys(pending.values()) if RunDirectory(path) not in after)]
        run = self.freeze(config, where=where, pending=pending, after=parents, cluster=cluster)
        makers.append((run, [path.absolute() for path in config.outputs().values()]))
        return Planned(config, run, None, parents)


def check_outputs(config: StageConfig, where: str) -> None:
    """Raises `UserError` for an output that can't be written: a directory that may not be, a file or a broken link in its place."""
    for path in config.outputs().values():
        there = next(parent for parent in (path, *path.parents) if parent.exists() or parent.is_symlink())
        if (broken := broken_link(there)) is not None:
            raise UserError(f"{where}: output is {path}, but {broken}; make what it leads to, or choose another output")
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UserError(f"{where}: output is {path}, but {there} is not a directory that you may write to; choose another output")


def write_config(directory: Path, values: dict[str, Any], inputs: dict[str, Any]) -> str:
    """Writes config.yaml and inputs.json and gives the hash of the former."""
    with records.atomic_file(directory / "config.yaml") as file:
        file.write(yaml_file.write(values).encode())
    records.write_json(directory / "inputs.json", inputs)
    return records.hash_file(directory / "config.yaml")


def outputs_of(run: RunDirectory) -> list[Path]:
    """The data sets that a frozen run writes."""
    return [path.absolute() for path in run.config().outputs().values()] if run.stage != "sweep" else []


def _maker(path: Path, makers: list[tuple[RunDirectory, list[Path]]], runs: Path) -> RunDirectory | None:
    """The last of `makers` that writes `path` or a directory above it, or that is the run which `path` names."""
    for run, outputs in reversed(makers):
        if path.is_relative_to(run.path) or path == run.path.parent:
            return run
        if any(path == output or path.is_relative_to(output) for output in outputs):
            return run
    return None


def bind_runs(config: StageConfig, pending: dict[str, Path], runs: Path) -> StageConfig:
    """The configuration with `{runs}/train/demo`, a run's name, replaced by one run: the pending one, else the newest finished.

    Raises `UserError` where no run of that name has finished.
    """
    for field, path in config.inputs().items():
        if not path.is_relative_to(runs) or len(path.relative_to(runs).parts) != 2:
            continue
        stage, name = path.relative_to(runs).parts
        if field in pending:
            config = replace_path(config, path, pending[field])
            continue
        newest = run_directory.newest_finished(runs, stage, name)
        if newest is None:
            raise UserError(f"{field} is {path}, but no run of {stage}/{name} has finished; run it first, or submit both in one chain")
        config = replace_path(config, path, newest.path)
    return config


def replace_path(config: C, old: Path, new: Path) -> C:
    """`config` with every field that holds the path `old` set to `new`, nested groups and lists included."""
    update: dict[str, Any] = {}
    for key in type(config).model_fields:
        value = getattr(config, key)
        if isinstance(value, Path) and value == old:
            update[key] = new
        elif isinstance(value, list) and old in value:
            update[key] = [new if item == old else item for item in value]
        elif isinstance(value, Config):
            update[key] = replace_path(value, old, new)
    return config.model_copy(update=update)


def already_made(config: StageConfig, runs: Path, hash_file: HashFile = records.hash_file) -> str | None:
    """Why the stage need not run: all its outputs are sealed and whole, and their recipes are its settings and inputs; else None.

    A recipe holds the identity of data sets and of language models. Source files have none, nor have a tokenizer and a model with
    weights drawn at random before they are loaded: for them a finished run must have read what is there now.
    """
    outputs = list(config.outputs().values())
    recipes = [_recipes(directory) for directory in outputs]
    if not outputs or not all(recipes):
        return None
    now = run_inputs.describe_all(config, {}, config.name, hash_file=hash_file)
    if not all(_matches(path, config, now) for found in recipes for path in found):
        return None
    if any("data_id" not in entry for entry in now.values()) and not _was_run(config, now, runs):
        return None
    return (
        ", ".join(map(str, outputs)) + (" is" if len(outputs) == 1 else " are") + " there, made by the same settings from the same inputs"
    )


def _matches(recipe_path: Path, config: StageConfig, now: dict[str, Any]) -> bool:
    try:
        recipe = records.read_recipe(recipe_path.parent)
    except UserError:  # the look ahead names it
        return False
    made_from = recipe.get("inputs", {})
    return (
        recipe.get("stage") == config.stage
        and recipe.get("settings") == config.identity()
        and all(made_from.get(field) == entry["data_id"] for field, entry in now.items() if "data_id" in entry)
        and _is_whole(recipe_path.parent)
    )


def _is_whole(directory: Path) -> bool:
    """Whether the data set is sealed and every shard of it there; by sizes, not by hashes, which would take minutes."""
    try:
        records.read_data_set(directory, None, None)
    except UserError:
        return False
    return True


def _was_run(config: StageConfig, now: dict[str, Any], runs: Path) -> bool:
    """Whether a finished run of the same settings read what is there now."""
    identity = config.identity()

    def same(run: RunDirectory) -> bool:
        try:
            read = run.inputs()
            return all(run_inputs.was_read(entry, read.get(f, {})) for f, entry in now.items()) and run.config().identity() == identity
        except UserError:  # a damaged record says nothing
            return False

    return any(same(run) for run in reversed(run_directory.list_runs(runs, config.stage)) if run.state() == "finished")


def _recipes(directory: Path) -> list[Path]:
    return sorted([*directory.glob(records.RECIPE), *directory.glob(f"*/{records.RECIPE}")])
