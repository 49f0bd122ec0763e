"""What every stage's configuration has: which stage, a name, a seed, resources, and what it reads and writes."""

import re
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.resources import Resources
from pipeline.config.schema import OPERATIONAL, Config, Count


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError("a name is 1 to 64 letters, digits, dots, dashes and underscores, and starts with a letter or digit")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]


class StageConfig(Config):
    """Base of the stages' configurations; a subclass sets `stage` to a Literal of its own."""

    RESULT_NAMES: ClassVar[tuple[str, ...]] = ()
    """What a finished task has a result of, with dotted names; `*` stands for a layer or a set. Empty: not known."""

    MOST_GPUS: ClassVar[int] = 1
    """GPUs of a machine that the stage works on at most. One is never too much: partitions exist that take no job without."""
    IS_DISTRIBUTED: ClassVar[bool] = False
    """Whether several processes, on one machine or more, work on one task of the stage together."""
    IS_DIVISIBLE: ClassVar[bool] = False
    """Whether the tasks of an array divide the stage's work among them."""

    stage: str
    name: Annotated[Name, Field(json_schema_extra=OPERATIONAL)]
    """Names the run: `runs/<stage>/<name>/<time>-<id>/`."""
    seed: Count = 0
    """Of everything random in the stage."""
    resources: Resources = Field(default=Resources(), json_schema_extra=OPERATIONAL)

    @model_validator(mode="after")
    def _resources_are_used(self) -> "StageConfig":
        if faults := self.unused(self.resources):
            raise ValueError("; ".join(f"resources.{fault}" for fault in faults))
        return self

    @classmethod
    def unused(cls, resources: Resources) -> list[str]:
        """What of `resources` the stage would leave idle, or use to do its work more than once; one phrase each, field first."""
        stage, faults = cls.model_fields["stage"].default, []
        if resources.gpus > cls.MOST_GPUS:
            faults.append(f"gpus is {resources.gpus}, but {stage} works on {cls.MOST_GPUS} alone; use {cls.MOST_GPUS}")
        for field in ("nodes", "tasks_per_node") if not cls.IS_DISTRIBUTED else ():
            if (count := getattr(resources, field)) > 1:
                faults.append(f"{field} is {count}, but {stage} is one process: each would do all of the work; use 1")
        if resources.array_tasks > 1 and not cls.IS_DIVISIBLE:
            faults.append(f"array_tasks is {resources.array_tasks}, but {stage} can't be divided: each would do all of the work; use 1")
        return faults

    def inputs(self) -> dict[str, Path]:
        """What the stage reads, by field: directories of data sets, or of runs."""
        return {}

    def field_of_input(self, name: str) -> str:
        """The setting that names the input `name`, a key of `inputs`, as YAML writes it."""
        return name

    def outputs(self) -> dict[str, Path]:
        """The data sets that the stage writes, by field; results that stay in the run directory don't count."""
        return {}
