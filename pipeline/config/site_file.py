"""What belongs to the cluster and not to an experiment: roots for data, fast SSD and runs, and submission defaults.

Read from the file that `CROSSCODER_SITE` names, else `configs/site.yaml`, else the defaults below. Relative roots are
relative to the current directory, so a checkout without a site file keeps all it makes in itself.
"""

import os
from pathlib import Path
from typing import Any

from pipeline.config import yaml_file
from pipeline.config.errors import UserError
from pipeline.config.schema import Config, DataPath, build

SITE_FILE = Path("configs/site.yaml")
"""Where it is read from unless `CROSSCODER_SITE` names another."""


class Machine(Config):
    """A machine outside Slurm, reached over ssh."""

    host: str
    """As ssh knows it."""


class Site(Config):
    data: DataPath = Path("data")
    """Root of source text and token sets: `{data}` in a configuration."""
    ssd: DataPath = Path("data")
    """Root of activation sets, on the fastest disk there is: `{ssd}` in a configuration."""
    runs: DataPath = Path("runs")
    """Root of run directories, seen by login and compute nodes alike: `{runs}` in a configuration."""
    resources: dict[str, Any] = {}
    """Defaults for any key of `resources` that a configuration does not give."""
    setup: list[str] = []
    """Shell lines run before a job's program (`module load cuda`); the first that fails ends the job."""
    machines: list[Machine] = []
    """Machines outside Slurm that `crosscoder accelerators` asks."""
    gpu_memory_gb: dict[str, float] = {}
    """Memory of a GPU by Slurm's name of its type, in GB (`a100: 80`): Slurm itself does not tell it."""

    def expand(self, text: str, where: str) -> str:
        """`text` with `{data}`, `{ssd}` and `{runs}` replaced by absolute roots."""
        for root in ("data", "ssd", "runs"):
            text = text.replace("{" + root + "}", str(getattr(self, root).absolute()))
        if "{" in text:
            raise UserError(f"{where}: `{text}` has a placeholder that is not one of {{data}}, {{ssd}}, {{runs}}")
        return text


def site_path() -> Path:
    """The file that the site settings are read from here and now; it need not be there if `CROSSCODER_SITE` names none."""
    return Path(os.environ.get("CROSSCODER_SITE") or SITE_FILE)


def load_site() -> Site:
    """The site settings that hold here and now."""
    path = site_path()
    if not os.environ.get("CROSSCODER_SITE") and not path.exists():
        return Site()
    site = build(Site, yaml_file.read(path), str(path))
    return site.model_copy(update={root: getattr(site, root).expanduser().absolute() for root in ("data", "ssd", "runs")})
