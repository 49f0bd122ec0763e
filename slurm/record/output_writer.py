"""One run at a time writes a data set: the tasks of one array together, two runs never.

The lock is a file beside the data set, `.<name>.writer`, held with flock as long as a process of the run works, also between
the nodes of a file system that carries such locks; the kernel lets go of it when a process ends, however it ends. It says who holds it:

    {"run": "/runs/cache/demo/20261123-091530-k3f9", "host": "n1", "pid": 4711, "job": "1042_0"}

The processes of a run share the lock. On a file system without locks nothing is held.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config.errors import UserError
from slurm.record.activity import NO_LOCKS
from slurm.record.run_directory import RunDirectory

PATIENCE_SECONDS = 5.0
"""The lock is held for one alone only while a process writes into it who it is."""


@contextlib.contextmanager
def only_writer(outputs: Iterable[Path], run: RunDirectory, job: str) -> Iterator[None]:
    """While the block runs, no process of another run writes to `outputs`.

    Raises `UserError` naming the run that does.
    """
    with contextlib.ExitStack() as held:
        for output in sorted({path.absolute() for path in outputs}):
            held.enter_context(_held(output, run, job))
        yield


@contextlib.contextmanager
def _held(output: Path, run: RunDirectory, job: str) -> Iterator[None]:
    path = output.with_name(f".{output.name}.writer")
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        descriptor = _open(path)
        try:
            if (other := _take(descriptor, path, run, job)) is None:
                yield
                _remove_if_last(descriptor, path)
                return
        finally:
            os.close(descriptor)
        if time.monotonic() > deadline:
            place = f"process {other.get('pid', '?')} on {other.get('host', '?')}, job {other.get('job', '?')}"
            raise UserError(
                f"{output} is being written by {other.get('run', 'another run')} ({place}): one run at a time; wait for it, cancel it, "
                "or choose another output"
            )
        time.sleep(0.1)


def _open(path: Path) -> int:
    """A descriptor of the lock's file, made if it is missing. Raises `UserError` for anything else that lies there: it is overwritten."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:  # another user's, who shares the directory and writes, or wrote and was killed
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        if not _lock(descriptor, fcntl.LOCK_EX):
            return descriptor
        path.unlink(missing_ok=True)
        os.close(descriptor)
        return _open(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link, expected a lock that this program made; remove it") from None
        raise
    text = os.pread(descriptor, 10_000, 0)
    if text and not text.startswith(b'{"run"'):
        os.close(descriptor)
        raise UserError(f"{path} is not a lock that this program made; move it away")
    return descriptor


def _take(descriptor: int, path: Path, run: RunDirectory, job: str) -> dict[str, Any] | None:
    """Takes the open lock for `run`, alone to write who it is and then shared; gives the holder if it is another's."""
    try:
        if _lock(descriptor, fcntl.LOCK_EX):
            me = {"run": str(run.path), "host": socket.gethostname(), "pid": os.getpid(), "job": job}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(me).encode(), 0)
        if not _lock(descriptor, fcntl.LOCK_SH):
            return _holder(descriptor)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    holder = _holder(descriptor)
    is_current = path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino  # not one that was removed meanwhile
    return None if is_current and holder.get("run") == str(run.path) else holder


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        return dict(json.loads(os.pread(descriptor, 10_000, 0)))
    except ValueError:
        return {}


def _remove_if_last(descriptor: int, path: Path) -> None:
    """Removes the file while it is locked for this process alone; who opened it meanwhile sees that it is gone."""
    with contextlib.suppress(OSError):
        if _lock(descriptor, fcntl.LOCK_EX):
            path.unlink(missing_ok=True)
