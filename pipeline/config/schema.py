"""The typed model that every configuration builds on: strict values, unknown keys refused with the nearest key."""

import functools
import math
import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from pipeline.config import faults
from pipeline.config.errors import UserError


class Config(pydantic.BaseModel):
    """A group of settings. Values are strict (`"3"` is not 3, 1 is not true), keys are known, nothing is changed.

    A setting that is text or a path takes what looks like a number as it was written: `name: 1e3` is the name `1e3`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, protected_namespaces=())

    @pydantic.model_validator(mode="before")
    @classmethod
    def _text_as_written(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        texts, lists = _text_fields(cls)
        as_written = {key: _as_written(value) for key, value in values.items() if key in texts}
        as_written |= {k: [_as_written(item) for item in value] for k, value in values.items() if k in lists and isinstance(value, list)}
        return {**values, **as_written}

    def identity(self) -> dict[str, Any]:
        """The settings that decide the bytes of the output, as JSON values: all but `OPERATIONAL` and unchanged `ADDED` ones."""
        identity = {}
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            if not _is_as_before(field, value) and not _is_marked(field.json_schema_extra, "operational"):
                identity[key] = _identity_of(value)
        return identity

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, as values that YAML and JSON can hold."""
        return self.model_dump(mode="json")

    def chosen(self) -> dict[str, Any]:
        """The settings that are not at their defaults, as values that YAML can hold; a group's `kind` is always among them."""
        chosen = {}
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            if key != "kind" and not field.is_required() and value == field.get_default(call_default_factory=True):
                continue
            chosen[key] = value.chosen() if isinstance(value, Config) else self.model_dump(mode="json", include={key})[key]
        return chosen


@functools.cache
def _text_fields(model: type[Config]) -> tuple[set[str], set[str]]:
    """The names of the settings that are text or a path, and of those that are a list of such."""
    fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    lists = {name: typing.get_args(annotation)[0] for name, annotation in fields.items() if typing.get_origin(annotation) is list}
    return {name for name, kind in fields.items() if _is_text(kind)}, {name for name, kind in lists.items() if _is_text(kind)}


def _is_text(annotation: Any) -> bool:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _is_text(inner[0])
    if origin in (typing.Union, types.UnionType):
        return all(part is type(None) or _is_text(part) for part in inner)
    return annotation in (str, Path)


def _as_written(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _is_marked(extra: object, mark: str) -> bool:
    return isinstance(extra, dict) and bool(extra.get(mark))


def _is_as_before(field: FieldInfo, value: object) -> bool:
    """Whether the setting came later than identities that were recorded without it, and `value` stands for what was done before."""
    extra = field.json_schema_extra
    if not isinstance(extra, dict) or not extra.get("added"):
        return False
    return bool(value == extra.get("before", field.get_default(call_default_factory=True)))


def _identity_of(value: Any) -> Any:
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, list):
        return [_identity_of(item) for item in value]
    if isinstance(value, dict):
        return {key: _identity_of(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


OPERATIONAL: dict[str, Any] = {"operational": True}
"""`Field(default, json_schema_extra=OPERATIONAL)` marks a setting that changes cost or place, never the output's bytes."""

ADDED: dict[str, Any] = {"added": True}
"""Marks a setting that came after identities had been recorded without it: at its default it leaves them as they were."""

ADDED_AS_NULL: dict[str, Any] = {**ADDED, "before": None}
"""The same for one whose default is something new: null leaves identities as they were."""

RUN: dict[str, Any] = {**OPERATIONAL, "run": True}
"""The same for a path of a run, which may also be given as `train/demo`: the stage and name under the root of runs."""

PRETRAINED: dict[str, Any] = {**OPERATIONAL, "pretrained": True}
"""The same for the name of a language model or tokenizer: see `PretrainedName`."""


def _whole(value: object) -> object:
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


def _path(value: object) -> object:
    return Path(value) if isinstance(value, str) else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
"""A whole number from 0 on; `1e9` counts as one."""

PositiveCount = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
"""A whole number from 1 on; `1e9` counts as one."""

DataPath = Annotated[Path, BeforeValidator(_path)]
"""A path in a configuration: `{data}`, `{ssd}` and `{runs}` stand for the site's roots (see `pipeline.config.site_file`)."""

PretrainedName = Annotated[str, Field(min_length=1, json_schema_extra=PRETRAINED)]
"""`demo`, the path of something that lies on this machine, or a name on the Hugging Face hub. A path may be relative to the
current directory; it is absolute once the configuration is read, so that it is one thing wherever the job runs."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""A number from 0 to 1."""

C = TypeVar("C", bound=Config)


def build(model: type[C], values: dict[str, Any], where: str) -> C:
    """`values` as a `model`. Raises `UserError` with a line a fault, each naming `where` and the field."""
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError("\n".join(faults.sentence(model, fault, where) for fault in error.errors())) from None
