"""The live view: the jobs' table, and the last lines of a log below it. One squeue an interval, however many jobs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.record import run_directory
from slurm.record.run_directory import RunDirectory
from slurm.watching import job_listing

if TYPE_CHECKING:
    from rich.console import RenderableType

LOG_LINES = 12
TAIL_BYTES = 64 * 1024


def watch(
    site: Site, reference: str | None, *, interval_s: float, looks: int | None = None, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Shows the jobs every `interval_s` until Ctrl-C, or `looks` times. `reference` names a run whose log is shown too.

    A queue that does not answer for a while is said so above the last table, and asked again at the next interval.
    """
    from rich.console import Console
    from rich.live import Live

    run = run_directory.find(reference, site.runs.absolute()) if reference is not None else None
    console = Console()
    gathered, trouble = job_listing.gather(site, ask_accounting=False), ""
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        try:
            while True:
                live.update(view(gathered, run, height=console.height, interval_s=interval_s, trouble=trouble), refresh=True)
                if looks is not None and (looks := looks - 1) <= 0:
                    return
                sleep(interval_s)
                try:
                    gathered, trouble = job_listing.gather(site, ask_accounting=False), ""
                except UserError as error:
                    trouble = str(error)
        except KeyboardInterrupt:
            return


def view(
    gathered: job_listing.Gathered, run: RunDirectory | None, *, height: int, interval_s: float, trouble: str = "", now: float | None = None
) -> "RenderableType":
    """What is on the screen: the time, the table, and the end of the log of the run's liveliest task."""
    from rich.console import Group
    from rich.text import Text

    now = time.time() if now is None else now
    head = time.strftime("%H:%M:%S", time.localtime(now)) + f", every {interval_s:g} s; Ctrl-C ends the view, not the jobs"
    parts: list[RenderableType] = [Text(head, style="dim")]
    if trouble:
        parts.append(Text(trouble, style="red"))
    room = max(3, height - 5 - (LOG_LINES + 2 if run is not None else 0))
    parts.append(job_listing.table(gathered.rows(now), now=now, max_lines=room))
    if run is not None:
        path = newest_log(run)
        parts.append(Text(f"\n{path}" if path else f"\n{run.reference} has printed nothing yet", style="bold"))
        parts.append(Text("\n".join(last_lines(path, LOG_LINES)) if path else ""))
    return Group(*parts)


def newest_log(run: RunDirectory) -> Path | None:
    """The log that was written to last, of any task."""
    logs = [path for task in range(run.num_tasks) for path in run.log_files(task)[-1:]]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a file, however long it is; of a line that was rewritten in place its last form."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = text.split("\n")[1:] if size > TAIL_BYTES else text.split("\n")
    return [line.rpartition("\r")[2] for line in lines if line.strip()][-count:]
