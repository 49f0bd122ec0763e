"""Settings of the stage that measures a trained crosscoder on held-out text."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.config.beginning_of_text import BeginningOfTextSetting
from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.schema import OPERATIONAL, RUN, DataPath, PositiveCount
from pipeline.config.stage import StageConfig


class EvaluateConfig(StageConfig):
    RESULT_NAMES: ClassVar[tuple[str, ...]] = (
        "l0",
        "explained_variance",
        "explained_variance_by_layer.*",
        "dead_fraction",
        "dead_eval_fraction",
        "dense_fraction",
        "clean_cross_entropy",
        "cross_entropy_difference",
        "recovered_against_zero",
        "recovered_by_layer.*",
        "positions",
        "peak_memory_gib",
    )
    stage: Literal["evaluate"] = "evaluate"
    crosscoder: Annotated[DataPath, Field(json_schema_extra=RUN)]
    """A run of `train`, the folder of all runs of one name (the newest finished one is taken; `train/demo` names it), or one checkpoint.
    A run may be given by its id or job id too, and a task of a sweep as `1042_3` or `sweep/<name>/<id>/tasks/3`."""
    tokens: Annotated[DataPath, Field(json_schema_extra=OPERATIONAL)]
    """Token set that training did not see: the `validation` folder that `tokenize` wrote."""
    language_model: LanguageModelConfig
    """The model whose activations the crosscoder was trained on."""
    context_tokens: Annotated[PositiveCount, Field(ge=3)] = 1024
    """Length of the contexts that the model reads, in tokens; as in training, for comparable activations."""
    beginning_of_text: BeginningOfTextSetting = "auto"
    """Whether every context begins with the tokenizer's beginning-of-text token; `auto`: as in training. Another than in
    training is refused: the activations would be others."""
    max_tokens: PositiveCount | None = 1_000_000
    """Read at most so many tokens (separators and beginning-of-text counted), in whole contexts drawn by `seed`; null reads them all."""
    batch_contexts: Annotated[PositiveCount, Field(json_schema_extra=OPERATIONAL)] = 8
    """Contexts in one forward pass. Twice their logits (batch_contexts * context_tokens * vocabulary numbers) lie in memory."""
    other_layer_distance: PositiveCount = 1
    """Another layer's activation is spliced in for layers at most so many places apart in the crosscoder's list of layers. Each
    pair costs two forward passes a batch; how well it reconstructs is measured for all pairs."""

    check_hashes: Annotated[bool, Field(json_schema_extra=OPERATIONAL)] = True
    """Rehash the token set first, about a second for 2 GB; false checks sizes, counts and the range of ids only."""

    def inputs(self) -> dict[str, Path]:
        return {"crosscoder": self.crosscoder, "tokens": self.tokens}
