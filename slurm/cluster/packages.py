"""Which of Slurm's packages a private cluster needs, and which this machine lacks."""

import re
import shutil

from pipeline.config.errors import UserError
from slurm.client import slurm_commands

# Daemons lie in sbin, which an ordinary user's PATH may not hold.
SBIN = "/usr/sbin:/usr/local/sbin:/sbin"

PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "squeue": "slurm-client", "munged": "munge"}
ACCOUNTING_PROGRAMS = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server", "mariadb-install-db": "mariadb-server"}
ACCOUNTING_PACKAGES = "slurmdbd slurm-wlm-mysql-plugin mariadb-server"


def find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path=SBIN)


def path(program: str) -> str:
    """Where `program` lies; `UserError` with the package to install where it does not."""
    found = find(program)
    if found is None:
        package = {**PROGRAMS, **ACCOUNTING_PROGRAMS}.get(program, program)
        raise UserError(f"{program} is not installed on this machine; get it with: {install_command([package])}")
    return found


def missing(*, accounting: bool = False) -> list[str]:
    """The packages (Debian's and Ubuntu's names) that this machine lacks, in a fixed order, without repeats."""
    programs = {**PROGRAMS, **(ACCOUNTING_PROGRAMS if accounting else {})}
    return list(dict.fromkeys(package for program, package in programs.items() if find(program) is None))


def install_command(names: list[str]) -> str:
    plugins = ["slurm-wlm-mysql-plugin"] if "slurmdbd" in names else []
    return f"sudo apt-get install -y --no-install-recommends {' '.join([*names, *plugins])}"


def version() -> tuple[int, int]:
    """The release of Slurm's daemons on this machine: (24, 11)."""
    answer = slurm_commands.run(path("slurmd"), "-V")
    found = re.search(r"(\d+)\.(\d+)", answer)
    if found is None:
        raise UserError(f"`slurmd -V` tells no version of Slurm: {answer.strip()!r}")
    return int(found[1]), int(found[2])


def require(*, accounting: bool) -> None:
    """Raises `UserError` naming what is missing and how to get it."""
    if names := missing(accounting=accounting):
        raise UserError(f"a private cluster needs {', '.join(names)}, not installed on this machine; get it with: {install_command(names)}")
