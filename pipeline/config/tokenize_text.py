"""Configuration of the stage `tokenize`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.config.schema import OPERATIONAL, Config, DataPath, Fraction, PositiveCount, PretrainedName
from pipeline.config.stage import StageConfig

GIB, MIB = 1 << 30, 1 << 20


class TokenizerConfig(Config):
    """Which tokenizer, and how it is used. Its content is recorded by its hash, so its name and place may change."""

    name: PretrainedName
    """A name on the Hugging Face hub, a directory, a tokenizer.json, or `demo` for the one that ships with the demo's model."""
    revision: Annotated[str | None, Field(json_schema_extra=OPERATIONAL)] = None
    """Branch, tag or commit on the hub; None takes the default branch. The run is bound to the commit that this is when it is frozen."""
    end_of_text: str | None = None
    """Token that takes the place of a document's end before a model, as text; None takes the tokenizer's own end-of-text token."""
    special_text: Literal["token", "text"] = "token"
    """What a special token written out in a text (`<|endoftext|>`) becomes: the special token, which is what the tokenizer
    does by default, or ordinary text in several ids."""


class TokenizeConfig(StageConfig):
    RESULT_NAMES: ClassVar[tuple[str, ...]] = (
        "sealed",
        "sources",
        "encoder",
        "seconds",
        "this_run.lines",
        "this_run.documents",
        "this_run.tokens",
        "this_run.empty",
        "this_run.rejected",
        "sets.*.data_id",
        "sets.*.documents",
        "sets.*.tokens",
        "sets.*.lines",
        "sets.*.empty",
        "sets.*.rejected",
    )
    IS_DIVISIBLE: ClassVar[bool] = True
    stage: Literal["tokenize"] = "tokenize"
    sources: Annotated[list[DataPath], Field(min_length=1, json_schema_extra=OPERATIONAL)]
    """JSON-lines files, plain, `.gz` or `.zst`: paths, directories or glob patterns (`**` goes into directories). A file whose
    first bytes are of another kind is refused."""
    output: Annotated[DataPath, Field(json_schema_extra=OPERATIONAL)]
    """Directory of the two token sets `train/` and `validation/`, and of `rejects/`."""
    tokenizer: TokenizerConfig
    text_field: str = "text"
    """Key of the text in each line's object. `a.b` is the key `b` of the object under `a`, where no key is called `a.b` itself."""
    validation_fraction: Fraction = 0.005
    """Share of documents that go to `validation/`, chosen by a hash of their text and `seed`; 0 makes no such set."""
    part_bytes: PositiveCount = GIB
    """Uncompressed text in one shard, in bytes; also what is done anew at most after a kill. Lines stay whole."""
    max_line_bytes: PositiveCount = 16 * MIB
    """A longer line is rejected without being held in memory."""
    max_bad_fraction: Annotated[Fraction, Field(json_schema_extra=OPERATIONAL)] = 0.01
    """Share of a source's lines that may give no document, blank lines not counted; above it the stage fails."""
    encoder: Annotated[Literal["auto", "gigatoken", "tokenizers", "transformers"], Field(json_schema_extra=OPERATIONAL)] = "auto"
    """What makes the ids, the same ids each way: `auto` takes gigatoken where it agrees with the tokenizer, else tokenizers."""
    processes: Annotated[PositiveCount | None, Field(json_schema_extra=OPERATIONAL)] = None
    """Processes that encode, beside the one that reads and writes (1: all in one); None takes a process a CPU allowed to the job."""
    chunk_bytes: Annotated[PositiveCount, Field(json_schema_extra=OPERATIONAL)] = MIB
    """Text sent to a process at a time, in bytes. A process holds some 150 MB, and 10 times this or the longest line more
    (140 times the longest line with `encoder: tokenizers`)."""

    def inputs(self) -> dict[str, Path]:
        return {f"sources[{number}]": path for number, path in enumerate(self.sources)}

    def outputs(self) -> dict[str, Path]:
        splits = ["train", "validation"] if self.validation_fraction > 0 else ["train"]
        return {split: self.output / split for split in splits}
