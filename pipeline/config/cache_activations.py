"""Settings of the cache stage."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.config.activation_source import Harvest
from pipeline.config.schema import OPERATIONAL, Count, DataPath
from pipeline.config.stage import StageConfig


class CacheConfig(Harvest, StageConfig):
    """A language model over a token set to activation shards."""

    RESULT_NAMES: ClassVar[tuple[str, ...]] = (
        "complete",
        "output",
        "data_id",
        "shards",
        "positions",
        "left_out",
        "bytes",
        "peak_memory_gib",
    )
    IS_DIVISIBLE: ClassVar[bool] = True
    stage: Literal["cache"] = "cache"
    output: Annotated[DataPath, Field(json_schema_extra=OPERATIONAL)]
    """Directory of the activation set to be made."""
    seed: Count = 0
    """Of the order of contexts and positions."""

    def inputs(self) -> dict[str, Path]:
        return {"tokens": self.tokens}

    def outputs(self) -> dict[str, Path]:
        return {"activations": self.output}
