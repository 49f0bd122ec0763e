"""A stage's view of its run: where it writes, how it reports progress, and whether it has been asked to stop.

Stages get a `Run` and know nothing of who started them. `progress.json` in the run directory is the heartbeat that
`crosscoder jobs` reads; the same numbers go to the terminal, as one line rewritten in place, or to a log file, as a line
now and then.
"""

import json
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from pipeline import model_files, records
from pipeline.config.errors import UserError

HEARTBEAT_SECONDS = 2.0
FIRST_LINE_SECONDS, LAST_LINE_SECONDS = 5.0, 60.0


class Stopped(Exception):
    """The run was asked to stop and has saved what it had; started again it goes on from there."""


class Run:
    """One task of a run.

    Parameters
    ----------
    directory : where this task's records, metrics and checkpoints go.
    task, num_tasks : this task's place among those that divide the stage's work, 0 <= task < num_tasks.
    shared : where tasks that divide the work agree on inputs that the first of them to read it binds; None for a task alone.
    """

    def __init__(
        self,
        directory: Path,
        *,
        stage: str = "",
        task: int = 0,
        num_tasks: int = 1,
        shared: Path | None = None,
        output: TextIO | None = None,
    ) -> None:
        if not 0 <= task < num_tasks:
            raise ValueError(f"task {task} of {num_tasks}")
        self.directory = directory
        self._shared = shared
        self.stage = stage
        self.task = task
        self.num_tasks = num_tasks
        self.stop_reason: str | None = None
        self._output = output or sys.stdout
        self._on_terminal = self._output.isatty()
        self._lock = threading.Lock()
        self._started = time.time()
        self._phase: str | None = None
        self._phase_started = 0.0
        self._phase_first_step = 0
        self._last_heartbeat = 0.0
        self._last_line = 0.0
        self._line_interval = FIRST_LINE_SECONDS
        directory.mkdir(parents=True, exist_ok=True)

    # -- stopping -------------------------------------------------------------------------------------------------

    def request_stop(self, reason: str) -> None:
        """Asks the stage to save and stop. Safe in a signal handler: it only sets a value."""
        self.stop_reason = reason

    def check_stop(self) -> None:
        """Raises `Stopped` if a stop was requested. Call it wherever nothing is lost, every second or so of work."""
        if self.stop_reason is not None:
            raise Stopped(self.stop_reason)

    # -- progress -------------------------------------------------------------------------------------------------

    def report(self, phase: str, step: float, total: float | None, *, unit: str, done: bool = False, note: str = "") -> None:
        """Says that `step` of `total` units of `phase` are done. Cheap: files and terminal are touched at intervals.

        The rate is of this phase since its first report, so a resumed run does not count what it skipped.
        """
        now = time.monotonic()  # the clock of the day may be put back
        with self._lock:
            if phase != self._phase:
                self._phase, self._phase_started, self._phase_first_step = phase, now, int(step)
                self._last_heartbeat, self._line_interval = now - HEARTBEAT_SECONDS, FIRST_LINE_SECONDS
                self._last_line = now
            seconds = now - self._phase_started
            rate = (step - self._phase_first_step) / seconds if seconds > 0 else 0.0
            left = (total - step) / rate if total is not None and rate > 0 else None
            if done or now - self._last_heartbeat >= HEARTBEAT_SECONDS:
                self._last_heartbeat = now
                beat = {"stage": self.stage, "task": self.task, "num_tasks": self.num_tasks, "phase": phase, "step": step, "total": total}
                beat |= {"unit": unit, "rate": rate, "seconds_left": left, "time": time.time(), "started": self._started, "note": note}
                records.write_json(self.directory / "progress.json", beat)
                if self._on_terminal:
                    self._output.write("\r\x1b[2K" + _line(self.stage, phase, step, total, unit, rate, left, note)[:160])
                    self._output.flush()
            if (done or now - self._last_line >= self._line_interval) and not self._on_terminal:
                self._last_line, self._line_interval = now, min(2 * self._line_interval, LAST_LINE_SECONDS)
                print(_line(self.stage, phase, step, total, unit, rate, left, note), file=self._output, flush=True)
            if done and self._on_terminal:
                self._output.write("\n")
                self._output.flush()

    def say(self, text: str) -> None:
        """Prints one line of its own, above the progress line where there is one."""
        with self._lock:
            self._output.write(("\r\x1b[2K" if self._on_terminal else "") + text + "\n")
            self._output.flush()

    # -- records --------------------------------------------------------------------------------------------------

    def bind_input(self, field: str, identity: str, files: Mapping[str, str] | None = None) -> None:
        """Records the identity (data id or hash) of an input that was opened, or checks it against the one recorded before.

        files : the hash of each file that it was made of, for a language model or tokenizer.
        Raises `UserError` if the run was frozen, or began, with other content.
        """
        path = self.directory / "inputs.json"
        inputs = records.read_json(path) if path.exists() else {}
        entry = inputs.get(field, {})
        now: dict[str, Any] = {"data_id": identity} | ({} if files is None else {"files": dict(files)})
        if now.keys() - entry.keys():
            entry = now | entry
            if self._shared is not None:  # the first task decides for all
                entry = records.write_once(self._shared / "bound" / f"{field}.json", entry)
            records.write_json(path, inputs | {field: entry})
        if changed := model_files.changed_files(entry, now):
            of = f" ({entry['name']})" if "name" in entry else ""
            raise UserError(
                f"input {field}{of} is not what this run began with: {', '.join(changed)}; put back what it was, or submit a new run"
            )
        if (known := entry["data_id"]) != identity:
            raise UserError(f"input {field} is {identity[:12]}, but this run began with {known[:12]}: the data changed; submit a new run")

    def log_metrics(self, row: dict[str, Any]) -> None:
        """Appends one row to `metrics.jsonl`; `row` holds at least `step`."""
        with records.open_to_append(self.directory / "metrics.jsonl") as file:
            file.write((json.dumps(row) + "\n").encode())

    def rewind_metrics(self, step: int) -> None:
        """Drops the rows after `step`, and a half-written last one: for a run that resumes from a checkpoint at `step`."""
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["step"] <= step:
                kept.append(line)
        with records.atomic_file(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())


def _line(stage: str, phase: str, step: float, total: float | None, unit: str, rate: float, left: float | None, note: str) -> str:
    share = f"{100 * step / total:5.1f} %  " if total else ""
    ends = f"  {duration(left)} left" if left is not None else ""
    named = stage if phase == stage else f"{stage} {phase}"
    speed = f"  {pace(rate, unit)}" if rate > 0 else ""  # of one report there is none
    return f"{named}  {share}{amount(step, total, unit)}{speed}{ends}" + (f"  {note}" if note else "")


BYTES = "bytes of "
"""How the unit of what is counted in bytes begins: `bytes of files`."""


def amount(step: float, total: float | None, unit: str, between: str = " of ") -> str:
    """How much of something is done: `250 of 1,000 steps`, `12.3 MB of 4.56 GB of files`."""
    number = byte_size if unit.startswith(BYTES) else quantity
    return f"{number(step)}{f'{between}{number(total)}' if total else ''} {unit.removeprefix('bytes ')}".rstrip()


def pace(rate: float, unit: str) -> str:
    """How much of `unit` goes by in a second; of what is slow, in a minute or an hour."""
    number = byte_size if unit.startswith(BYTES) else quantity
    name, seconds = next(((name, seconds) for name, seconds in (("s", 1), ("min", 60)) if rate * seconds >= 0.1), ("h", 3600))
    return f"{number(rate * seconds)}/{name}"


def quantity(value: float) -> str:
    """A number in at most four figures: 950, 12.3k, 4.56M, 7.89G."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if suffix == "k" else limit)
            return f"{scaled:.3g}{suffix}" if scaled < 1000 else f"{scaled:.0f}{suffix}"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{round(value, 4):.3g}"


def byte_size(count: float) -> str:
    """A number of bytes in at most four figures: 16 bytes, 12.35 kB, 4.56 MB, 3.072 TB; a kB is 1,000 bytes."""
    if count < 999.5:
        return "1 byte" if round(count) == 1 else f"{round(count)} bytes"
    unit, scale = next(((unit, scale) for unit, scale in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9)) if count / scale < 999.95), ("TB", 1e12))
    return f"{count / scale:,.4g} {unit}" if count / scale < 9999.5 else f"{count / scale:,.0f} {unit}"


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 3 min 20 s, 5 h 10 min, 2 d 3 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
