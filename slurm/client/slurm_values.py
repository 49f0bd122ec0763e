"""Values and records as Slurm's commands print them, from 22.05 to 26.05. Pure functions; nothing is asked here.

Text, in a format that we choose, hardly differs between versions and is what polling uses. JSON does: in 22.05 a state is a
string, an unset number null and `sinfo --json` lists `nodes`; from 23.02 on numbers are `{set, infinite, number}` and sinfo
groups its rows under `sinfo`; from 23.11 states are lists. Unknown keys are ignored, missing ones are empty.
"""

import json
import re
import time
from collections.abc import Sequence
from typing import Any

from pipeline.config.errors import UserError

SEPARATOR = "\x1f"
"""Between the fields of text: a comment may hold any printable character."""


def number(value: Any) -> int | None:
    """An integer that may be unset: plain, null, a word, or `{"set": true, "infinite": false, "number": 5}`."""
    if isinstance(value, dict):
        return None if value.get("infinite") or not value.get("set", True) else number(value.get("number"))
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return int(value) if value == value and abs(value) != float("inf") else None
    text = str(value).strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def gpu_counts(gres: str | None) -> dict[str, int]:
    """GPUs by type in a gres text: `gpu:h200:2(S:0-1),shard:8` is {"h200": 2}; without a type the key is `gpu`."""
    counts: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)(?:gres[:/])?gpu(?::([^:(),]+))?[:=](\d+)", gres or ""):
        counts[kind or "gpu"] = counts.get(kind or "gpu", 0) + int(count)
    return counts


def seconds(text: str) -> int | None:
    """A duration of Slurm's (`2-03:04:05`, `10:00`, minutes alone as `30`); None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)(?:\.\d+)?", text.strip())
    if not match:
        return None
    days, hours, minutes, last = match.groups()
    if days and minutes is None:  # 2-12: days and hours
        return int(days) * 86400 + int(last) * 3600
    if days and hours is None:  # 2-12:30: days, hours and minutes
        return int(days) * 86400 + int(minutes) * 3600 + int(last) * 60
    if minutes is None:
        return int(last) * 60
    return int(days or 0) * 86400 + int(hours or 0) * 3600 + int(minutes) * 60 + int(last)


def megabytes(text: str) -> int | None:
    """Slurm's memory (`1000M`, `4G`, `1.50T`, `16000` for MiB) in MiB; None where there is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)[nc]?", text.strip())
    return round(float(match[1]) * 1024 ** ("KMGTP".index(match[2] or "M") - 1)) if match else None


def moment(text: str) -> float | None:
    """Seconds since 1970 of Slurm's local time (`2026-11-23T09:14:33`); None for N/A, Unknown, None."""
    try:
        return time.mktime(time.strptime(text.strip(), "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def present(text: Any) -> str:
    """A field's text, empty where Slurm says that there is none."""
    text = str(text if text is not None else "").strip()
    return "" if text in ("(null)", "N/A", "None", "none", "n/a") else text


def parse_config(text: str) -> dict[str, str]:
    """The settings in what `scontrol show config` printed; those that are `(null)` are empty."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): present(value) for key, _, value in pairs}


def parse_records(text: str) -> list[dict[str, str]]:
    """The records in what `scontrol show job|node|partition -o` printed, a line each.

    Values may hold spaces; a key is a word before `=` that begins with a capital. The first of two equal keys holds.
    """
    records = []
    for line in text.splitlines():
        pairs = [pair.partition("=") for pair in re.split(r"\s+(?=[A-Z][\w/:]*=)", line.strip()) if "=" in pair]
        record = {key: present(value) for key, _, value in reversed(pairs)}
        if record:
            records.append(record)
    return records


def json_rows(text: str, key: str, command: str, other_key: str | None = None) -> list[dict[str, Any]]:
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise UserError(f"`{command}` did not print JSON ({error}); it began: {text[:80]!r}") from error
    for name in (key, other_key):
        if isinstance(answer, dict) and isinstance(answer.get(name), list):
            return [row for row in answer[name] if isinstance(row, dict)]
    known = ", ".join(answer) if isinstance(answer, dict) else type(answer).__name__
    raise UserError(f"`{command}` printed JSON without {key!r}; it holds: {known}")


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as Slurm writes them: `0-3,7`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def parse_ranges(text: str) -> list[int]:
    """The numbers of `3`, `[1-3,7]` or `[1-3,7%2]`."""
    numbers: list[int] = []
    for part in text.strip("[]").partition("%")[0].split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"{text!r} does not name tasks of an array; write 3, or [1-3,7]")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
