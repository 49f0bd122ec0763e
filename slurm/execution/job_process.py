"""Which process of which job this is, and how the processes of one task find each other."""

import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

from pipeline import records
from pipeline.config.errors import UserError

MEETING_TIMEOUT_SECONDS = 120.0


class Process(NamedTuple):
    """This process among those of its job."""

    executor: str
    """slurm, local, or run for a process outside any queue."""
    job: str
    """`1042`, `1042_3` for a task of an array, a process id outside Slurm."""
    restart: int
    """How many times Slurm has started this job before."""
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def this_process() -> Process:
    """From what Slurm or submitit put into the environment; only a step that submitit started counts as a job of ours."""
    env = os.environ
    kind = env.get("SUBMITIT_EXECUTOR", "run")
    if kind == "slurm" and "SLURM_JOB_ID" in env:
        array = env.get("SLURM_ARRAY_JOB_ID")
        job = f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"]
        world_size, nodes = int(env.get("SLURM_NTASKS", "1")), int(env.get("SLURM_JOB_NUM_NODES", "1"))
        ranks = (int(env.get("SLURM_PROCID", "0")), world_size, int(env.get("SLURM_LOCALID", "0")), world_size // nodes)
        return Process("slurm", job, int(env.get("SLURM_RESTART_COUNT", "0")), *ranks)
    if kind == "local" and "SUBMITIT_LOCAL_JOB_ID" in env:
        rank, world_size = int(env["SUBMITIT_LOCAL_GLOBALID"]), int(env["SUBMITIT_LOCAL_NTASKS"])
        return Process("local", env["SUBMITIT_LOCAL_JOB_ID"], 0, rank, world_size, rank, world_size)
    return Process("run", str(os.getpid()), 0, 0, 1, 0, 1)


def join_group(process: Process, directory: Path) -> None:
    """Sets what `torch.distributed.init_process_group("env://")` reads; nothing for a task of one process.

    Rank 0 says through a file in the run directory where it listens: node names of a cluster need not resolve.
    CUDA_VISIBLE_DEVICES stays as Slurm set it; a program takes device `LOCAL_RANK % device_count`.
    """
    if process.world_size == 1:
        return
    path = directory / "ranks" / f"meeting-{process.job}-{process.restart}.json"
    if process.rank == 0:
        records.write_json(path, {"address": _own_address(alone=process.local_world_size == process.world_size), "port": _free_port()})
    meeting = _wait_for(path)
    os.environ |= {
        "MASTER_ADDR": str(meeting["address"]),
        "MASTER_PORT": str(meeting["port"]),
        "RANK": str(process.rank),
        "WORLD_SIZE": str(process.world_size),
        "LOCAL_RANK": str(process.local_rank),
        "LOCAL_WORLD_SIZE": str(process.local_world_size),
    }


def _own_address(*, alone: bool) -> str:
    """An address of this host that the task's other hosts can reach: the first of its names that resolves to one."""
    if alone:
        return "127.0.0.1"
    for name in (os.environ.get("SLURMD_NODENAME", ""), socket.getfqdn(), socket.gethostname()):
        try:
            address = str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0]) if name else ""
        except OSError:
            continue
        if address and not address.startswith("127."):
            return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing: only asks which interface would be used
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _wait_for(path: Path) -> dict[str, object]:
    deadline = time.monotonic() + MEETING_TIMEOUT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{path} did not appear within {MEETING_TIMEOUT_SECONDS:.0f} s: the process of rank 0 did not start; see its log"
            )
        time.sleep(0.1)
    return dict(records.read_json(path))
