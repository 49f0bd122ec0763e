"""The live view: the jobs' table, and the last lines of a log below it. One squeue an interval, however many jobs."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.record.printable import cleaned, last_form
from slurm.record.run_reference import Named, find
from slurm.watching import job_listing, job_table
from slurm.watching.job_listing import Gathered
from slurm.watching.keyboard import Keyboard

if TYPE_CHECKING:
    from rich.text import Text

LOG_LINES = 12
TAIL_BYTES = 64 * 1024
KEY_WAIT_S = 0.2
QUIT_KEYS = ("q", "Q", "\x1b")


class Looker:
    """Looks at queue and run directories in a thread of its own: a controller that hangs must not hold up the keyboard."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.gathered: Gathered | None = None
        """What the last look that succeeded saw."""
        self.seen = 0.0
        """When that was."""
        self.trouble = ""
        """Why the newest look failed; empty if it did not."""
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a look is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begins a look. A daemon thread: whoever quits does not wait for a controller that gives no answer."""
        self._thread = threading.Thread(target=self.look, daemon=True)
        self._thread.start()

    def look(self) -> None:
        """One look, now."""
        try:
            self.gathered, self.seen, self.trouble = job_listing.gather(self.site, ask_accounting=False), time.time(), ""
        except UserError as error:
            self.trouble = str(error)
        except FileNotFoundError as error:  # a run that was deleted while it was being read
            self.trouble = f"{error.filename} went away while it was read"


def watch(site: Site, reference: str | None, *, interval_s: float, looks: int | None = None, keyboard: Keyboard | None = None) -> None:
    """Shows the jobs, looked at every `interval_s`, until q or Ctrl-C, or `looks` times; `reference` names what has its log shown.

    A queue that does not answer is said so above the last table, and asked again at the next interval.
    """
    from rich.console import Console, Group
    from rich.live import Live

    named = find(reference, site.runs) if reference is not None else None
    if sys.stdout.isatty():
        for variable in ("LINES", "COLUMNS"):  # a size that a shell exported would hold, whatever size the terminal gets
            os.environ.pop(variable, None)
    console, looker = Console(), Looker(site)
    if looks is None and not console.is_terminal:
        raise UserError("watch needs a terminal; `crosscoder jobs` prints the table once")
    next_look, left, drawn = 0.0, looks, None
    with keyboard or Keyboard() as keys, Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        try:
            while True:
                now = time.monotonic()
                if not looker.is_busy and left != 0 and now >= next_look:
                    looker.start()
                    next_look, left = now + interval_s, None if left is None else left - 1
                is_last = left == 0 and not looker.is_busy
                state = (console.size, looker.seen, looker.trouble, int(now))
                if is_last or (console.is_terminal and state != drawn):
                    drawn, (width, height) = state, console.size
                    live.update(Group(*view(looker, named, width=width, height=height, interval_s=interval_s)), refresh=True)
                if is_last or keys.next(0.05 if looker.is_busy else KEY_WAIT_S) in QUIT_KEYS:
                    return
        except KeyboardInterrupt:
            return


def view(looker: Looker, named: Named | None, *, width: int, height: int, interval_s: float, now: float | None = None) -> "list[Text]":
    """The lines on the screen, at most `height` of at most `width`: the time, the table, the end of the liveliest log of what is named."""
    from rich.text import Text

    now = time.time() if now is None else now
    head = time.strftime("%H:%M:%S", time.localtime(now)) + f", every {interval_s:g} s; q or Ctrl-C ends the view, not the jobs"
    lines = [Text(head, style="dim")]
    if looker.trouble:
        since = f" since {time.strftime('%H:%M:%S', time.localtime(looker.seen))}" if looker.gathered else ""
        lines.append(Text(f"no answer{since}, asking on: {looker.trouble}", style="red"))
    elif looker.gathered is None:
        lines.append(Text("asking Slurm ...", style="dim"))
    log = _log_lines(named, min(LOG_LINES, height // 3)) if named is not None else []
    if looker.gathered is not None:
        room = max(2, height - len(lines) - 1 - (len(log) + 1 if log else 0))
        table = job_table.table(looker.gathered.rows(now), now=now, width=width, num_older=looker.gathered.num_older, max_lines=room)
        lines += [Text(), *table]
    if log:
        path, *rest = log
        lines += [Text(), Text(path, style="bold"), *(Text(line) for line in rest)]
    lines = [cleaned(line) for line in lines]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return lines[:height]


def _log_lines(named: Named, count: int) -> list[str]:
    path = newest_log(named)
    return [str(path), *last_lines(path, count)] if path else [f"{named.reference} has printed nothing yet"]


def newest_log(named: Named) -> Path | None:
    """The log that was written to last, of a whole run of any of its tasks."""
    logs = [path for task in named.tasks for path in named.run.log_files(task)[-1:]]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a file, however long it is; of a line that was rewritten in place its last form."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = text.split("\n")[1:] if size > TAIL_BYTES else text.split("\n")
    return [last_form(line) for line in lines if line.strip()][-count:]
