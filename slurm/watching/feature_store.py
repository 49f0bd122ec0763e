"""Reads the feature store of a run of `features` (its format is in `pipeline.features.store`), a few features at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record.run_directory import RunDirectory, list_runs
from slurm.record.run_reference import find

SET_FORMAT, SHARD_FORMAT = "feature-store/1", "feature-store-shard/1"

Row = dict[str, Any]


class FeatureStore:
    """A whole feature store. Made by `open`."""

    def __init__(self, directory: Path, manifest: records.Record) -> None:
        self.directory = directory
        self.data_id: str = manifest["data_id"]
        self.num_features: int = manifest["features"]
        self.num_positions: int = manifest["positions"]
        self.layers: list[str] = manifest["layers"]
        self._features_a_group: int = manifest["features_a_group"]
        self._groups: dict[str, tuple[int, Any]] = {}

    @classmethod
    def open(cls, directory: Path) -> "FeatureStore":
        """The store in `directory`, its files rehashed (a gigabyte takes a second); `UserError` names what is wrong."""
        manifest, shards = records.read_data_set(directory, SET_FORMAT, SHARD_FORMAT)
        for stem, record in shards.items():
            records.check_hashes(directory, stem, record)
        return cls(directory, manifest)

    def table(self, columns: Sequence[str]) -> list[Row]:
        """These columns of every feature."""
        rows: list[Row] = self._file("features").read(columns=list(columns)).to_pylist()
        return rows

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """These columns of every feature, each as a list."""
        found: dict[str, list[Any]] = self._file("features").read(columns=list(names)).to_pydict()
        return found

    def features(self, wanted: Sequence[int]) -> list[Row]:
        """All that is known of these features. Raises `UserError` for one that there is not."""
        for feature in wanted:
            if not 0 <= feature < self.num_features:
                raise UserError(f"feature {feature} of {self.directory}: there are features 0 to {self.num_features - 1:,}")
        return [row for feature in wanted for row in self._rows_of("features", feature)]

    def contexts(self, feature: int) -> list[Row]:
        """The firings kept of a feature: the strongest, then its sample from the weakest on."""
        return self._rows_of("contexts", feature)

    def _rows_of(self, name: str, feature: int) -> list[Row]:
        import numpy as np

        group = feature // self._features_a_group
        if self._groups.get(name, (None,))[0] != group:  # features that follow one another are read together
            self._groups[name] = (group, self._file(name).read_row_group(group))
        table = self._groups[name][1]
        first, last = np.searchsorted(table.column("feature").to_numpy(), [feature, feature + 1])
        rows: list[Row] = table.slice(int(first), int(last - first)).to_pylist()
        return rows

    def _file(self, name: str) -> Any:
        import pyarrow.parquet  # here: it takes a fifth of a second, which other commands do without

        return pyarrow.parquet.ParquetFile(self.directory / f"{name}.parquet")


def find_store(reference: str, runs: Path) -> FeatureStore:
    """The store of a run of `features`, or the newest made of a run of `train` (or of one of its checkpoints)."""
    run, task = find(reference, runs)
    if run.stage != "features":
        trained = run.path if task is None else run.task_directory(task)
        made = newest_of("features", trained, runs)
        if made is None:
            name = run.reference if task is None else f"{run.reference}/tasks/{task}"
            raise UserError(
                f"no finished run of features has read {name}; submit one: a configuration of the stage features "
                f"(configs/demo/features.yaml is one) with crosscoder={name}"
            )
        run = made
    elif run.state() != "finished":
        raise UserError(f"{run.reference} is {run.state()}: it has no feature store yet; `crosscoder jobs` shows how it goes")
    return FeatureStore.open(run.path / "features")


def newest_of(stage: str, trained: Path, runs: Path) -> RunDirectory | None:
    """The newest finished run of `stage` that has read the crosscoder of the run directory `trained`, or one of its checkpoints."""
    return newest_by_crosscoder(stage, runs).get(trained)


def newest_by_crosscoder(stage: str, runs: Path) -> dict[Path, RunDirectory]:
    """By the task directory of each crosscoder that was read, the newest finished run of `stage` that has read it or a checkpoint of it."""
    found: dict[Path, RunDirectory] = {}
    for run in _runs_of(stage, runs):
        trained = crosscoder_directory(run)
        if trained is None or run.state() != "finished":
            continue
        if trained not in found or run.submitted >= found[trained].submitted:
            found[trained] = run
    return found


def _runs_of(stage: str, runs: Path) -> Iterator[RunDirectory]:
    """The runs of the stage, and the tasks of sweeps of it."""
    yield from list_runs(runs, stage)
    for sweep in list_runs(runs, "sweep"):
        if sweep.num_tasks and sweep.record_of_task(0).stage == stage:  # all tasks of a sweep are of one
            yield from map(sweep.record_of_task, range(sweep.num_tasks))


def crosscoder_directory(run: RunDirectory) -> Path | None:
    """The task directory in which the crosscoder was trained that a run was given; None of one that reads no crosscoder."""
    named = run.inputs().get("crosscoder", {}).get("path")
    if named is None:
        return None
    path = Path(str(named))
    return next((parent.parent for parent in path.parents if parent.name == "checkpoints"), path)
