"""What a process of the local executor does: wait for the runs before, then the tasks, a few at a time, within the limit."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from pipeline import records
from pipeline.config.resources import Resources
from slurm.execution.frozen_task import FrozenTask
from slurm.record.holder import process_started
from slurm.record.printable import print
from slurm.record.run_directory import RunDirectory

POLL_SECONDS = 0.2
THREADS = "OMP_NUM_THREADS"
"""What torch, and whatever else uses OpenMP, takes as its number of threads; all cores where it is not set."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Share(NamedTuple):
    """How the tasks of a run share this machine: so many at once, each with so many threads a process."""

    num_parallel: int
    num_threads: int


def share_of(resources: Resources, num_tasks: int, num_cores: int) -> Share:
    """As many tasks at once as the cores allow at `cpus` a process, and `max_parallel` at most; each gets its part of the cores.

    Tasks with GPUs would all see the same ones: one at a time, unless `max_parallel` says more.
    """
    allowed = max(1, num_cores // (resources.cpus * resources.tasks_per_node))
    wanted = resources.max_parallel or (1 if resources.gpus else num_tasks)
    num_parallel = min(num_tasks, allowed, wanted)
    return Share(num_parallel, max(1, num_cores // (num_parallel * resources.tasks_per_node)))


class LocalQueue:
    """As submitit pickles it: plain values only.

    Several tasks are processes of their own, at most `max_parallel` at once; a single one is this process.
    `limit_seconds` holds for each task, from its start: shortly before, it is told to save and stop.
    """

    def __init__(self, directory: str, tasks: list[int], max_parallel: int, after: list[str], limit_seconds: float) -> None:
        self.directory = directory
        self.tasks = tasks
        self.max_parallel = max_parallel
        self.after = after
        self.limit_seconds = limit_seconds

    def __call__(self) -> None:
        """Works until nothing is left; ends the process with a task's exit code unless all finished."""
        if reason := wait_for_parents([RunDirectory(Path(path)) for path in self.after]):
            give_up(RunDirectory(Path(self.directory)), self.tasks, reason)
            raise SystemExit(1)
        if len(self.tasks) == 1:
            _signal_before(self.limit_seconds, os.getpid())
            FrozenTask(self.directory, self.tasks[0])()
            return
        codes = self._work_beside()
        if any(codes):
            raise SystemExit(max(codes))

    def _work_beside(self) -> list[int]:
        """Exit codes of a process a task. A signal to stop goes to those that run; the others are not started."""
        print(f"{len(self.tasks)} tasks, {self.max_parallel} at a time, {THREADS}={os.environ.get(THREADS, 'all')}", flush=True)
        stopping: list[int] = []
        former = {number: signal.signal(number, lambda n, _: stopping.append(n)) for number in STOP_SIGNALS}
        waiting, codes = list(self.tasks), list[int]()
        running: list[subprocess.Popen[bytes]] = []
        while running or (waiting and not stopping):
            while waiting and len(running) < self.max_parallel and not stopping:
                command = [sys.executable, "-u", "-m", "slurm.execution.local_queue", self.directory, str(waiting.pop(0))]
                running.append(subprocess.Popen(command))
                _signal_before(self.limit_seconds, running[-1].pid)
            for number in stopping[:1]:
                for process in running:
                    process.send_signal(number)
                stopping = [0]  # passed on; nothing more is started
            codes += [code for process in running if (code := process.poll()) is not None]
            running = [process for process in running if process.returncode is None]
            time.sleep(POLL_SECONDS)
        for number, handler in former.items():
            signal.signal(number, handler)
        return [abs(code) for code in codes]


def _signal_before(limit_seconds: float, pid: int) -> None:
    """Sends USR2 to the process shortly before `limit_seconds` from now are over, and KILL when they are."""
    delay = min(180.0, 0.1 * limit_seconds)
    for seconds, number in ((limit_seconds - delay, signal.SIGUSR2), (limit_seconds, signal.SIGKILL)):
        timer = threading.Timer(seconds, _send, (pid, process_started(pid), number))
        timer.daemon = True
        timer.start()


def _send(pid: int, started: int | None, number: int) -> None:
    if started is not None and process_started(pid) == started:
        os.kill(pid, number)


def wait_for_parents(parents: list[RunDirectory]) -> str | None:
    """Waits until every parent has finished; gives the reason at once if one can't any more.

    A signal to stop ends the waiting too, with the signal's default action.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_waiting)
    for parent in parents:
        while (state := parent.state()) != "finished":
            if state in ("failed", "stopped", "cancelled") or not _has_process(parent):
                if parent.state() == "finished":
                    break
                return f"not started: {parent.reference}, which it waited for, did not finish ({parent.state()})"
            time.sleep(POLL_SECONDS)
    return None


def _stop_waiting(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _has_process(run: RunDirectory) -> bool:
    """Whether a process of the local executor still works on the run."""
    jobs = run.job()["jobs"]
    return bool(jobs) and any(process_started(int(entry["id"])) is not None for entry in jobs)


def give_up(run: RunDirectory, tasks: list[int], reason: str) -> None:
    """Records that the tasks failed without having been started."""
    for task in tasks:
        now = time.time()
        record = {
            "status": "failed",
            "started": now,
            "ended": now,
            "job": run.job_of_task(task),
            "restart": 0,
            "error": reason,
            "result": None,
        }
        records.write_json(run.task_directory(task) / "result.json", record)
    print(reason, flush=True)


def main() -> None:
    """`python -m slurm.execution.local_queue DIRECTORY TASK`: one task of several, with its own log."""
    FrozenTask(sys.argv[1], int(sys.argv[2]))()


if __name__ == "__main__":
    main()
