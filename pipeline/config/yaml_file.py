"""YAML as people write it: numbers, times and words mean what they look like.

YAML 1.1 (what PyYAML reads by default) makes the string of `3e-4`, the integer 86400 of `24:00:00`, false of `no`, a
date of `2024-01-01`, 8 of `010`, 10422 of `1042_2`, and lets a repeated key win silently. This loader follows YAML 1.2's
core schema instead, plus numbers whose thousands are set off (`1_000_000`), and a repeated key is an error.

What looks like a number may be meant as text all the same: `12e4567` is a commit, `104_200` task 200 of a job. So a number
keeps the text that it was written as, and a setting that is text or a path takes that (see `pipeline.config.schema.Config`).
"""

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.errors import UserError

try:  # the same language, ten times as fast: a submission reads the configuration of every run that waits
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeLoader  # type: ignore[assignment]


class WrittenInt(int):
    """A whole number that was written otherwise than Python writes it (`1_000`, `0x1f`); its `str` is the text."""

    text: str

    def __str__(self) -> str:
        return self.text


class WrittenFloat(float):
    """The same for any other number (`3e-4`, `.5`)."""

    text: str

    def __str__(self) -> str:
        return self.text


class _Loader(SafeLoader):
    """SafeLoader with the core schema's scalars; the resolvers are set below, on this class only."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _resolve(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))


_resolve("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_resolve("null", "~|null|Null|NULL|", "~nN")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])
WHOLE = r"(?:[0-9]+|[1-9][0-9]{0,2}(?:_[0-9]{3})+)"
_resolve("int", rf"[-+]?{WHOLE}|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789")
_resolve("float", rf"[-+]?(?:\.[0-9]+|{WHOLE}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+0123456789.")
_resolve("merge", "<<", "<")


def _construct_int(loader: SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    digits = text.replace("_", "")
    value = WrittenInt(int(digits, 0) if digits.startswith(("0o", "0x")) else int(digits, 10))
    value.text = text
    return int(value) if int.__repr__(value) == text else value


def _construct_float(loader: SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node))
    value = WrittenFloat(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    value.text = text
    return float(value) if float.__repr__(value) == text else value


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse(text: str, where: str) -> Any:
    """The value that `text` holds. Raises `UserError` naming `where`, the line and the column."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from error


def read(path: Path) -> dict[str, Any]:
    """The mapping in the file at `path`; an empty file gives an empty one."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a YAML file, for example configs/demo/train.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    value = parse(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected `key: value` lines")
    return value


def write(value: dict[str, Any]) -> str:
    """`value` as YAML text that `parse` reads back to an equal value, keys in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever the loader above, or a YAML 1.1 reader, would take for something else than a string."""

    yaml_implicit_resolvers = {
        first: [*_Loader.yaml_implicit_resolvers.get(first, []), *yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])]
        for first in {*_Loader.yaml_implicit_resolvers, *yaml.SafeDumper.yaml_implicit_resolvers}
    }


def _represent_written(dumper: yaml.SafeDumper, value: WrittenInt | WrittenFloat) -> yaml.ScalarNode:
    return dumper.represent_scalar(f"tag:yaml.org,2002:{'int' if isinstance(value, int) else 'float'}", value.text)


_Dumper.add_representer(WrittenInt, _represent_written)
_Dumper.add_representer(WrittenFloat, _represent_written)
