"""GPUs of machines outside Slurm, which the site file names: asked over ssh with nvidia-smi, all at once."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pipeline.config.errors import UserError
from slurm.client import slurm_commands
from slurm.cluster import hardware
from slurm.cluster.hardware import NvidiaGpu

CONNECT_S, ANSWER_S = 10, 20.0
"""Until a machine counts as unreachable, and until an answer is given up."""
# BatchMode: a machine that wants a password is an error, not a prompt.
SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}")
IN_USE_MIB = 500
"""A GPU with more of its memory taken, or with work on it, counts as used: outside Slurm nobody allots them."""


class Machine(NamedTuple):
    """What one machine answered; `error` says why nothing came."""

    host: str
    gpus: list[NvidiaGpu]
    error: str = ""


def ask(host: str) -> Machine:
    """The GPUs of `host` now. Never raises for a machine that doesn't answer: that is its `error`."""
    try:
        text = slurm_commands.run("ssh", *SSH_OPTIONS, "--", host, " ".join(hardware.nvidia_smi_command()), timeout_s=ANSWER_S)
    except slurm_commands.CommandFailed as error:
        if error.exit_code in (127, *hardware.NO_GPU_CODES):
            return Machine(host, [], "has no GPU that nvidia-smi knows")
        return Machine(host, [], error.stderr.splitlines()[-1] if error.stderr else str(error))
    except UserError as error:
        return Machine(host, [], str(error))
    return Machine(host, hardware.parse_nvidia_smi(text))


def ask_all(hosts: Sequence[str]) -> list[Machine]:
    """The machines' answers in the order of `hosts`; the slowest decides how long it takes."""
    if not hosts:
        return []
    with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
        return list(pool.map(ask, hosts))


def is_in_use(gpu: NvidiaGpu) -> bool:
    return (gpu.used_mib or 0) > IN_USE_MIB or (gpu.busy_percent or 0) > 0
