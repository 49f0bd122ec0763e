"""Works on runs at this terminal: fresh ones in this process, earlier ones in a process on their frozen code."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from slurm.execution.frozen_code import frozen_variables
from slurm.execution.local_queue import give_up
from slurm.execution.terminal import logged_to
from slurm.execution.worker import STOPPED_CODE, work
from slurm.record.printable import print
from slurm.record.run_directory import RunDirectory
from slurm.submission.freezing import Planned


def run_here(planned: Sequence[Planned]) -> None:
    """Works on the planned runs in this process, in order; ends the process at the first that does not finish."""
    for position, item in enumerate(planned):
        if item.run is None:
            print(f"{item.config.stage} {item.config.name}: skipped; {item.skipped}")
            continue
        print(f"run {item.run.path}", flush=True)
        if code := _work_on_all(item.run):
            _give_up_rest(planned[position + 1 :], item.run)
            raise SystemExit(code)


def _work_on_all(run: RunDirectory) -> int:
    """The first exit code that is not 0. A task that fails ends a run that is divided, but not a sweep, whose tasks need no other."""
    codes = []
    for task in range(run.num_tasks):
        with logged_to(run.task_directory(task) / "log" / "terminal.log"):
            codes.append(work(run.path, task, frozen=False, interactive=True))
        if codes[-1] and (run.stage != "sweep" or codes[-1] == STOPPED_CODE):
            break
    return next((code for code in codes if code), 0)


def _give_up_rest(planned: Sequence[Planned], failed: RunDirectory) -> None:
    for item in planned:
        if item.run is not None:
            reason = f"{item.run.reference} was not started: {failed.reference}, which comes before it, did not finish"
            give_up(item.run, list(range(item.run.num_tasks)), reason)


def run_frozen_here(run: RunDirectory, tasks: Sequence[int]) -> int:
    """Works on tasks of an earlier run in a process on its frozen code, at this terminal; the first exit code that is not 0."""
    for task in tasks:
        command = [sys.executable, "-u", "-m", "slurm.execution.worker", str(run.path), str(task)]
        with _started(command, os.environ | frozen_variables(run)) as process:
            while True:
                try:
                    code = process.wait()
                    break
                except KeyboardInterrupt:  # the terminal sends it to the process too, which saves and stops
                    continue
        if code:
            return code
    return 0


def _started(command: Sequence[str], variables: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """The process. At a terminal Ctrl-C is blocked in it from its first moment; the worker unblocks it when it can save and stop."""
    blocked = {signal.SIGINT} if sys.stdin.isatty() else set()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        return subprocess.Popen(command, env=variables)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
