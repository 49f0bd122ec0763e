"""Settings of the stage that measures a trained crosscoder on held-out text."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.config.held_out_text import HeldOutText
from pipeline.config.schema import OPERATIONAL, RUN, DataPath, PositiveCount
from pipeline.config.stage import StageConfig


class EvaluateConfig(HeldOutText, StageConfig):
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
        "clean_cross_entropy_by_model.*",
        "cross_entropy_difference",
        "cross_entropy_difference_by_layer.*",
        "cross_entropy_difference_by_model.*",
        "cross_entropy_difference_split",
        "cross_entropy_difference_of_baseline",
        "recovered_against_zero",
        "recovered_by_layer.*",
        "layers_driving",
        "functional_coherence",
        "model_diffing.*",
        "positions",
        "outliers",
        "peak_memory_gib",
    )
    stage: Literal["evaluate"] = "evaluate"
    training_tokens: Annotated[DataPath | None, Field(json_schema_extra=OPERATIONAL)] = None
    """Token set that the baselines are fitted on: the `train` folder that the crosscoder was trained on. Null fits them on a part of
    `tokens` that is then not measured, a quarter at most. `check_hashes` never rehashes them: they can be a thousand times as many, and
    no figure is measured on them."""
    compare_with: Annotated[list[DataPath], Field(json_schema_extra=RUN)] = []
    """Other trained crosscoders of the same language model, named as `crosscoder` is: each is a row at every layer that it shares
    with this one. A crosscoder of one layer is a sparse autoencoder."""
    fit_tokens: PositiveCount = 200_000
    """Fit the baselines on at most so many tokens, in whole contexts drawn by `seed`."""
    spliced_baselines: PositiveCount = 3
    """So many baselines are spliced in at each layer besides its mean, zeros and `compare_with`: an affine map from another layer, that
    layer itself, then those that explain most. Each costs a forward pass a layer and batch."""

    def inputs(self) -> dict[str, Path]:
        named = {"crosscoder": self.crosscoder, "tokens": self.tokens}
        if self.training_tokens is not None:
            named["training_tokens"] = self.training_tokens
        return named | {f"compare_with[{number}]": path for number, path in enumerate(self.compare_with)}
