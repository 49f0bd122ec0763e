"""Configuration of the stage `count`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.config.schema import OPERATIONAL, DataPath
from pipeline.config.stage import StageConfig


class CountConfig(StageConfig):
    RESULT_NAMES: ClassVar[tuple[str, ...]] = (
        "*.data_id",
        "*.documents",
        "*.tokens",
        "*.num_shards",
    )
    stage: Literal["count"] = "count"
    tokens: Annotated[DataPath, Field(json_schema_extra=OPERATIONAL)]
    """Directory that `tokenize` wrote: a token set in each of `splits`."""
    splits: Annotated[list[str], Field(min_length=1)] = ["train", "validation"]
    """The sets to count; `[train]` where `tokenize` was told to make no validation set."""

    def inputs(self) -> dict[str, Path]:
        return {split: self.tokens / split for split in self.splits}

    def field_of_input(self, name: str) -> str:
        return f"tokens ({name})"
