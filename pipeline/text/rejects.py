"""The side files that say which lines gave no document, and why.

    rejects/lib.jsonl      {"line": 7, "part": 0, "reason": "not_json", "bytes": 31, "start": "the line's first bytes"}

While a source is being read each of its parts has a file of its own, `lib-000.jsonl`, in place before the part's shards
are; once all parts are done they are joined. A part that is done anew replaces its own lines and no others.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from pipeline import records


class RejectFiles:
    """The files of one source."""

    def __init__(self, directory: Path, source: str) -> None:
        self.directory = directory
        self.path = directory / f"{source}.jsonl"
        self._source = source

    def part(self, number: int) -> Path:
        return self.directory / f"{self._source}-{number:03d}.jsonl"

    def join(self, num_parts: int) -> None:
        """Makes one file of the parts' files and what the joined file held of other parts. Safe to repeat after a kill."""
        parts = [self.part(number) for number in range(num_parts)]
        made_anew = {number for number, path in enumerate(parts) if path.exists()}
        if not made_anew:
            return
        with records.atomic_file(self.path) as file:
            for number, path in enumerate(parts):
                for line in _lines(path) if number in made_anew else self._joined_lines(number):
                    file.write(line)
        if not self.path.stat().st_size:
            self.path.unlink()
        for number in made_anew:
            parts[number].unlink()

    def _joined_lines(self, part: int) -> Iterator[bytes]:
        return (line for line in _lines(self.path) if json.loads(line)["part"] == part)


def _lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with open(path, "rb") as file:
            yield from file
