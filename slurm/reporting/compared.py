"""Several trained crosscoders side by side: the same measure of each, and which of them none other beats in both sparsity and fidelity."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.errors import UserError
from slurm.record.comparison import flatten
from slurm.record.run_directory import Json
from slurm.record.run_reference import Named, find
from slurm.reporting.subject import Subject, made_of_crosscoders, subject_of
from slurm.submission.sweep_results import is_number, short_names, varied_fields

LEFT_OUT = ("name", "resources", "stage")
"""Settings that make no crosscoder another one."""
MOST_FIELDS = 6


class Measure(NamedTuple):
    """Where the numbers come from that all are compared by."""

    phrase: str
    l0: str
    explained: str
    cost: str | None = None


EVALUATION = Measure("measured by their evaluations", "l0", "explained_variance", "cross_entropy_difference")
MEASURES = (
    EVALUATION,
    Measure("measured on held-out positions at the end of training", "held_out_l0", "held_out_explained_variance"),
    Measure("measured at the end of training, on what they were trained on", "l0", "explained_variance"),
)
"""The surer first."""


class Member(NamedTuple):
    """One of the crosscoders."""

    label: str
    subject: Subject
    state: str
    varied: Json
    """What sets it apart, by short names."""


class Point(NamedTuple):
    """What it is compared by; None is not known."""

    l0: float | None
    explained: float | None
    cost: float | None


def gather(references: Sequence[str], runs: Path) -> list[Member]:
    """The crosscoders that are named, the tasks of a sweep one by one. Raises `UserError` for one that is named twice."""
    subjects: list[Subject] = []
    fields: list[Json] = []
    made = made_of_crosscoders(runs, stages=["evaluate"])
    for reference in references:
        named = find(reference, runs)
        if named.run.stage == "sweep" and named.task is None:
            members = named.run.config_values()["members"]
            for task, member in enumerate(members):
                subjects.append(subject_of(Named(named.run, task), runs, made))
                fields.append({name: member.get(name) for name in varied_fields(members)})
        else:
            subjects.append(subject_of(named, runs, made))
            fields.append({})
    _check_distinct(subjects)
    if not all(fields):
        fields = _differing([subject.config for subject in subjects])
    names = short_names(list(dict.fromkeys(name for row in fields for name in row)))
    varied = [{names[name]: value for name, value in row.items()} for row in fields]
    is_one_sweep = len(references) == 1
    return [
        Member(_label(subject, is_one_sweep=is_one_sweep), subject, subject.named.run.task_state(subject.named.task or 0), row)
        for subject, row in zip(subjects, varied, strict=True)
    ]


def _check_distinct(subjects: Sequence[Subject]) -> None:
    seen: set[Path] = set()
    for subject in subjects:
        if subject.directory in seen:
            raise UserError(f"{subject.named.reference} is named twice; name each crosscoder once")
        seen.add(subject.directory)


def _differing(configs: Sequence[Json]) -> list[Json]:
    """Of each configuration the settings that are not the same in all."""
    flat = [{name: value for name, value in flatten(config).items() if name.partition(".")[0] not in LEFT_OUT} for config in configs]
    names = list(dict.fromkeys(name for row in flat for name in row))
    differing = [name for name in names if len({repr(row.get(name)) for row in flat}) > 1]
    return [{name: row.get(name) for name in differing[:MOST_FIELDS]} for row in flat]


def _label(subject: Subject, *, is_one_sweep: bool) -> str:
    named = subject.named
    if is_one_sweep and named.task is not None:
        return f"task {named.task}"
    run = f"{named.run.path.parent.name} {named.run.id[-4:]}"
    return run if named.task is None else f"{run} task {named.task}"


def measure_of(members: Sequence[Member]) -> Measure:
    """The surest measure that two of them have, else the one that any has: figures of two kinds can't be compared."""

    def num_known(measure: Measure) -> int:
        return sum(point_of(member.subject, measure).explained is not None for member in members)

    return max(MEASURES, key=lambda measure: min(num_known(measure), 2))


def point_of(subject: Subject, measure: Measure) -> Point:
    """The numbers of one crosscoder."""
    evaluation = {} if subject.evaluation is None else subject.evaluation.headline
    source = evaluation if measure is EVALUATION else subject.result

    def number(name: str | None) -> float | None:
        value = None if name is None else source.get(name)
        return float(value) if value is not None and is_number(value) else None

    return Point(number(measure.l0), number(measure.explained), number(measure.cost))


def front(points: Sequence[tuple[float | None, float | None]]) -> set[int]:
    """Places of the points that no other one beats: of none is the first number as low and the second as high, and one of them better."""
    known = [(first, -second, place) for place, (first, second) in enumerate(points) if first is not None and second is not None]
    best, chosen = float("inf"), set()
    last: tuple[float, float] | None = None
    for first, negative, place in sorted(known):
        if negative < best or (first, negative) == last:
            chosen.add(place)
            best, last = negative, (first, negative)
    return chosen


def cautions(members: Sequence[Member], measure: Measure) -> list[str]:
    """A sentence for each way in which what was measured is not the same for all."""
    if measure is not EVALUATION:
        return []
    known = [member.subject.evaluation.metrics for member in members if member.subject.evaluation is not None]
    kinds: dict[str, Any] = {
        "different held-out texts": lambda metrics: metrics.get("inputs", {}).get("tokens"),
        "different numbers of held-out positions": lambda metrics: metrics["held_out"]["positions"],
        "different language models": lambda metrics: metrics.get("inputs", {}).get("language_model"),
        "different layers": lambda metrics: metrics["layers"],
    }
    found = [phrase for phrase, of in kinds.items() if len({repr(of(metrics)) for metrics in known}) > 1]
    return [f"Beware: they were measured on {phrase}, so that their figures can hardly be compared." for phrase in found]
