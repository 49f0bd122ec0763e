"""One process at a time holds a task: the lock that keeps two from writing the same checkpoints.

`lock.json` in the task directory:

    {"token": "8c1f...", "host": "n1", "pid_namespace": "pid:[4026531836]", "pid": 4711, "process_started": 88231,
     "job": "1042_0", "restart": 1, "time": 1795424131.2}

The holder touches it every `BEAT_SECONDS` and looks whether it is still its own. Who finds a lock takes it over when its
process is gone (same host), when it hasn't been touched for `STALE_SECONDS` (another host), or when it belongs to an
earlier attempt of the same job: Slurm runs a job again when it lost a node whose processes may go on. The process that
lost its lock ends at once, without saving; every file of a run is written whole or not at all, so nothing is torn.
"""

import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record.printable import print

BEAT_SECONDS = 2.0
STALE_SECONDS = 30.0
LOST_EXIT_CODE = 75
HALF_MADE_SECONDS = 5.0
"""How long an empty lock may be one that is just being made."""

Lock = dict[str, Any]

_NOBODY: Lock = {"token": "", "host": "", "pid_namespace": "", "pid": 0, "process_started": None, "job": "", "restart": 0, "time": 0.0}


class Holder:
    """The lock of the task in `directory`, taken for the length of a `with` block.

    Raises `UserError` on entering when another process holds the task.
    """

    def __init__(self, directory: Path, *, job: str, restart: int) -> None:
        self.path = directory / "lock.json"
        self.lock: Lock = {
            "token": secrets.token_hex(8),
            "host": socket.gethostname(),
            "pid_namespace": _pid_namespace(),
            "pid": os.getpid(),
            "process_started": process_started(os.getpid()),
            "job": job,
            "restart": restart,
            "time": time.time(),
        }
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> "Holder":
        while not self._create():
            other = read_lock(self.path)
            if other is not None:
                self._take_from(other)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._released.set()
        self._thread.join()
        if (read_lock(self.path) or {}).get("token") == self.lock["token"]:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        os.close(descriptor)
        try:
            records.write_json(self.path, self.lock)
        except BaseException:  # a full disk: an empty lock would keep others waiting
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _take_from(self, other: Lock) -> None:
        """Removes the lock `other`, once nobody works under it; raises `UserError` if somebody does."""
        earlier_attempt = other["job"] == self.lock["job"] and other["restart"] < self.lock["restart"]
        if earlier_attempt and not is_dead(self.path, other):
            records.write_json(self.path, self.lock)  # the other sees it at its next beat and ends
            _wait_until_gone(other)
        elif not is_dead(self.path, other):
            raise UserError(
                f"{self.path.parent} is being worked on by process {other['pid']} on {other['host']} (job {other['job']}): one at a "
                "time; wait for it, or cancel it first"
            )
        aside = self.path.with_name(f".lock.{self.lock['token']}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        moved = read_lock(aside)
        if moved is not None and moved["token"] not in (other["token"], self.lock["token"]):  # a third was quicker: give it back
            os.replace(aside, self.path)
        else:
            aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                lock = read_lock(self.path)
                if lock is None or lock["token"] != self.lock["token"]:
                    self._lost(lock)
                os.utime(self.path, follow_symlinks=False)
            except OSError:  # a file system that fails for a moment, or a lock deleted this instant: the next beat looks again
                continue

    def _lost(self, lock: Lock | None) -> NoReturn:
        by = f"process {lock['pid']} on {lock['host']} (job {lock['job']}) took it over" if lock else "its lock was deleted"
        print(f"{self.path.parent}: {by}; this process ends without saving", file=sys.stderr, flush=True)
        os._exit(LOST_EXIT_CODE)


def read_lock(path: Path, *, patience_seconds: float | None = None) -> Lock | None:
    """The lock at `path`; None where there is none. An empty one, just being made, is waited for; then nobody holds it."""
    deadline = time.monotonic() + (HALF_MADE_SECONDS if patience_seconds is None else patience_seconds)
    while True:
        try:
            return dict(records.read_json(path))
        except UserError:
            if not path.exists():
                return None
            if time.monotonic() > deadline:
                return dict(_NOBODY)
            time.sleep(0.02)


def is_dead(path: Path, lock: Lock) -> bool:
    """Whether nobody works under `lock` any more. Waits up to `STALE_SECONDS` where only a missing beat can tell."""
    if not lock["token"]:
        return True
    if _is_here(lock):
        return not _lives(lock)
    first = _touched(path)
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(BEAT_SECONDS, STALE_SECONDS) / 4)
        if _touched(path) != first:
            return False
    return True


def looks_held(path: Path) -> bool:
    """Whether the lock at `path` was touched lately or its process lives; a quick look that never waits."""
    lock = read_lock(path, patience_seconds=0.0) if path.exists() else None
    if lock is None:
        return False
    if _is_here(lock):
        return _lives(lock)
    touched = _touched(path)
    # A touch from the future is of a clock that was put back since: it says no more than one from as long ago.
    return touched is not None and abs(time.time() - touched) < (4 * STALE_SECONDS if lock["token"] else HALF_MADE_SECONDS)


def process_started(pid: int) -> int | None:
    """When the process began, in clock ticks since boot; None if it has ended. With the pid it names a process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")  # a name is cut at 15 bytes, in the middle of a letter
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _lives(lock: Lock) -> bool:
    return bool(process_started(lock["pid"]) == lock["process_started"])


def _is_here(lock: Lock) -> bool:
    return bool(lock["host"] == socket.gethostname() and lock["pid_namespace"] == _pid_namespace())


def _pid_namespace() -> str:
    """Containers of one host name number their processes apart."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _touched(path: Path) -> float | None:
    try:
        with open(path, "rb") as file:  # opening makes network file systems ask the server anew
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _wait_until_gone(other: Lock) -> None:
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        if _is_here(other) and not _lives(other):
            return
        time.sleep(0.1)
