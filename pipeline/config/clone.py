"""Where the clone is: the site file is looked up in it, and relative roots and the private cluster lie in it, wherever a command is run."""

import json
import sysconfig
from pathlib import Path

import pipeline


def clone() -> Path:
    """The directory above the running `pipeline`; of code frozen into a run, the clone that it was frozen from.

    The current directory where the package is installed without a clone (in site-packages).
    """
    imported = _imported_from()
    origin = Path(json.loads((imported.parent / "code.json").read_text(encoding="utf-8"))["root"]) if is_frozen() else imported
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    is_installed = origin in installed or origin.name in ("site-packages", "dist-packages")
    return Path.cwd() if is_installed else origin


def is_frozen() -> bool:
    """Whether the running code is that of a run directory: a job's, which has all its paths in its record."""
    imported = _imported_from()
    return imported.name == "code" and all((imported.parent / name).is_file() for name in ("code.json", "job.json"))


def _imported_from() -> Path:
    return Path(pipeline.__file__).resolve().parents[1]
