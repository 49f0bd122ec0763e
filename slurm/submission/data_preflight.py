"""Looks on the login node at what stands where data are read and written: no data set, no text, or another's output.

Reads names, recipes, manifests and the first bytes of text. What is not there yet, or made by an earlier run of the chain, is
left to others.
"""

import contextlib
import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config import text_files, text_kinds
from pipeline.config.errors import UserError
from pipeline.config.stage import StageConfig
from pipeline.config.tokenize_text import TokenizeConfig
from pipeline.model_files import HashFile
from slurm.record import run_inputs
from slurm.record.comparison import flatten, shown


def is_pending(path: Path, pending: Sequence[Path]) -> bool:
    """Whether runs before this one will make what is at `path`: what stands there now is not what will be read."""
    return any(path.absolute().is_relative_to(other.absolute()) for other in pending)


def set_faults(field: str, directory: Path, pending: Sequence[Path]) -> list[str]:
    """A phrase if there is something at `directory`, but nothing that a stage has begun to make."""
    if not directory.exists() or is_pending(directory, pending):
        return []
    if any((directory / name).exists() for name in (records.MANIFEST, records.RECIPE)):
        return []
    inner = sorted(path.parent for path in directory.glob(f"*/{records.MANIFEST}")) if directory.is_dir() else []
    hint = f"name one of those in it: {', '.join(map(str, inner[:4]))}" if inner else "name the directory that a stage's `output` named"
    return [f"{field} is {directory}, which is not a data set (it has no {records.MANIFEST}); {hint}"]


def source_faults(config: TokenizeConfig, pending: Sequence[Path]) -> list[str]:
    """A phrase for each source of text that is not there, or whose first bytes are not those of JSON lines."""
    patterns = [(f"sources[{number}]", path) for number, path in enumerate(config.sources) if not is_pending(path, pending)]
    missing = [
        f"{field} is {path}, which does not exist; name files or folders of JSON lines that exist"
        for field, path in patterns
        if not path.exists() and next(glob.iglob(str(path), recursive=True), None) is None
    ]
    if missing or not patterns:
        return missing
    try:
        sources = text_files.find_sources([path for _, path in patterns])
    except UserError as error:
        return [str(error)]
    faults = text_kinds.faults_of(sources, config.text_field if config.max_bad_fraction < 1 else None)
    if not faults and not any(source.num_bytes for source in sources) and len(patterns) == len(config.sources):
        return [f"sources: every file there has 0 bytes ({len(sources)}, such as {sources[0].path}); name files that hold text"]
    return [f"sources: {fault}" for fault in faults]


def output_faults(config: StageConfig, pending: Sequence[Path], hash_file: HashFile = records.hash_file) -> list[str]:
    """A phrase for each output that holds something else already, or was made by other settings, from other data or another model."""
    faults = []
    for directory in config.outputs().values():
        recipe = directory / records.RECIPE
        if is_pending(directory, pending) or not directory.is_dir():
            continue
        if recipe.is_file():
            try:
                differences = _other_recipe(config, records.read_recipe(directory), pending, hash_file)
            except UserError as error:
                faults.append(f"output: {error}")
                continue
            faults += [f"output is {directory}, {difference}" for difference in differences]
        elif any(not path.name.startswith(".") for path in directory.iterdir()):
            faults.append(f"output is {directory}, which is not empty and was not made by this pipeline; choose another output")
    return faults


def _other_recipe(config: StageConfig, recipe: dict[str, Any], pending: Sequence[Path], hash_file: HashFile) -> list[str]:
    """The first way in which the recipe of a data set is not that of `config`, as far as it can be known here."""
    wanted = {"stage": config.stage, "settings": json.loads(json.dumps(config.identity()))}
    made_from = recipe.get("inputs", {})
    now = {field: _data_id(path) for field, path in config.inputs().items() if field in made_from and not is_pending(path, pending)}
    with contextlib.suppress(UserError):  # a model that isn't there is a fault by itself
        models = run_inputs.describe_pretrained(config, config.name, hash_file=hash_file)
        now |= {field: entry["data_id"] for field, entry in models.items() if field in made_from and "data_id" in entry}
    before = flatten({key: recipe.get(key) for key in wanted} | {"inputs": made_from})
    after = flatten(wanted | {"inputs": {field: made_from[field] if (found := now.get(field)) is None else found for field in made_from}})
    for name in [*after, *before]:
        if before.get(name) != after.get(name):
            values = f"{name} was {shown(before.get(name), is_grouped=False)}, now it is {shown(after.get(name), is_grouped=False)}"
            return [f"which was made with other settings: {values}; choose another output, or delete the directory to make it anew"]
    return []


def _data_id(directory: Path) -> str | None:
    found = directory / records.MANIFEST
    return str(records.read_manifest(directory)["data_id"]) if found.is_file() else None
