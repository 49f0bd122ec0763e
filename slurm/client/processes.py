"""Processes of a private cluster: started detached, known by pid and by the `SLURM_CONF` in their environment.

A pid alone proves nothing after a reboot; a process whose environment names our configuration is ours. The pids are kept in
`<directory>/run/pids.json`, name to pid.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

POLL_SECONDS = 0.02


def pids_file(directory: Path) -> Path:
    return directory / "run" / "pids.json"


def read_pids(directory: Path) -> dict[str, int]:
    """The pids that the last start recorded; none where the record is missing or was cut short by a crash."""
    try:
        return {str(name): int(pid) for name, pid in json.loads(pids_file(directory).read_text()).items()}
    except (OSError, ValueError):
        return {}


def write_pids(directory: Path, pids: Mapping[str, int]) -> None:
    # Not fsynced as records are: a start writes it once a daemon, and what a power cut loses was of processes that it ended.
    temporary = pids_file(directory).with_suffix(".tmp")
    temporary.write_text(json.dumps(dict(pids), indent=1))
    temporary.replace(pids_file(directory))


def start(command: list[str], *, log: Path, variables: Mapping[str, str]) -> int:
    """The pid of `command`, started in a session of its own, its output appended to `log`."""
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    # Python ignores SIGPIPE and SIGXFSZ, and a daemon would hand that down to every job.
    pid = os.posix_spawnp(
        command[0], command, dict(variables), file_actions=actions, setsid=True, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ]
    )
    # For a moment after exec the kernel shows an empty environment, which would read as a process that is not ours.
    while not variables_of(pid) and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    return pid


def variables_of(pid: int) -> list[bytes]:
    """The environment of a process; empty for one that is gone, a zombie, or another user's."""
    try:
        return [variable for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if variable]
    except OSError:
        return []


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def belongs_to(pid: int, configuration: Path) -> bool:
    """Whether the process lives and was started with this `SLURM_CONF`."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # ours to reap if this very process started it
    return f"SLURM_CONF={configuration}".encode() in variables_of(pid)


def of_jobs(configuration: Path, *, node: str | None = None) -> Iterator[int]:
    """The pids of slurmstepd and of the jobs' own processes, on all nodes or on one.

    Each slurmstepd comes before what it watches, so that it is gone before it could tell how that ended. A shell that only
    exported `SLURM_CONF` is none of them.
    """
    steps: list[int] = []
    others: list[int] = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        pid = int(entry)
        variables = variables_of(pid)
        log = _log_of_step(pid, configuration)
        if pid == os.getpid() or not (log or f"SLURM_CONF={configuration}".encode() in variables):
            continue
        is_step = log is not None or "slurmstepd" in command_line(pid)
        in_job = any(v.startswith(b"SLURM_JOB_ID=") for v in variables)
        on_node = node is None or f"SLURMD_NODENAME={node}".encode() in variables or log == f"slurmd-{node}.log"
        if (is_step or in_job) and on_node:
            (steps if is_step else others).append(pid)
    yield from [*steps, *others]


def _log_of_step(pid: int, configuration: Path) -> str | None:
    """The name of its slurmd's log, if the process is a slurmstepd of this cluster, which keeps that log open.

    From 24.11 on, and maybe before, it writes its title over its environment, so nothing else tells whose it is.
    """
    if not command_line(pid).startswith("slurmstepd: "):
        return None
    logs = (configuration.parent / "log").resolve()
    with contextlib.suppress(FileNotFoundError, PermissionError):  # it has ended, or is another user's
        for link in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                target = Path(os.readlink(f"/proc/{pid}/fd/{link}"))
                if target.parent == logs:
                    return target.name
    return None


def signal_all(pids: Iterable[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end(pids: list[int], configuration: Path, *, patience_s: float) -> None:
    """Ends those of `pids` that are of this cluster: SIGTERM, and after `patience_s` SIGKILL. Returns when they are gone."""
    ours = [pid for pid in pids if belongs_to(pid, configuration)]
    signal_all(ours, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while (left := [pid for pid in ours if belongs_to(pid, configuration)]) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    signal_all(left)
    while any(belongs_to(pid, configuration) for pid in left):
        time.sleep(POLL_SECONDS)
