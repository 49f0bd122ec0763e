"""The one door to programs outside: Slurm's commands, ssh and nvidia-smi, each with a time limit and a scrubbed environment.

Which cluster answers: the one that `SLURM_CONF` names; else, where it is unset, this clone's private cluster in
`.cluster/` while it runs; else the machine's own, whose configuration Slurm finds by itself. In a job it is the job's own.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from pipeline.config.clone import clone, is_frozen
from pipeline.config.errors import UserError
from slurm.client import processes

# What a user's shell may carry that changes what Slurm's commands do or print. SBATCH_* even wins over a script's own lines.
CALLERS_VARIABLES = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_")
PRIVATE_CLUSTER_NAME = "private"
"""Slurm's ClusterName of every private cluster."""
CLUSTER_STOPPED = "the private cluster is stopped; `make cluster` takes it up again"

TIMEOUT_S = 60.0
"""squeue gives up on a dead controller after 9 s and on a slow one after 20 s; this is for what hangs beyond that."""

SLURM_PROGRAMS = ("squeue", "sinfo", "scontrol", "scancel", "sbatch", "srun", "sacct", "sacctmgr")
PACKAGES = "slurmctld slurmd slurm-client munge"


class CommandFailed(UserError):
    """A program outside ended with an error; `exit_code` and `stderr` as it gave them."""

    def __init__(self, message: str, exit_code: int | None, stderr: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.stderr = stderr

    @property
    def is_without_cluster(self) -> bool:
        """Whether a command of Slurm found no configuration: it is installed on a machine that belongs to no cluster."""
        return any(words in self.stderr for words in ("configuration source", "DNS SRV"))


OUT_OF_CONTACT = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Zero Bytes were transmitted",
    "Communication connection failure",
    "Connection refused",
    "in standby",
    "no answer within",
)
"""Words of Slurm's commands, and of what gives them a time limit, when the controller is away, starts anew or is overloaded."""


def is_out_of_contact(error: UserError) -> bool:
    """Whether a command of Slurm failed since no controller answered: what it was asked may succeed a moment later."""
    said = f"{error} {error.stderr if isinstance(error, CommandFailed) else ''}"
    return any(words in said for words in OUT_OF_CONTACT)


class CommandMissing(UserError):
    """A program that is not installed on this machine."""


def private_cluster() -> Path:
    """Where `crosscoder cluster start` keeps the private cluster of this clone, unless it is told another place."""
    return clone() / ".cluster"


def environment(variables: Mapping[str, str] = os.environ, directory: Path | None = None) -> dict[str, str]:
    """`variables` without what the caller's shell tells Slurm's commands, and with the `SLURM_CONF` that holds here.

    For a submission too: `sbatch` takes `SBATCH_PARTITION` over the script's partition, and from inside a job `SLURM_*`
    of that job would describe the new one.
    """
    kept = {k: v for k, v in variables.items() if not k.startswith(CALLERS_VARIABLES)}
    configuration = variables.get("SLURM_CONF") or (None if is_frozen() else private_configuration(directory or private_cluster()))
    return {**kept, "SLURM_CONF": str(configuration)} if configuration else kept


def private_configuration(directory: Path) -> Path | None:
    """The `slurm.conf` of the private cluster in `directory`, if its controller runs."""
    configuration = directory.absolute() / "slurm.conf"
    if not os.access(configuration, os.R_OK):  # there is none, or it is another user's, whom alone it answers
        return None
    controller = processes.read_pids(directory.absolute()).get("slurmctld")
    return configuration if controller and processes.belongs_to(controller, configuration) else None


def stopped_private_cluster(directory: Path | None = None) -> Path | None:
    """The directory of the private cluster that would answer here, were it not stopped; None where it runs, or there is none.

    Its queue is kept there: what waits or was running is taken up when it is started again.
    """
    named = os.environ.get("SLURM_CONF")
    directory = directory or (Path(named).parent if named else private_cluster())
    settings, queue = directory / "slurm.conf", directory / "state" / "job_state"
    if (
        not (os.access(settings, os.R_OK) and os.access(queue, os.R_OK))
        or f"ClusterName={PRIVATE_CLUSTER_NAME}\n" not in settings.read_text()
    ):
        return None
    return None if private_configuration(directory) else directory


def check_configuration(variables: Mapping[str, str] | None = None) -> None:
    """Raises `UserError` if SLURM_CONF names a file that can't be read: every command of Slurm would try again for 60 s."""
    configuration = (os.environ if variables is None else variables).get("SLURM_CONF")
    if not configuration or os.access(configuration, os.R_OK):
        return
    try:
        os.stat(configuration)
    except FileNotFoundError:
        raise UserError(f"SLURM_CONF is {configuration}, which does not exist; unset it, or start that cluster") from None
    except OSError:
        pass
    raise UserError(f"SLURM_CONF is {configuration}, which you may not read: a private cluster answers its owner alone; unset it")


def is_installed(program: str = "squeue") -> bool:
    """Whether `program` can be called here; without argument, whether Slurm can."""
    return shutil.which(program) is not None


def run(*command: str, timeout_s: float = TIMEOUT_S, variables: Mapping[str, str] | None = None, stdin: str | None = None) -> str:
    """What `command` prints. `variables` replaces the environment that `environment` gives.

    Raises `CommandFailed` with the command, its exit code and its stderr (exit code None: it ran past `timeout_s` and was
    killed), `CommandMissing` where it is not installed.
    """
    variables = environment() if variables is None else variables
    check_configuration(variables)
    text = shlex.join(command)
    try:
        done = subprocess.run(
            command, env=dict(variables), capture_output=True, text=True, errors="replace", timeout=timeout_s, input=stdin
        )
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"`{text}` gave no answer within {timeout_s:g} s; is its machine or controller up?", None, "") from error
    except (FileNotFoundError, PermissionError):  # the latter where PATH names a directory that this user may not read
        hint = f"install Slurm (Debian, Ubuntu: {PACKAGES}), or use --executor local" if command[0] in SLURM_PROGRAMS else "install it"
        raise CommandMissing(f"{command[0]} is not installed on this machine; {hint}") from None
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or "it printed nothing"
        failed = CommandFailed(text, done.returncode, done.stderr.strip())
        is_unanswered = failed.is_without_cluster or "Unable to contact slurm controller" in failed.stderr
        if is_unanswered and command[0] in SLURM_PROGRAMS and stopped_private_cluster():
            raise CommandFailed(f"{CLUSTER_STOPPED}; or use --executor local or debug", done.returncode, done.stderr.strip())
        if failed.is_without_cluster:
            raise CommandFailed(
                "no Slurm answers here: its commands are installed, but this machine belongs to no cluster; `crosscoder cluster start` "
                f"starts a private one, or use --executor local or debug ({command[0]} found no configuration)",
                done.returncode,
                done.stderr.strip(),
            )
        raise CommandFailed(f'{command[0]} exited {done.returncode}: "{said}"; command: {text}', done.returncode, done.stderr.strip())
    return done.stdout
