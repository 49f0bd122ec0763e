"""What belongs to the cluster and not to an experiment: roots for data, fast SSD and runs, and submission defaults.

Read from the file that `CROSSCODER_SITE` names, else `configs/site.yaml` of the clone, else the defaults below. Which paths are
relative to what:

- a root (`data`, `ssd`, `runs`): to the clone (see `pipeline.config.clone`), wherever the site file lies and whatever the current
  directory is, so that a clone without a site file keeps all it makes in itself;
- `CROSSCODER_SITE`, a file named on the command line, and a path in a configuration or a `key=value`: to the current directory, as
  for any shell command. A configuration that is to mean the same everywhere begins its paths with `{data}`, `{ssd}` or `{runs}`.

All are absolute in the record of a run, so that nothing in a job depends on where it works.
"""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from pipeline.config import yaml_file
from pipeline.config.clone import clone
from pipeline.config.errors import UserError
from pipeline.config.schema import Config, DataPath, build


def _in_clone(path: Path) -> Path:
    return clone() / path.expanduser()


Root = Annotated[DataPath, AfterValidator(_in_clone)]
"""A directory, absolute; a relative one lies in the clone."""


class Machine(Config):
    """A machine outside Slurm, reached over ssh."""

    host: str
    """As ssh knows it."""


class Site(Config):
    data: Annotated[Root, Field(validate_default=True)] = Path("data")
    """Root of source text and token sets: `{data}` in a configuration."""
    ssd: Annotated[Root, Field(validate_default=True)] = Path("data")
    """Root of activation sets, on the fastest disk there is: `{ssd}` in a configuration."""
    runs: Annotated[Root, Field(validate_default=True)] = Path("runs")
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
            text = text.replace("{" + root + "}", str(getattr(self, root)))
        if "{" in text:
            raise UserError(f"{where}: `{text}` has a placeholder that is not one of {{data}}, {{ssd}}, {{runs}}")
        return text


def site_file() -> Path | None:
    """The site file that holds here and now; None where there is none."""
    if named := os.environ.get("CROSSCODER_SITE"):
        return Path(named).expanduser().absolute()
    path = clone() / "configs" / "site.yaml"
    return path if path.exists() else None


def load_site() -> Site:
    """The site settings that hold here and now."""
    path = site_file()
    return build(Site, yaml_file.read(path) if path else {}, str(path))
