"""Which trained crosscoder is read, and on which held-out text: settings that stages which use a crosscoder share."""

from typing import Annotated

from pydantic import Field

from pipeline.config.beginning_of_text import BeginningOfTextSetting
from pipeline.config.language_models import NeedsModels
from pipeline.config.schema import OPERATIONAL, RUN, DataPath, PositiveCount


class HeldOutText(NeedsModels):
    """A trained crosscoder, the language model or models that it was trained on, and text that training did not see."""

    crosscoder: Annotated[DataPath, Field(json_schema_extra=RUN)]
    """A run of `train`, the folder of all runs of one name (the newest finished one is taken; `train/demo` names it), or one checkpoint.
    A run may be given by its id or job id too, and a task of a sweep as `1042_3` or `sweep/<name>/<id>/tasks/3`."""
    tokens: Annotated[DataPath, Field(json_schema_extra=OPERATIONAL)]
    """Token set that training did not see: the `validation` folder that `tokenize` wrote."""
    context_tokens: Annotated[PositiveCount, Field(ge=3)] = 1024
    """Length of the contexts that the model reads, in tokens; as in training, for comparable activations."""
    beginning_of_text: BeginningOfTextSetting = "auto"
    """Whether every context begins with the tokenizer's beginning-of-text token; `auto`: as in training. Another than in
    training is refused: the activations would be others."""
    max_tokens: PositiveCount | None = 1_000_000
    """Read at most so many tokens (separators and beginning-of-text counted), in whole contexts drawn by `seed`; null reads them all."""
    outlier_norm_ratio: Annotated[float, Field(gt=1.0)] | None = 10.0
    """Positions whose norm is over so many times the layer's median, in any of the layers, are outliers: the headline
    figures leave them out. The limits are those of the training where the crosscoder has them. Null: no outliers."""
    batch_contexts: Annotated[PositiveCount, Field(json_schema_extra=OPERATIONAL)] = 8
    """Contexts in one forward pass."""
    check_hashes: Annotated[bool, Field(json_schema_extra=OPERATIONAL)] = True
    """Rehash the token set first, about a second for 2 GB; false checks sizes, counts and the range of ids only."""
