"""The configurations that ship: those that git tracks, so that a user's own under configs/ are not tested."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def shipped_configs(folder: str) -> list[Path]:
    """The YAML files of configs/<folder>; all that are there where git can't tell."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", f"configs/{folder}/*.yaml"], capture_output=True, text=True, check=False)
    listed = [ROOT / name for name in done.stdout.split()] if done.returncode == 0 else []
    return listed or sorted((ROOT / "configs" / folder).glob("*.yaml"))
