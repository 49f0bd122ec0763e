"""Plain text tables: columns as wide as they need, the least important left out where the terminal is narrow.

The last column holds free text: what does not fit beside the others stands on lines of its own below the row, indented, so
that no column is ever cut and nothing is hidden but the end of a very long text.
"""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from slurm.record.printable import printable_line

GAP = "  "
LEAST_FREE = 24
"""Columns that are `dropped` 2 go to leave the last column so many characters, `dropped` 3 twice as many, and so on."""
LEAST_PROSE = 40
"""Width of a column in which prose is broken."""
MOST_LINES = 2
"""Of free text below a row."""
INDENT = 4


class Column(NamedTuple):
    """A column's heading and how it is set."""

    name: str
    is_right: bool = False
    """Whether its texts end at the column's right edge: numbers."""
    dropped: int = 0
    """Where there is too little room, the column with the highest number goes first; 1 goes only where a row would not fit, 0 never."""


class Layout(NamedTuple):
    """A table in lines. `rows` holds the lines of each row, `columns` the place of each column that is shown in its first line."""

    header: str
    rows: list[list[str]]
    columns: dict[str, tuple[int, int]]
    left_out: list[str]
    """The names of columns that had no room."""

    @property
    def lines(self) -> list[str]:
        """Header and rows, top to bottom."""
        return [self.header, *(line for row in self.rows for line in row)]


def lay_out(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None, *, is_prose: bool = False) -> Layout:
    """The table of `rows`, each with a text for every column, in at most `width` characters (None: as wide as it needs).

    A column that may be dropped and is empty in every row is not shown.

    is_prose : the free text is what the table is there for; it is broken within its column, where that is wide enough.
    """
    rows = [[printable_line(text.replace("\n", " ")) for text in row] for row in rows]  # one that was longer or broken would shift others
    *fixed, free = range(len(columns))
    sizes = [max(len(columns[i].name), *(len(row[i]) for row in rows)) if rows else len(columns[i].name) for i in range(len(columns))]
    shown = [i for i in fixed if columns[i].dropped == 0 or any(row[i] for row in rows)]
    has_free = any(row[free] for row in rows)
    left_out = []
    while width is not None:
        last = max(shown, key=lambda i: (columns[i].dropped, i))
        wanted = min(sizes[free], LEAST_FREE * (columns[last].dropped - 1)) if has_free else 0
        needed = sum(sizes[i] + len(GAP) for i in shown) + (wanted or -len(GAP))
        if needed <= width or columns[last].dropped == 0:
            break
        shown.remove(last)
        left_out.append(columns[last].name)
    places, start = {}, 0
    for i in shown:
        places[columns[i].name] = (start, start + sizes[i])
        start += sizes[i] + len(GAP)
    room = None if width is None else width - start
    names = [column.name for column in columns]

    def line(texts: Sequence[str], rest: str) -> str:
        cells = [texts[i].rjust(sizes[i]) if columns[i].is_right else texts[i].ljust(sizes[i]) for i in shown]
        return GAP.join([*cells, rest]).rstrip()

    def lines(texts: Sequence[str]) -> list[str]:
        if room is None or width is None or len(texts[free]) <= room:
            return [line(texts, texts[free])]
        if is_prose and room >= LEAST_PROSE:
            first, *rest = textwrap.wrap(texts[free], room)
            return [line(texts, first), *(" " * start + part for part in rest)]
        return [line(texts, ""), *below(texts[free], width)]

    fits_name = has_free and (room is None or len(names[free]) <= room)
    return Layout(line(names, names[free] if fits_name else ""), [lines(row) for row in rows], places, left_out)


def below(text: str, width: int) -> list[str]:
    """`text` on indented lines of at most `width` characters, `MOST_LINES` of them."""
    indent = " " * INDENT
    return textwrap.wrap(
        text, max(width, 2 * INDENT), initial_indent=indent, subsequent_indent=indent, max_lines=MOST_LINES, placeholder=" ..."
    )


def number_of(count: int, one: str, many: str | None = None) -> str:
    """`1 task`, `2 tasks`; `many` where an s is not enough."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def figure(value: object, *, is_grouped: bool = True) -> str:
    """A value for reading: floats with five significant digits, whole numbers in groups of three (settings: as they are typed)."""
    if value is None:
        return "none" if is_grouped else "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and is_grouped:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if is_grouped and 1e4 <= abs(value) < 1e15 else f"{value:.5g}"
    return str(value)
