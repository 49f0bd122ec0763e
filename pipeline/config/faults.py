"""What is wrong with a configuration, in one sentence a fault: what was found, what was expected, the nearest right word."""

import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pydantic

LONGEST_VALUE = 60
SURELY_MEANT = 0.8
"""How like a name must be, of 1, for one inside a group to be proposed before one of the uppermost."""

# What pydantic's types of fault come to. {gt} and the like are the limits that it names.
EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (true, false and null are text in quotes)",
    "list_type": "a list, for example [a, b]",
    "is_instance_of": "a path",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
    "too_short": "{min_length} or more entries",
}


class Place(NamedTuple):
    """Where in a configuration a fault is."""

    text: str
    """`crosscoder.activation_function.k`, as it is written in YAML; empty for the whole."""
    groups: list[type[pydantic.BaseModel]]
    """The groups of settings that may stand there; none if it is a value."""
    kind: str = ""
    """Which of several kinds of group was chosen there."""


def sentence(model: type[pydantic.BaseModel], fault: Mapping[str, Any], where: str) -> str:
    """The fault, one of those that pydantic found in a `model`, in a sentence that begins with `where`."""
    location, kind = fault["loc"], fault["type"]
    place = find_place(model, location)
    if kind == "extra_forbidden":
        return f"{where}: {_unknown_key(model, find_place(model, location[:-1]), place.text, str(location[-1]))}"
    if kind == "missing":
        return f"{where}: {place.text} is missing; give it a value"
    if kind == "value_error":
        message = fault["msg"].removeprefix("Value error, ")
        found = f" is {_shown(fault['input'])}" if place.text and not isinstance(fault["input"], dict) else ""
        return f"{where}: {place.text}{found}{': ' if place.text else ''}{message[:1].lower()}{message[1:]}"
    if kind.startswith("union_tag"):
        return f"{where}: {_unknown_kind(place, fault)}"
    return f"{where}: {place.text or 'it'} is {_shown(fault['input'])}, expected {_expected(place, fault)}"


def _unknown_key(model: type[pydantic.BaseModel], group: Place, text: str, key: str) -> str:
    known = sorted({name for g in group.groups for name in _keys(g)})
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    is_at_top, is_near = text == key, bool(near) and _likeness(key, near[0]) >= SURELY_MEANT
    elsewhere = _nearest_inside(model, key) if is_at_top and not is_near else []
    whose = f" of the kind {group.kind}" if group.kind else ""
    chosen = elsewhere or near
    return f"{text} is not a setting{whose}; " + (f"did you mean `{chosen[0]}`?" if chosen else f"known here: {', '.join(known)}")


def _nearest_inside(model: type[pydantic.BaseModel], key: str) -> list[str]:
    """The dotted name of the setting of any group whose last part is all but `key`; none if there is no such setting."""
    alike = [(_likeness(key, name.rpartition(".")[2]), name) for name in _all_keys(model)]
    return [name for likeness, name in [max(alike, key=lambda pair: (pair[0], -pair[1].count(".")))] if likeness >= SURELY_MEANT]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _all_keys(group: type[pydantic.BaseModel], prefix: str = "") -> list[str]:
    """The dotted names of all settings of a group, those of groups in it included."""
    names = []
    for key, annotation in _keys(group).items():
        names.append(prefix + key)
        for inner in _groups_in(annotation):
            names += _all_keys(inner, f"{prefix}{key}.")
    return names


def _unknown_kind(place: Place, fault: Mapping[str, Any]) -> str:
    kinds = _kinds(place.groups)
    if fault["type"] == "union_tag_not_found":
        return f"{place.text}.kind is missing; give one of {_choice(kinds)}"
    return f"{place.text}.kind is {_shown(fault['input']['kind'])}, expected {_choice(kinds, fault['input']['kind'])}"


def _expected(place: Place, fault: Mapping[str, Any]) -> str:
    kind, limits = fault["type"], fault.get("ctx", {})
    if kind in ("model_type", "model_attributes_type", "dict_type", "dict_attributes_type"):
        if kinds := _kinds(place.groups):
            found = fault["input"]
            near = difflib.get_close_matches(str(found), kinds, n=1)
            return f"a group of settings, for example {{kind: {near[0] if near else kinds[0]}}}; kinds are {', '.join(kinds)}"
        keys = sorted({name for group in place.groups for name in _keys(group)})
        return "a group of settings" + (f": {', '.join(keys)}" if keys else ", `key: value` lines")
    if kind == "literal_error":
        words = [word.strip(" '") for word in limits["expected"].replace(" or ", ", ").split(",")]
        words = [word.lower() if word in ("True", "False") else word for word in words]  # as YAML writes them
        return _choice(words, fault["input"])
    if kind in EXPECTED:
        return EXPECTED[kind].format(**limits)
    message = str(fault["msg"])
    return message[:1].lower() + message[1:].removeprefix("nput should be ")


def _choice(words: Sequence[str], found: object = None) -> str:
    """`a, b or c`, and which of them was probably meant."""
    listed = f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else "".join(words)
    near = difflib.get_close_matches(str(found), words, n=1) if found is not None else []
    return listed + (f"; did you mean `{near[0]}`?" if near else "")


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a group of settings"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


# -- where ------------------------------------------------------------------------------------------------------------


def find_place(model: type[pydantic.BaseModel], location: Sequence[int | str]) -> Place:
    """The place at pydantic's `location`, without the kinds that it puts between a group and its settings."""
    text, kind, is_name = "", "", False
    groups: list[type[pydantic.BaseModel]] = [model]
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        chosen = [group for group in groups if _kind_of(group) == part]
        if len(groups) > 1 and chosen:
            groups, kind = chosen, part
            continue
        text += f".{part}" if text else str(part)
        if is_name:  # of a group among others of one kind: what follows is a setting of it
            is_name = False
            continue
        fields = [keys[part] for group in groups if part in (keys := _keys(group))]
        groups, kind = [found for field in fields for found in _groups_in(field)], ""
        is_name = any(typing.get_origin(field) is dict for field in fields) and bool(groups)
    return Place(text, groups, kind)


def _keys(group: type[pydantic.BaseModel]) -> dict[str, Any]:
    """The annotation of each setting, by its name in YAML."""
    return {field.alias or name: field.annotation for name, field in group.model_fields.items()}


def _kinds(groups: Sequence[type[pydantic.BaseModel]]) -> list[str]:
    return [kind for group in groups if (kind := _kind_of(group))]


def _kind_of(group: type[pydantic.BaseModel]) -> str:
    return str(group.model_fields["kind"].default) if "kind" in group.model_fields else ""


def _groups_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _groups_in(inner)]
