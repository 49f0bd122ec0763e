"""Freezes a queued run anew under the same id: other settings, same code. What stood before is kept until it is safe."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config import load, yaml_file
from pipeline.config.errors import UserError
from pipeline.config.resources import Resources
from pipeline.config.site_file import Site
from pipeline.config.stage import StageConfig
from slurm.record import run_inputs
from slurm.record.known_hashes import KnownHashes
from slurm.record.run_directory import RunDirectory
from slurm.submission.run_fields import with_runs_found

FILES = ("config.yaml", "inputs.json", "job.json")
KEEP = ".before-change"
"""Directory in the run directory that holds the record as it was, while a change is under way."""


def refreeze(run: RunDirectory, settings: Sequence[str], resources: Resources, site: Site) -> dict[str, Any]:
    """Writes the run's record with `settings` (`key=value`) and `resources` changed; gives each change as [old, new].

    Raises `UserError` for a value that is not valid, for another stage, name or number of tasks, and, once an attempt has
    begun, for a setting that decides the output: what was done so far was done with the old one.
    """
    restore(run)  # a change that was killed half-way
    keep = run.path / KEEP
    keep.mkdir()
    for name in FILES:
        shutil.copy2(run.path / name, keep / name)
    values, frozen = run.config_values(), run.config_values()
    before = run.config()
    for setting in settings:
        load.set_value(values, setting, where=run.reference)
    values["resources"] = resources.resolved()
    config = load.from_values(values, where=run.reference, site=site, frozen=frozen)
    config = with_runs_found(config, site.runs, run.reference)
    if (config.stage, config.name) != (before.stage, before.name) or resources.array_tasks != run.num_tasks:
        raise UserError(
            f"{run.reference}: stage, name and the number of tasks can't change under the same id; cancel it and submit a new run"
        )
    if config.identity() != before.identity() and any(run.attempts(task) for task in range(run.num_tasks)):
        raise UserError(
            f"{run.reference} has begun to work with its settings; `crosscoder rerun {run.reference} {' '.join(settings)}` makes a new run"
        )
    with records.atomic_file(run.path / "config.yaml") as file:
        file.write(yaml_file.write(config.resolved()).encode())
    records.write_json(run.path / "inputs.json", _inputs(run, config, site))
    job = run.job()
    changed = _differences(before.resolved() | {"resources": job["resources"]}, config.resolved())
    job |= {"config_hash": records.hash_file(run.path / "config.yaml"), "resources": resources.resolved()}
    run.write_job(job)
    return changed


def _inputs(run: RunDirectory, config: StageConfig, site: Site) -> dict[str, run_inputs.Entry]:
    """What the changed configuration reads: as it was frozen where it reads the same as before, though that has changed since."""
    read = run.inputs()
    pending = {field: Path(entry["made_by"]) for field, entry in read.items() if entry.get("kind") == "pending"}
    now = run_inputs.describe_all(config, pending, run.reference, hash_file=KnownHashes(site.runs.absolute()).hash_file)
    return {field: old if run_inputs.is_of_the_same(entry, old := read.get(field, {})) else entry for field, entry in now.items()}


def restore(run: RunDirectory) -> None:
    """Puts the record back as it was before `refreeze`."""
    keep = run.path / KEEP
    if keep.exists():
        for name in FILES:
            (keep / name).replace(run.path / name)
        keep.rmdir()


def discard(run: RunDirectory) -> None:
    """Forgets what `refreeze` kept: the change holds."""
    shutil.rmtree(run.path / KEEP)


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Each dotted key whose value differs, as [old, new]."""
    changed: dict[str, Any] = {}
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed |= _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changed[prefix + key] = [old, new]
    return changed
