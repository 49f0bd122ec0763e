"""The table of `crosscoder jobs` and `watch`: what is queued and running, then what ended lately, newest first."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.config.load import STAGES
from pipeline.run import amount, duration, pace
from slurm.client.slurm_values import ranges
from slurm.record.text_table import Column, lay_out
from slurm.watching import jobs
from slurm.watching.jobs import ACTIVE, Row

if TYPE_CHECKING:
    from rich.text import Text

MOST_ENDED = 10
"""Lines of what has ended, unless more are asked for."""
MOST_APART = 6
"""Running tasks of one run that have a line each; of more of them one line tells."""
LONGEST_RANGES = 12
"""Of the JOB column: an array whose tasks take more to name is named without them, and the text tells which."""
NARROW, WIDE = 100, 140
"""Terminals below and from here on give a run's name less and more room."""

COLUMNS = (
    *(Column("JOB"), Column("RUN"), Column("STATE"), Column("NODE", dropped=2)),
    *(Column("TIME", is_right=True, dropped=1), Column("LIMIT", is_right=True, dropped=3), Column("DONE", is_right=True, dropped=1)),
    Column("DETAIL"),
)
COLORS = {"running": "green", "waiting": "cyan", "held": "yellow", "stopped": "yellow", "failed": "red", "cancelled": "red", "lost": "red"}


# -- folding ----------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """Rows of one run that read alike, as one line of the table."""

    rows: list[Row]

    @property
    def job(self) -> str:
        """`1042_[1-3,7]` for several tasks; `1042` where that would be too long."""
        ids = [row.job for row in self.rows]
        arrays = list(dict.fromkeys(job.partition("_")[0] for job in ids))
        if len(ids) == 1:
            return ids[0]
        if len(arrays) > 1 or not all(job.partition("_")[2].isdigit() for job in ids):
            return ",".join(arrays) if len(",".join(arrays)) <= LONGEST_RANGES else f"{arrays[0]},..."
        text = ranges([int(job.partition("_")[2]) for job in ids])
        return f"{arrays[0]}_[{text}]" if len(text) <= LONGEST_RANGES else arrays[0]

    @property
    def tasks(self) -> str:
        """The tasks' numbers where `job` does not name them."""
        if len(self.rows) == 1 or "[" in self.job:
            return ""
        return "tasks " + ranges([row.task for row in self.rows if row.task is not None])


def fold(rows: Sequence[Row]) -> list[Line]:
    """The rows with tasks of one run together that are in the same state for the same reason.

    Running tasks stay apart while they are few; one that a warning is due for always does.
    """
    running = Counter(_whose(row) for row in rows if row.state == "running")
    lines: dict[Any, Line] = {}
    for index, row in enumerate(rows):
        is_single = row.task is None and "_" not in row.job
        alone = is_single or (row.state == "running" and (bool(row.warning) or running[_whose(row)] <= MOST_APART))
        key = index if alone else (_whose(row), row.state, row.reason.replace(row.job, ""))
        lines.setdefault(key, Line([])).rows.append(row)
    return list(lines.values())


def _whose(row: Row) -> str:
    """The run, or the array of a job that belongs to none."""
    return row.run or row.job.partition("_")[0]


# -- the table --------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> str:
    """`3 running, 12 waiting`, in the order of `jobs.STATES`."""
    counts = {state: sum(row.state == state for row in rows) for state in jobs.STATES}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "nothing queued, nothing ended lately"


def table(
    rows: Sequence[Row],
    *,
    now: float | None = None,
    width: int | None = None,
    most_ended: int | None = MOST_ENDED,
    num_older: int = 0,
    max_lines: int | None = None,
) -> "list[Text]":
    """The lines to print: a summary, the table, and what was left out of it.

    most_ended : so many lines of what has ended at most; None: all.
    num_older : runs that were not even read.
    max_lines : the height of the screen; what goes beyond it is cut and counted.
    """
    from rich.text import Text

    now = time.time() if now is None else now
    lines = fold(rows)
    active = [line for line in lines if line.rows[0].state in ACTIVE]
    ended = [line for line in lines if line.rows[0].state not in ACTIVE]
    printed = [Text(summary(rows))]
    for part in (active, ended[:most_ended]):  # each as wide as it needs: what ended long ago takes no room from what runs
        printed += _part(part, now, width) if part else []
    if max_lines is not None and len(printed) > max_lines:
        cut = len(printed) - (max_lines - 1)
        printed = [*printed[: max_lines - 1], Text(f"... {cut} lines more", style="dim")]
    elif more := len(ended) - len(ended[:most_ended]) + num_older:
        printed += [Text(), Text(f"{more} more {'has' if more == 1 else 'have'} ended: crosscoder jobs --all", style="dim")]
    return printed


def _part(lines: Sequence[Line], now: float, width: int | None) -> "list[Text]":
    """An empty line, the header, and the lines."""
    from rich.text import Text

    layout = lay_out(COLUMNS, [cells(line, now, width) for line in lines], width)
    printed = [Text(), Text(layout.header, style="bold")]
    for line, texts in zip(lines, layout.rows, strict=True):
        is_all_well = line.rows[0].state == "finished"  # when it ended is worth no line of its own
        first, *rest = [Text(text) for text in (texts[:1] if is_all_well else texts)]
        first.stylize(COLORS.get(line.rows[0].state, ""), *layout.columns["STATE"])
        if line.rows[0].warning:
            first.stylize("yellow", max(end for _, end in layout.columns.values()))
            for text in rest:
                text.stylize("yellow")
        printed += [first, *rest]
    return printed


def cells(line: Line, now: float, width: int | None = None) -> list[str]:
    """The texts of a line, one for each of `COLUMNS`."""
    row, count = line.rows[0], len(line.rows)
    return [
        line.job,
        run_text(row, count, width),
        row.state if count == 1 else f"{count} {row.state}",
        _nodes(line.rows),
        _elapsed(line.rows),
        clock(row.limit_s) if row.state in ACTIVE and row.limit_s is not None else "",
        _done(line.rows),
        "; ".join(part for part in (row.warning, line.tasks, _detail(line, now)) if part),
    ]


def run_text(row: Row, count: int = 1, width: int | None = None) -> str:
    """`train/demo/k3f9`, as commands take it, with the task of a divided run where its job does not tell it; a long name loses its end."""
    if not row.run:
        return f"({row.name})"
    stage, name, identity = row.run.rsplit("/", 2)
    is_told = row.task is None or count > 1 or row.job.partition("_")[2] == str(row.task)  # the job's id says it
    task = "" if is_told else f" task {row.task}"
    most = None if width is None else 26 if width < NARROW else 38 if width < WIDE else 60
    room = None if most is None else max(9, most - len(f"{stage}//{identity[-4:]}{task}"))
    if room is not None and len(name) > room:
        name = f"{name[: room - 3]}..."
    return f"{stage}/{name}/{identity[-4:]}{task}"


def shortened(text: str) -> str:
    """`text` with references to runs as short as commands take them: `cache/demo/20261123-091529-x2aa` is `cache/demo/x2aa`."""
    return re.sub(r"([\w.-]+/[\w.-]+)/\d{8}-\d{6}-([0-9a-z]{4})\b", r"\1/\2", text)


def _nodes(rows: Sequence[Row]) -> str:
    nodes = list(dict.fromkeys(row.node for row in rows if row.node))
    return ",".join(nodes) if len(nodes) <= 2 else f"{len(nodes)} nodes"


def _elapsed(rows: Sequence[Row]) -> str:
    """Of several tasks the longest."""
    times = [row.elapsed_s for row in rows if row.elapsed_s is not None]
    return clock(max(times)) if times and rows[0].state not in ("waiting", "held") else ""


def _done(rows: Sequence[Row]) -> str:
    return _range([row.percent for row in rows if row.percent is not None and row.state == "running"])


def _range(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    low, high = int(min(shares)), int(max(shares))  # 99.9 % is not all
    return f"{high} %" if low == high else f"{low}-{high} %"


def _stopped(rows: Sequence[Row]) -> str:
    """`stopped at 43 %`, of the phase that it was in, where that is not the stage's only one."""
    known = [row for row in rows if row.stopped_at is not None]
    phases = list(dict.fromkeys(row.phase for row in known))
    of = f" of {phases[0]}" if len(phases) == 1 and not _says_nothing(known[0]) else ""
    return f"stopped at {_range([row.stopped_at for row in known if row.stopped_at is not None])}{of}" if known else ""


def _says_nothing(row: Row) -> bool:
    """Whether the phase is called as the stage is."""
    return not row.phase or row.phase == row.stage or (row.stage == "sweep" and row.phase in STAGES)


def _detail(line: Line, now: float) -> str:
    """What there is to say of the line's first row, or of all of them: pace and end, reason, or when it ended."""
    row = line.rows[0]
    # A reason that names the job holds for all of the line, whose job stands for theirs.
    reason = shortened(re.sub(rf"\b{re.escape(row.job)}\b", line.job, row.reason) if len(line.rows) > 1 and row.job else row.reason)
    if row.state == "running":
        return "; ".join(part for part in (reason, _pace(line.rows, now)) if part)
    parts = [reason, _stopped(line.rows)]
    if row.state in ACTIVE and row.starts is not None and row.starts > now and not row.reason.startswith("waits until"):
        parts.append(f"starts about {moment(row.starts, now)}")
    if row.state not in ACTIVE and row.ended is not None and not row.reason:
        parts.append(f"ended {moment(row.ended, now)}")
    return "; ".join(part for part in parts if part)


def _pace(rows: Sequence[Row], now: float) -> str:
    row = rows[0]
    parts = []
    if stopped := _stopped(rows):
        parts.append(f"{stopped} before")
    elif row.step is not None and len(rows) == 1:
        phase = "" if _says_nothing(row) else f"{row.phase} "
        parts.append(f"{phase}{amount(row.step, row.total, row.unit, '/')}")
    if rate := sum(r.rate or 0.0 for r in rows):
        parts.append(pace(rate, row.unit) + (" together" if len(rows) > 1 else ""))
    ends = [r.ends for r in rows if r.ends is not None]
    if ends:
        left = max(0.0, max(ends) - now)
        parts.append(("ends" if len(rows) == 1 else "the last ends") + f" {moment(max(ends), now)} ({roughly(left)})")
    return ", ".join(parts)


def roughly(seconds: float) -> str:
    """`45 s`, `25 min`, `5 h 10 min`: no finer than an estimate deserves."""
    return f"{round(seconds / 60)} min" if 90 <= seconds < 3570 else duration(seconds)


def moment(when: float, now: float) -> str:
    """`14:05`, with the day where it is another than today's, and the year likewise."""
    then = time.localtime(when)
    today = time.localtime(now)
    if then[:3] == today[:3]:
        return time.strftime("%H:%M", then)
    return time.strftime("%a %d %b %H:%M" if then[0] == today[0] else "%a %d %b %Y %H:%M", then)


def clock(seconds: float) -> str:
    """`1:02:03`, from a day on `2-01:02:03`, as squeue writes them."""
    whole = int(seconds)
    days, rest = divmod(whole, 86400)
    return (f"{days}-" if days else "") + f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
