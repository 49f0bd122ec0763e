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
        "explained_variance_with_outliers",
        "explained_variance_by_layer.*",
        "explained_variance_of_baseline",
        "dead_fraction",
        "dead_eval_fraction",
        "dense_fraction",
        "clean_cross_entropy",
        "cross_entropy_difference",
        "cross_entropy_difference_by_layer.*",
        "cross_entropy_difference_split",
        "cross_entropy_difference_of_baseline",
        "recovered_against_zero",
        "recovered_by_layer.*",
        "layers_driving",
        "functional_coherence",
        "positions",
        "outliers",
        "peak_memory_gib",
    )
    stage: Literal["evaluate"] = "evaluate"
    crosscoder: Annotated[DataPath, Field(json_schema_extra=RUN)]
    """A run of `train`, the folder of all runs of one name (the newest finished one is taken; `train/demo` names it), or one checkpoint.
    A run may be given by its id or job id too, and a task of a sweep as `1042_3` or `sweep/<name>/<id>/tasks/3`."""
    tokens: Annotated[DataPath, Field(json_schema_extra=OPERATIONAL)]
    """Token set that training did not see: the `validation` folder that `tokenize` wrote."""
    training_tokens: Annotated[DataPath | None, Field(json_schema_extra=OPERATIONAL)] = None
    """Token set that the baselines are fitted on: the `train` folder that the crosscoder was trained on. Null fits them on a part of
    `tokens` that is then not measured, a quarter at most."""
    compare_with: Annotated[list[DataPath], Field(json_schema_extra=RUN)] = []
    """Other trained crosscoders of the same language model, named as `crosscoder` is: each is a row at every layer that it shares
    with this one. A crosscoder of one layer is a sparse autoencoder."""
    language_model: LanguageModelConfig
    """The model whose activations the crosscoder was trained on."""
    context_tokens: Annotated[PositiveCount, Field(ge=3)] = 1024
    """Length of the contexts that the model reads, in tokens; as in training, for comparable activations."""
    beginning_of_text: BeginningOfTextSetting = "auto"
    """Whether every context begins with the tokenizer's beginning-of-text token; `auto`: as in training. Another than in
    training is refused: the activations would be others."""
    max_tokens: PositiveCount | None = 1_000_000
    """Read at most so many tokens (separators and beginning-of-text counted), in whole contexts drawn by `seed`; null reads them all."""
    fit_tokens: PositiveCount = 200_000
    """Fit the baselines on at most so many tokens, in whole contexts drawn by `seed`."""
    outlier_norm_ratio: Annotated[float, Field(gt=1.0)] | None = 10.0
    """Positions whose norm is over so many times the layer's median, in any of the layers, are outliers: they are left out of the
    headline figures and not replaced. The limits are those of the training where the crosscoder has them. Null: no outliers."""
    spliced_baselines: PositiveCount = 3
    """So many baselines are spliced in at each layer besides its mean, zeros and `compare_with`: an affine map from another layer, that
    layer itself, then those that explain most. Each costs a forward pass a layer and batch."""
    batch_contexts: Annotated[PositiveCount, Field(json_schema_extra=OPERATIONAL)] = 8
    """Contexts in one forward pass."""
    check_hashes: Annotated[bool, Field(json_schema_extra=OPERATIONAL)] = True
    """Rehash the token set first, about a second for 2 GB; false checks sizes, counts and the range of ids only.
    Of `training_tokens` never more is checked: they can be a thousand times as many, and no figure is measured on them."""

    def inputs(self) -> dict[str, Path]:
        named = {"crosscoder": self.crosscoder, "tokens": self.tokens}
        if self.training_tokens is not None:
            named["training_tokens"] = self.training_tokens
        return named | {f"compare_with[{number}]": path for number, path in enumerate(self.compare_with)}
