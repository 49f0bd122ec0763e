"""What is kept of gigatoken having been found wrong on a text: a note beside the token sets, which every task into them heeds.

From then on nothing that gigatoken made counts there, committed or not: the difference was found on one text of many, and only a
share of them is checked. A part that it made is withdrawn (its records are deleted) and made again by the tokenizer itself.
"""

import contextlib
from pathlib import Path

from pipeline import records
from pipeline.records import Record
from pipeline.text.running_check import EncoderDiffers

NOTE = "gigatoken-differs.json"
FAST = "gigatoken"


def note(output: Path, difference: EncoderDiffers) -> None:
    """Leaves the note in the directory of the token sets."""
    records.write_json(output / NOTE, {"found": str(difference)})


def noted(output: Path) -> str | None:
    """What was found, if it was."""
    return str(records.read_json(output / NOTE)["found"]) if (output / NOTE).exists() else None


def withdraw(directory: Path, found: dict[int, tuple[str, Record]]) -> set[int]:
    """Deletes the records, of those given by part as stem and content, whose shards gigatoken made; gives their parts."""
    wrong = {part for part, (_, record) in found.items() if record["provenance"].get("encoder") == FAST}
    for part in wrong:
        # Another task that knows it too may have been first.
        with contextlib.suppress(FileNotFoundError):
            (directory / f"{found[part][0]}.json").unlink()
    return wrong
