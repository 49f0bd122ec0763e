"""What every stage's configuration has: which stage, a name, a seed, resources, and what it reads and writes."""

import re
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from pipeline.config.resources import Resources
from pipeline.config.schema import OPERATIONAL, Config, Count


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError("a name is 1 to 64 letters, digits, dots, dashes and underscores, and starts with a letter or digit")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]


class StageConfig(Config):
    """Base of the five stages' configurations; a subclass sets `stage` to a Literal of its own."""

    RESULT_NAMES: ClassVar[tuple[str, ...]] = ()
    """What a finished task has a result of, with dotted names; `*` stands for a layer or a set. Empty: not known."""

    stage: str
    name: Annotated[Name, Field(json_schema_extra=OPERATIONAL)]
    """Names the run: `runs/<stage>/<name>/<time>-<id>/`."""
    seed: Count = 0
    """Of everything random in the stage."""
    resources: Resources = Field(default=Resources(), json_schema_extra=OPERATIONAL)

    def inputs(self) -> dict[str, Path]:
        """What the stage reads, by field: directories of data sets, or of runs."""
        return {}

    def outputs(self) -> dict[str, Path]:
        """The data sets that the stage writes, by field; results that stay in the run directory don't count."""
        return {}
