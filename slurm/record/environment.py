"""What a run's program runs in: interpreter, packages, torch, CUDA, driver, host. Torch is asked nothing, only looked up.

environment.json:

    {"python": "/home/ana/venv/bin/python", "python_version": "3.11.7", "platform": "Linux-6.1-x86_64", "host": "login1",
     "user": "ana", "torch": "2.13.0+cu130", "cuda": "13.0", "driver": "580.65", "gpus": ["NVIDIA H200"],
     "packages": {"numpy": "2.1.3", ...}}

Interpreter and packages are the run's; a job refuses to start with others. Host, driver and GPUs are those of the machine
that submitted; each attempt records its own.
"""

import getpass
import importlib.metadata
import platform
import re
import shutil
import socket
import subprocess
import sys
from typing import Any

from pipeline.config.errors import UserError

QUERY_TIMEOUT_SECONDS = 10


def describe() -> dict[str, Any]:
    """This process's environment."""
    packages = installed_packages()
    torch = packages.get("torch")
    return {
        "python": sys.executable,
        "python_version": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "user": user_name(),
        "torch": torch,
        "cuda": _cuda_of(torch),
        **gpus(),
        "packages": packages,
    }


def user_name() -> str:
    """The login name, or `uid 1234` where the system knows none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        import os

        return f"uid {os.getuid()}"


def installed_packages() -> dict[str, str]:
    """Version of each installed distribution, by its normalized name."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return dict(sorted(found.items()))


def _cuda_of(torch: str | None) -> str | None:
    """`13.0` of torch's `2.13.0+cu130`; None for a build without CUDA, or one whose version doesn't tell."""
    match = re.search(r"\+cu(\d+)(\d)$", torch or "")
    return f"{match[1]}.{match[2]}" if match else None


def gpus() -> dict[str, Any]:
    """Driver version and GPU names from nvidia-smi; None and [] where there is none or it fails."""
    nothing: dict[str, Any] = {"driver": None, "gpus": []}
    if shutil.which("nvidia-smi") is None:
        return nothing
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return nothing
    rows = [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line]
    return {"driver": rows[0][0], "gpus": [name for _, name in rows]} if done.returncode == 0 and rows else nothing


def check(recorded: dict[str, Any]) -> None:
    """Raises `UserError` naming each difference between the recorded interpreter and packages and this process's."""
    found = differences(recorded, {"python_version": platform.python_version(), "packages": installed_packages()})
    if found:
        shown = "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
        raise UserError(f"the environment is not the one that this run was frozen with: {shown}; restore it, or submit a new run")


def differences(recorded: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """One phrase for each of interpreter version and packages that is not as recorded."""
    found = []
    if recorded["python_version"] != present["python_version"]:
        found.append(f"python was {recorded['python_version']}, is {present['python_version']}")
    before, now = recorded["packages"], present["packages"]
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            found.append(f"{name} was {before.get(name, 'not installed')}, is {now.get(name, 'not installed')}")
    return found
