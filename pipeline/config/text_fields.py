"""Where the text stands in a line's object: `text_field`, compared with what the first objects of a file hold."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FEW_OBJECTS = 2
"""So many are needed to tell: the first line alone may be a header."""
MOST_NAMES = 8


def text_in(value: Any, text_field: str) -> Any:
    """What `text_field` names in an object: its key of that name, else `a.b` the key `b` of the object under `a`; None if nothing."""
    if isinstance(value, dict) and text_field in value:
        return value[text_field]
    for key in text_field.split("."):
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def fault(path: Path, objects: Sequence[dict[str, Any]], text_field: str, *, is_whole: bool) -> str | None:
    """A sentence if none of the first objects of the file at `path` has a text in `text_field`; None if some do, or too few are known.

    is_whole : the objects are all that there are.
    """
    if not objects or (len(objects) < FEW_OBJECTS and not is_whole) or any(isinstance(text_in(o, text_field), str) for o in objects):
        return None
    first, number = objects[0], len(objects)
    which = f"none of its first {number} documents has" if number > 1 else "its one document does not have"
    there = [text_in(o, text_field) for o in objects]
    found = next((type(value).__name__ for value in there if value is not None), None)
    what = f"a text in {text_field!r}" + (f", where there is a {found}" if found else "")
    names = list(_texts(first))
    near = difflib.get_close_matches(text_field, names, n=1) or sorted(names, key=lambda name: -len(text_in(first, name)))[:1]
    hint = f"text_field={near[0]} would name one" if near else "give JSON lines with a text in each"
    fields = ", ".join(list(first)[:MOST_NAMES]) + (", ..." if len(first) > MOST_NAMES else "")
    return f"{path}: {which} {what} (text_field); the first has the fields {fields or 'none'}; {hint}"


def _texts(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all strings in an object."""
    for key, inner in value.items():
        if isinstance(inner, str):
            yield prefix + key
        elif isinstance(inner, dict):
            yield from _texts(inner, f"{prefix}{key}.")
