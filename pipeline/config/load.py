"""A stage's YAML, with `key=value` changes, to its typed configuration."""

import difflib
import importlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import yaml_file
from pipeline.config.errors import UserError
from pipeline.config.resources import Resources
from pipeline.config.schema import PRETRAINED, RUN, build
from pipeline.config.site_file import Site, load_site
from pipeline.config.stage import StageConfig

PLACEHOLDER = re.compile(r"\{(data|ssd|runs)\}")
"""YAML reads `{runs}/train/x` as a broken mapping; in a change on the command line it is a path."""


ID_OR_JOB = re.compile(r"[0-9]+(_[0-9]+)?|[0-9a-z-]{4,20}")
"""A run's id, or its end of four letters at least; a job id, or that of a task."""


class Stage(NamedTuple):
    """Where a stage lives: its configuration (imported here) and its program (imported by whoever runs it)."""

    config_class: str
    program: str


STAGES = {
    "tokenize": Stage("pipeline.config.tokenize_text:TokenizeConfig", "pipeline.stages.tokenize_text"),
    "count": Stage("pipeline.config.count_tokens:CountConfig", "pipeline.stages.count_tokens"),
    "cache": Stage("pipeline.config.cache_activations:CacheConfig", "pipeline.stages.cache_activations"),
    "train": Stage("pipeline.config.train_crosscoder:TrainConfig", "pipeline.stages.train_crosscoder"),
    "evaluate": Stage("pipeline.config.evaluate_crosscoder:EvaluateConfig", "pipeline.stages.evaluate_crosscoder"),
    "import": Stage("pipeline.config.import_crosscoder:ImportConfig", "pipeline.stages.import_crosscoder"),
    "features": Stage("pipeline.config.build_features:FeaturesConfig", "pipeline.stages.build_features"),
    "generate": Stage("pipeline.config.generate_text:GenerateConfig", "pipeline.stages.generate_text"),
}


def load(path: Path, changes: list[str] | None = None, site: Site | None = None) -> StageConfig:
    """The configuration in the file at `path` with `changes` (`key=value`, dotted keys) laid over it.

    Placeholders and relative paths become absolute, those of language models and tokenizers too. Raises `UserError` naming
    the file and the field.
    """
    values = yaml_file.read(path)
    for change in changes or []:
        set_value(values, change, where=str(path))
    return from_values(values, where=str(path), site=site or load_site())


def from_values(values: dict[str, Any], *, where: str, site: Site, frozen: dict[str, Any] | None = None) -> StageConfig:
    """`values` as read from YAML, as the configuration of the stage that they name.

    frozen : the values of the run that they are taken from. The name of a language model or tokenizer that stands there means
    what it meant when that run was frozen, whatever lies in the current directory now.
    """
    stage = values.get("stage")
    if not isinstance(stage, str) or stage not in STAGES:
        near = difflib.get_close_matches(str(stage), STAGES, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"stages are {', '.join(STAGES)}"
        raise UserError(f"{where}: stage is {stage!r}; {hint}" if stage is not None else f"{where}: stage is missing; {hint}")
    model = config_class(stage)
    values = _expand(values, site, where)
    given = values.get("resources", {})
    if isinstance(given, dict):
        values = {**values, "resources": {**site.resources, **given}}
    build(Resources, site.resources, "the site file's resources")
    config = build(model, values, where)
    config = config.model_copy(update=_absolute_paths(config, site))
    return config.model_copy(update=_found_names(config, where, frozen or {}))


def config_class(stage: str) -> type[StageConfig]:
    """The configuration class of `stage`, a key of `STAGES`."""
    module, _, name = STAGES[stage].config_class.partition(":")
    found: type[StageConfig] = getattr(importlib.import_module(module), name)
    return found


def set_value(values: dict[str, Any], change: str, *, where: str) -> None:
    """Sets the dotted key of `change` (`learning_rate=3e-4`, `resources.gpus=1`) in `values`, in place."""
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise UserError(f"{where}: the change {change!r} is not of the form key=value")
    group = values
    *path, last = key.split(".")
    for part in path:
        group = group.setdefault(part, {})
        if not isinstance(group, dict):
            raise UserError(f"{where}: {key}: `{part}` is a value, not a group of settings")
    group[last] = text if PLACEHOLDER.match(text) else yaml_file.parse(text, f"{where}: {key}")


def _expand(value: Any, site: Site, where: str) -> Any:
    if isinstance(value, str):
        return site.expand(value, where) if "{" in value else value
    if isinstance(value, list):
        return [_expand(v, site, where) for v in value]
    if isinstance(value, dict):
        return {k: _expand(v, site, where) for k, v in value.items()}
    return value


def _absolute_paths(config: Any, site: Site) -> dict[str, Any]:
    """The fields of `config` that hold paths, made absolute, nested groups included; a run may be named by stage/name."""
    update: dict[str, Any] = {}
    for key, field in type(config).model_fields.items():
        value = getattr(config, key)
        of_a_run = field.json_schema_extra == RUN
        if isinstance(value, Path):
            update[key] = _absolute(value, site, of_a_run)
        elif isinstance(value, list) and all(isinstance(v, Path) for v in value):
            update[key] = [_absolute(v, site, of_a_run) for v in value]
        elif hasattr(type(value), "model_fields"):
            update[key] = value.model_copy(update=_absolute_paths(value, site))
    return update


def _found_names(config: Any, where: str, frozen: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of `config` that name a language model or tokenizer, nested groups included: each as it is used from now on."""
    update: dict[str, Any] = {}
    for key, field in type(config).model_fields.items():
        value, known = getattr(config, key), frozen.get(key) if isinstance(frozen, dict) else None
        if field.json_schema_extra == PRETRAINED and value != known:
            update[key] = _found_name(value, f"{where}: {prefix}{key}")
        elif hasattr(type(value), "model_fields") and (inner := _found_names(value, where, known, f"{prefix}{key}.")):
            update[key] = value.model_copy(update=inner)
        elif isinstance(value, dict) and (inner := _found_in_entries(value, where, known, f"{prefix}{key}.")):
            update[key] = value | inner
    return update


def _found_in_entries(entries: dict[str, Any], where: str, frozen: Any, prefix: str) -> dict[str, Any]:
    """The same for a setting that holds groups under names of their own."""
    known = frozen if isinstance(frozen, dict) else {}
    groups = {name: entry for name, entry in entries.items() if hasattr(type(entry), "model_fields")}
    found = {name: _found_names(entry, where, known.get(name), f"{prefix}{name}.") for name, entry in groups.items()}
    return {name: groups[name].model_copy(update=inner) for name, inner in found.items() if inner}


def _found_name(name: str, field: str) -> str:
    """`name` as an absolute path if something lies there, seen from the current directory; else, and `demo`, as it is."""
    path = Path(os.path.expanduser(name))  # as it is where `~name` is nobody's home
    if name == "demo":
        return name
    if path.exists():
        return str(path.absolute())
    if name.startswith((".", "/", "~")):
        raise UserError(f"{field} is {name}, but there is nothing at {path.absolute()}; give a path that is there, or a name on the hub")
    return name


def _absolute(path: Path, site: Site, of_a_run: bool) -> Path:
    root = site.runs if of_a_run and _names_a_run(path) else Path()
    return (root / path).expanduser().absolute()


def _names_a_run(path: Path) -> bool:
    """Whether it is a run's name, `train/x`, `train/x/<id>`, `<id>` or `1042`, or a task's, `1042_3` or with `/tasks/3` behind it,
    rather than a path from the current directory: such a name stands under the root of runs."""
    if path.is_absolute() or path.exists():
        return False
    parts = path.parts[:-2] if len(path.parts) > 2 and path.parts[-2] == "tasks" else path.parts
    return (len(parts) in (2, 3) and parts[0] in (*STAGES, "sweep")) or (len(parts) == 1 and bool(ID_OR_JOB.fullmatch(parts[0])))
