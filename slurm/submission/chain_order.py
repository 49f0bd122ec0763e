"""The order of a chain: what a configuration reads comes before it, though it was given after it."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.stage import StageConfig

Given = tuple[str, StageConfig]
"""A configuration's name for messages, and itself."""


def in_order(given: Sequence[Given], runs: Path) -> tuple[list[Given], list[str]]:
    """`given` with each configuration after those that make what it reads, else as it was, and a sentence for each that moved.

    One that has a maker before it stays where it is, though another maker comes later.
    """
    left, ordered, moved = list(given), list[Given](), list[str]()
    while left:
        first = left[0]
        chosen = next((item for item in left if not _lacks(item, ordered, left, runs)), first)  # a circle stays as it was given
        if chosen is not first:
            moved += [f"{first[0]} goes after {maker[0]}, which makes what it reads" for maker in _lacks(first, ordered, left, runs)]
        left.remove(chosen)
        ordered.append(chosen)
    return ordered, list(dict.fromkeys(moved))


def _lacks(reader: Given, ordered: Sequence[Given], left: Sequence[Given], runs: Path) -> list[Given]:
    """Those of `left` that make an input of `reader` which none of `ordered` makes."""
    paths = [path for path in reader[1].inputs().values() if not any(_makes(item[1], path, runs) for item in ordered)]
    return [item for item in left if item is not reader and any(_makes(item[1], path, runs) for path in paths)]


def _makes(config: StageConfig, path: Path, runs: Path) -> bool:
    outputs = [*config.outputs().values(), runs / config.stage / config.name]
    return any(path.absolute().is_relative_to(output.absolute()) for output in outputs)
