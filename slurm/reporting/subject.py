"""What a report is of: a trained crosscoder, with the evaluation and the feature store that were made of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record.run_directory import Json, RunDirectory, read_lines
from slurm.record.run_reference import Named, find
from slurm.watching.feature_store import FeatureStore, crosscoder_directory, newest_by_crosscoder
from slurm.watching.generation_view import Texts

METRICS_FORMAT = "crosscoder-metrics/2"


class Evaluation(NamedTuple):
    """A finished run of `evaluate`."""

    run: RunDirectory
    metrics: Json
    """Of metrics.json."""
    headline: Json
    """The numbers by which runs are compared, of result.json."""


class Subject(NamedTuple):
    """A trained crosscoder; what nobody made of it yet is None."""

    named: Named
    config: Json
    rows: list[Json]
    """Of metrics.jsonl, oldest first."""
    result: Json
    """What training returned; empty until it has finished."""
    evaluation: Evaluation | None
    store: FeatureStore | None
    store_run: RunDirectory | None
    texts: Texts | None
    """What it wrote, and steered."""
    texts_run: RunDirectory | None

    @property
    def directory(self) -> Path:
        """The task directory that training wrote to."""
        return self.named.run.task_directory(self.named.task or 0)

    @property
    def layers(self) -> list[str]:
        """The names of the layers that it reads."""
        if self.evaluation is not None:
            return list(self.evaluation.metrics["layers"])
        return [] if self.store is None else self.store.layers


MAKERS = ("evaluate", "features", "generate")
"""Stages that read a crosscoder and make something that a page shows."""
Made = dict[str, dict[Path, RunDirectory]]
"""By stage and by the task directory of a crosscoder, the newest finished run that has read it."""


def made_of_crosscoders(runs: Path, *, stages: Sequence[str] = MAKERS) -> Made:
    """Whatever finished runs under the root `runs` have made of crosscoders."""
    return {stage: newest_by_crosscoder(stage, runs) for stage in stages}


def find_subject(reference: str, runs: Path) -> Subject:
    """The crosscoder that a run of `train`, `evaluate`, `features` or `generate` names, or a task of a sweep of these.

    The newest finished evaluation, feature store and texts are taken; those of the run that is named, where it made them.
    """
    return subject_of(find(reference, runs), runs, made_of_crosscoders(runs))


def subject_of(named: Named, runs: Path, made: Made) -> Subject:
    """The crosscoder that the run or task `named` trained or read, with what was `made` of it."""
    given = named.record
    if given.stage in MAKERS:
        _check_finished(given)
        named = _trained_by(given, runs)
        made = made | {given.stage: made.get(given.stage, {}) | {named.run.task_directory(named.task or 0): given}}
    if named.record.stage not in ("train", "import"):
        kinds = "a run of train, evaluate, features or generate, a sweep of one of these, or a task of it"
        raise UserError(f"{named.reference} trains no crosscoder; name {kinds}")
    directory = named.run.task_directory(named.task or 0)
    evaluated, stored, written = (made.get(stage, {}).get(directory) for stage in MAKERS)
    result = named.run.result(named.task or 0) or {}
    return Subject(
        named=named,
        config=named.record.config_values(),
        rows=read_lines(directory / "metrics.jsonl"),
        result=result.get("result") or {},
        evaluation=None if evaluated is None else read_evaluation(evaluated),
        store=None if stored is None else FeatureStore.open(stored.path / "features"),
        store_run=stored,
        texts=None if written is None else Texts.open(written),
        texts_run=written,
    )


def read_evaluation(run: RunDirectory) -> Evaluation:
    """Raises `UserError` for numbers of another format."""
    path = run.path / "metrics.json"
    metrics = records.read_json(path)
    if not isinstance(metrics, dict) or metrics.get("format") != METRICS_FORMAT:
        found = metrics.get("format") if isinstance(metrics, dict) else type(metrics).__name__
        raise UserError(f"{path} is of format {found!r}, this version reads {METRICS_FORMAT!r}; evaluate the crosscoder again")
    return Evaluation(run, metrics, (run.result() or {}).get("result") or {})


def _check_finished(run: RunDirectory) -> None:
    if run.state() != "finished":
        raise UserError(f"{run.reference} is {run.state()}; a report can be made of it once it has finished")


def _trained_by(run: RunDirectory, runs: Path) -> Named:
    path = crosscoder_directory(run)
    if path is None or not path.is_dir():
        raise UserError(f"{run.reference} has read the crosscoder in {path}, which is gone: there is nothing to report on")
    return find(str(path), runs)
