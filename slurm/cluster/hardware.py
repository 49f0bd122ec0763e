"""What this machine has: cores, memory and GPUs, for a private cluster that offers exactly that."""

import os
import pwd
import re
import socket
from pathlib import Path
from typing import NamedTuple

from slurm.client import slurm_commands
from slurm.cluster.layout import PARTITIONS, Gpu, Layout, Node

NVIDIA_FIELDS = "index,name,memory.total,memory.used,utilization.gpu"
RESERVED_SHARE = 0.05
"""Of the memory, for the system and the daemons."""

NO_GPU_CODES = (6, 9, 12)
"""Exit codes of nvidia-smi (its manual page): no such device, driver not loaded, NVML's library not found."""

_NOT_PART_OF_A_TYPE = re.compile(r"nvidia|tesla|geforce|quadro|graphics|device|generation|pcie|nvl|hbm\d\w*|sxm\d?|\d+gb", re.IGNORECASE)


class NvidiaGpu(NamedTuple):
    """A GPU as nvidia-smi tells it; memory in MiB; None where the driver says `[N/A]`."""

    number: int
    name: str
    memory_mib: int | None
    used_mib: int | None
    busy_percent: int | None


def parse_nvidia_smi(text: str) -> list[NvidiaGpu]:
    """The GPUs in what `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` printed for `NVIDIA_FIELDS`."""
    gpus = []
    for line in text.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == 5 and words[0].isdigit():
            numbers = [int(word) if word.isdigit() else None for word in words[2:]]
            gpus.append(NvidiaGpu(int(words[0]), words[1], *numbers))
    return gpus


def nvidia_smi_command() -> list[str]:
    return ["nvidia-smi", f"--query-gpu={NVIDIA_FIELDS}", "--format=csv,noheader,nounits"]


def local_gpus() -> list[NvidiaGpu]:
    """This machine's GPUs; none where nvidia-smi is missing or finds neither driver nor GPU. Raises where it fails otherwise."""
    if not slurm_commands.is_installed("nvidia-smi"):
        return []
    try:
        return parse_nvidia_smi(slurm_commands.run(*nvidia_smi_command(), variables=os.environ, timeout_s=30))
    except slurm_commands.CommandFailed as error:
        if error.exit_code in NO_GPU_CODES:
            return []
        raise


def type_name(name: str) -> str:
    """Slurm's name for a type of GPU: `NVIDIA A100-SXM4-80GB` is `a100`, `NVIDIA RTX A6000` is `rtxa6000`."""
    words = [word for word in re.split(r"[\s_-]+", name) if not _NOT_PART_OF_A_TYPE.fullmatch(word)]
    return re.sub(r"[^a-z0-9]", "", "".join(words).lower()) or "gpu"


def workstation(*, accounting: bool = False) -> Layout:
    """One node, named as the host, with this machine's cores, memory and GPUs."""
    gpus = local_gpus()
    devices = _device_files(len(gpus))
    node = Node(
        host_name(),
        len(os.sched_getaffinity(0)),
        _memory_mb(),
        tuple(Gpu(type_name(g.name), d) for g, d in zip(gpus, devices, strict=True)),
    )
    return Layout((node,), PARTITIONS, accounting=accounting)


def user_name() -> str:
    """Whose processes these are; the number for a user whom the system has no name for. Not $USER, which may be another's."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def host_name() -> str:
    return socket.gethostname().split(".")[0]


def address_of_name() -> str | None:
    """The IPv4 address that this machine's name stands for, as its programs are told; None if for none."""
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)[0][4][0])
    except OSError:
        return None


def _device_files(num_gpus: int, directory: Path = Path("/dev")) -> list[str]:
    """The device files of the GPUs in nvidia-smi's order.

    A container that was given some of a machine's GPUs has, say, /dev/nvidia3 alone, which nvidia-smi calls GPU 0: the n-th
    smallest number is the n-th GPU.
    """
    numbers = sorted(int(p.name.removeprefix("nvidia")) for p in directory.glob("nvidia[0-9]*") if p.name.removeprefix("nvidia").isdigit())
    if len(numbers) != num_gpus:
        return [str(directory / f"nvidia{n}") for n in range(num_gpus)]
    return [str(directory / f"nvidia{n}") for n in numbers]


def _memory_mb(meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """The memory that jobs may have, in MiB: the machine's, or its container's limit, less what the system needs."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    assert match, meminfo
    total = int(match[1]) // 1024
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text) >> 20)
    return int(total * (1 - RESERVED_SHARE))
