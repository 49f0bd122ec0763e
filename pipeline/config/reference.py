"""The settings of a stage as a text to read, made from the typed models, so that it can't differ from what is checked."""

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic.fields import FieldInfo

from pipeline.config.load import config_class
from pipeline.config.schema import Config


class Setting(NamedTuple):
    """One key of a group."""

    name: str
    values: str
    """What it takes, in words."""
    default: str | None
    """As YAML; None where the key must be given."""
    meaning: str


class Group(NamedTuple):
    """The keys that stand together in a YAML file: a stage's own, or those of a key that holds a group."""

    places: tuple[str, ...]
    """Where the group stands, dotted from the top of the file; the stage's own group stands at `""`."""
    kind: str | None
    """The value of `kind` that chooses the group, where several can stand in its place."""
    meaning: str
    settings: tuple[Setting, ...]

    def as_json(self) -> dict[str, Any]:
        """Its fields by name, the settings too."""
        return {**self._asdict(), "settings": [setting._asdict() for setting in self.settings]}

    @property
    def heading(self) -> str:
        """Its place, or places, and its kind."""
        return ", ".join(self.places) + (f" (kind: {self.kind})" if self.kind else "")


def groups_of(stage: str) -> list[Group]:
    """All groups of settings of `stage`, a key of `STAGES`: its own first, each other one once, in the order in which keys name them."""
    top = config_class(stage)
    found: dict[type[Config], list[str]] = {top: [""]}
    waiting: list[type[Config]] = [top]
    for model in waiting:  # grows as groups within groups are met
        for name, annotation in _fields(model).items():
            for group in _models_in(annotation):
                place = f"{found[model][0]}.{name}".removeprefix(".") + (
                    "[]" if _is_list(annotation) else ".NAME" if _is_mapping(annotation) else ""
                )
                if group not in found:
                    waiting.append(group)
                found.setdefault(group, []).append(place)
    return [_group(model, tuple(places)) for model, places in found.items()]


def as_text(stage: str) -> str:
    """The settings of `stage` for a terminal: a block a group, a line a setting with its values and default, its meaning below."""
    blocks = []
    for group in groups_of(stage):
        lines = [*([group.heading] if group.heading else [f"stage: {stage}"]), *_indented(group.meaning, 2)]
        for setting in group.settings:
            default = "required" if setting.default is None else f"default {setting.default}"
            lines += [f"  {setting.name}: {setting.values}; {default}", *_indented(setting.meaning, 6)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_markdown(stages: Iterable[str]) -> str:
    """The settings of these stages as one page, a table a group. A group that stages share stands under the first of them."""
    parts = ["# Settings", "`crosscoder config STAGE` prints a stage's settings, `crosscoder config --markdown` writes this page."]
    first_stage: dict[Group, str] = {}
    for stage in stages:
        for group in groups_of(stage):
            places = ", ".join(f"`{place}`" for place in group.places)
            kind = f" with `kind: {group.kind}`" if group.kind else ""
            if (first := first_stage.setdefault(group, stage)) != stage:
                parts.append(f"{places}{kind}: as under {first}.")
                continue
            parts += [f"### {places}{kind}" if group.heading else f"## {stage}", *([_joined(group.meaning)] if group.meaning else [])]
            if group.settings:
                parts.append("\n".join(["| key | takes | default | meaning |", "| --- | --- | --- | --- |", *map(_row, group.settings)]))
    return "\n\n".join(parts) + "\n"


def _row(setting: Setting) -> str:
    default = "required" if setting.default is None else f"`{_cell(setting.default)}`"
    return f"| `{setting.name}` | {_cell(setting.values)} | {default} | {_cell(setting.meaning)} |"


def _group(model: type[Config], places: tuple[str, ...]) -> Group:
    kind = model.model_fields.get("kind")
    # A class without a docstring of its own inherits its parent's, which says something else.
    own = model.__doc__ or (sys.modules[model.__module__].__doc__ if places == ("",) else "") or ""
    annotations = _fields(model)
    settings = tuple(
        Setting(name, words(annotations[name], field), _default(field), inspect.cleandoc(field.description or ""))
        for name, field in model.model_fields.items()
        if name not in ("kind", "stage")
    )
    return Group(places, None if kind is None else str(kind.default), inspect.cleandoc(own), settings)


def _fields(model: type[Config]) -> dict[str, Any]:
    """The full annotation of each field; pydantic's own `annotation` lacks what stood in `Annotated`."""
    hints = typing.get_type_hints(model, include_extras=True)
    return {name: hints[name] for name in model.model_fields}


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        value = value.chosen()
    elif isinstance(value, Path):
        value = str(value)
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("\n").removesuffix("...").rstrip("\n")


def words(annotation: Any, field: FieldInfo | None = None) -> str:
    """What a field of that type takes: `whole number from 1, or null`, `text`, `one of sum, mean`."""
    bounds = _bounds(field.metadata if field is not None else [])
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        own = [bound for extra in inner[1:] if isinstance(extra, FieldInfo) for bound in extra.metadata]
        return words(inner[0]) + (bounds or _bounds(own))
    if origin in (typing.Union, types.UnionType):
        kinds = [str(part.model_fields["kind"].default) for part in map(_plain, inner) if _is_config(part) and "kind" in part.model_fields]
        others = [words(part) for part in inner if part is not type(None) and not (_is_config(_plain(part)) and kinds)]
        named = [*([f"a group of kind {_either(kinds)}"] if kinds else []), *others]
        return _either(named) + bounds + (", or null" if type(None) in inner else "")
    if origin is Literal:
        return _either([str(value).lower() if isinstance(value, bool) else str(value) for value in inner])
    if origin is list:
        return f"list of {words(inner[0])}"
    if origin is dict:
        return f"names with {words(inner[1])} each"
    if _is_config(annotation):
        return "a group"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation))) + bounds


def _bounds(metadata: list[Any]) -> str:
    limits = {name: getattr(item, name) for item in metadata for name in ("ge", "gt", "le", "lt") if getattr(item, name, None) is not None}
    phrases = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}
    return "".join(
        f" {phrases[name].format(f'{limits[name]:g}' if abs(limits[name]) < 1e5 else limits[name])}" for name in phrases if name in limits
    )


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _plain(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(_plain(annotation)) is list


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(_plain(annotation)) is dict


def _models_in(annotation: Any) -> list[type[Config]]:
    if _is_config(annotation):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _indented(text: str, spaces: int) -> list[str]:
    return [" " * spaces + line if line else "" for line in text.splitlines()]


def _joined(text: str) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
