"""Rehashes what lies on disk against its records, and names what is damaged."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record import run_inputs, seal, snapshot
from slurm.record.run_directory import RunDirectory
from slurm.record.run_reference import find


class Verified(NamedTuple):
    """What a check came to."""

    checked: list[str]
    """The data sets or the run; of a run also what could not be checked."""
    damages: list[str]
    """A sentence for each."""
    is_all: bool
    """Whether all that was written could be checked, so that what has no damage is whole."""


def verify(reference: str, runs: Path) -> Verified:
    """Checks the data sets or the run that `reference` names.

    A directory that holds data sets (`tokens/demo`, with `train` and `validation`) stands for all of them.
    """
    path = Path(reference).expanduser().absolute()
    if path.is_dir() and not (path / "job.json").exists():
        sets = sorted({manifest.parent for pattern in (records.MANIFEST, f"*/{records.MANIFEST}") for manifest in path.glob(pattern)})
        if sets:
            damages = [damage for directory in sets for damage in records.verify(directory)]
            return Verified([f"data set {directory}" for directory in sets], damages, is_all=True)
        if not path.is_relative_to(runs):
            raise UserError(f"{path} is neither a finished data set ({records.MANIFEST}) nor a run (job.json); {_contents(path)}")
    try:
        run = find(reference, runs).whole("verify")
    except UserError:
        if path.exists() or path.is_relative_to(runs) or "/" not in reference.strip("/") or not path.parent.is_dir():
            raise
        raise UserError(
            f"no run is called {reference!r} under {runs}, and {path} does not exist; {_contents(path.parent, path.name)}"
        ) from None
    standings = [_standing(run, task) for task in range(run.num_tasks)]
    is_all = not {"not finished", "finished before seals"} & set(standings)
    return Verified([_checked(run, standings)], verify_run(run), is_all)


def _contents(directory: Path, name: str = "", most: int = 8) -> str:
    """What there is in `directory`; of names like `name` the nearest."""
    names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    if near := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {directory / near[0]}?"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{directory} holds {', '.join(names[:most])}{more}" if names else f"{directory} is empty"


def _checked(run: RunDirectory, standings: Sequence[str]) -> str:
    """The run, and what of it could not be checked."""
    states = [run.task_state(task) for task, standing in enumerate(standings) if standing == "not finished"]
    unfinished, unsealed = len(states), standings.count("finished before seals")
    which = "it" if run.num_tasks == 1 else "{} of its tasks"
    said = f"run {run.path}"
    if unfinished:
        counted = [state if run.num_tasks == 1 else f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        said += f"; {which.format(unfinished)} did not finish ({', '.join(counted)})"
        said += ", so only what was frozen and read, and checkpoints, could be checked"
    if unsealed:
        said += f"; {which.format(unsealed)} finished before runs were sealed, so results, metrics and figures could not be checked"
    if sets := _data_sets_read(run):
        commands = [f"`crosscoder verify {path}`" for path in sets[:3]] + ([f"{len(sets) - 3} more"] if len(sets) > 3 else [])
        said += f"; of the data that it read only the id was compared: {', '.join(commands)} would rehash it"
    return said


def _data_sets_read(run: RunDirectory) -> list[str]:
    """Where the data sets lie that the run's tasks read, one name each."""
    entries = [entry for task in range(run.num_tasks) for entry in _entries(run.task_directory(task) / "inputs.json")]
    return list(dict.fromkeys(entry["path"] for entry in entries if entry.get("kind") in ("data set", "checkpoint")))


def _entries(path: Path) -> list[run_inputs.Entry]:
    return [] if _unreadable(path) or not path.exists() else list(records.read_json(path).values())


def _standing(run: RunDirectory, task: int) -> str:
    """sealed, not sealed, result missing, finished before seals, or not finished."""
    if seal.is_there(run, task):
        return "sealed"
    result = run.result(task)
    if result is None and run.last_ending(task) == "finished":
        return "result missing"
    if result is None or result["status"] != "finished":
        return "not finished"
    return "not sealed" if "seal" in result else "finished before seals"


def verify_run(run: RunDirectory) -> list[str]:
    """Damages to the frozen code and configuration, to the inputs since the run read them, and to what each task left."""
    damages = _code_damages(run)
    for record in dict.fromkeys([run, *(run.record_of_task(task) for task in range(run.num_tasks))]):
        damages += _config_damages(record)
    for task in range(run.num_tasks):
        damages += _task_damages(run, task)
    return list(dict.fromkeys(damages))


def _code_damages(run: RunDirectory) -> list[str]:
    try:
        changed = [phrase.partition(" ") for phrase in snapshot.differences(run.path)]
        recorded = snapshot.tree_hash(records.read_json(run.path / "code.json")["files"])
    except UserError as error:
        return [str(error)]
    damages = [f"{run.code / name} {what} since it was frozen" for name, _, what in changed]
    return damages + ([f"{run.path / 'code.json'} was changed since it was frozen"] if recorded != run.job()["code_hash"] else [])


def _config_damages(record: RunDirectory) -> list[str]:
    path = record.path / "config.yaml"
    if not path.exists():
        return [f"{path} is missing"]
    return [f"{path} was changed since it was frozen"] if records.hash_file(path) != record.job()["config_hash"] else []


def _task_damages(run: RunDirectory, task: int) -> list[str]:
    directory, standing = run.task_directory(task), _standing(run, task)
    damages, compared = seal.check(run, task) if standing == "sealed" else ([], set[str]())
    if standing == "not sealed":
        damages = [f"{directory} finished, but is not sealed: {seal.SEAL} is missing, so what it left can't be checked; restore that file"]
    if standing == "result missing":
        told = f"{directory / 'attempts.jsonl'} says that the task finished, but result.json and {seal.SEAL} are missing"
        damages = [f"{told}; restore them, or do it again with `crosscoder submit --resume {run.reference}`"]
    if "result.json" not in compared:
        damages += _unreadable(directory / "result.json")
    damages += _input_damages(directory / "inputs.json")
    for folder in ("checkpoints", "history"):
        for checkpoint in sorted((directory / folder).glob("*")):
            if not checkpoint.name.startswith(".") and f"{folder}/{checkpoint.name}/{records.MANIFEST}" not in compared:
                damages += _checkpoint_damages(checkpoint)
    return damages


def _unreadable(path: Path) -> list[str]:
    try:
        return (
            [] if not path.exists() or isinstance(records.read_json(path), dict) else [f"{path} holds no JSON object: the file is damaged"]
        )
    except UserError as error:
        return [str(error)]


def _input_damages(path: Path) -> list[str]:
    damages = _unreadable(path)
    if damages or not path.exists():
        return damages
    entries: dict[str, run_inputs.Entry] = records.read_json(path)
    for field, entry in entries.items():
        if entry.get("kind") == "pending":
            continue
        try:
            run_inputs.check_all({field: entry})
        except UserError as error:
            damages.append(str(error))
    return damages


def _checkpoint_damages(checkpoint: Path) -> list[str]:
    try:
        return records.verify(checkpoint)
    except UserError as error:
        return [str(error)]
