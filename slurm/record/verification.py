"""Rehashes what lies on disk against its records, and names what is damaged."""

import difflib
from pathlib import Path

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record import run_inputs, snapshot
from slurm.record.run_directory import RunDirectory, find


def verify(reference: str, runs: Path) -> tuple[list[str], list[str]]:
    """What was checked, and a sentence for each damage found, in the data sets or the run that `reference` names.

    A directory that holds data sets (`tokens/demo`, with `train` and `validation`) stands for all of them.
    """
    path = Path(reference).expanduser().absolute()
    if path.is_dir() and not (path / "job.json").exists():
        sets = sorted({manifest.parent for pattern in (records.MANIFEST, f"*/{records.MANIFEST}") for manifest in path.glob(pattern)})
        if sets:
            return [f"data set {directory}" for directory in sets], [damage for directory in sets for damage in records.verify(directory)]
        if not path.is_relative_to(runs):
            raise UserError(f"{path} is neither a finished data set ({records.MANIFEST}) nor a run (job.json); {_contents(path)}")
    try:
        run = find(reference, runs)
    except UserError:
        if path.exists() or path.is_relative_to(runs) or "/" not in reference.strip("/") or not path.parent.is_dir():
            raise
        raise UserError(
            f"no run is called {reference!r} under {runs}, and {path} does not exist; {_contents(path.parent, path.name)}"
        ) from None
    return [f"run {run.path}"], verify_run(run)


def _contents(directory: Path, name: str = "", most: int = 8) -> str:
    """What there is in `directory`; of names like `name` the nearest."""
    names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    if near := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {directory / near[0]}?"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{directory} holds {', '.join(names[:most])}{more}" if names else f"{directory} is empty"


def verify_run(run: RunDirectory) -> list[str]:
    """Damages to the frozen code and configuration, to the inputs since the run read them, and to the checkpoints."""
    changed = [phrase.partition(" ") for phrase in snapshot.differences(run.path)]
    damages = [f"{run.code / name} {what} since it was frozen" for name, _, what in changed]
    if records.hash_file(run.path / "config.yaml") != run.job()["config_hash"]:
        damages.append(f"{run.path / 'config.yaml'} was changed since it was frozen")
    for directory in (run.task_directory(task) for task in range(run.num_tasks)):
        inputs = directory / "inputs.json"
        if inputs.exists():
            damages += _input_damages(dict(records.read_json(inputs)))
        for checkpoint in sorted((directory / "checkpoints").glob("*")):
            if not checkpoint.name.startswith("."):
                damages += _checkpoint_damages(checkpoint)
    return list(dict.fromkeys(damages))


def _input_damages(entries: dict[str, run_inputs.Entry]) -> list[str]:
    damages = []
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
