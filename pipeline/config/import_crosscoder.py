"""Settings of the stage that takes a crosscoder from the files of another library."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.config.activation_source import ActivationSourceConfig
from pipeline.config.schedule import Positive
from pipeline.config.schema import OPERATIONAL, DataPath, PositiveCount
from pipeline.config.stage import StageConfig


class ImportConfig(StageConfig):
    RESULT_NAMES: ClassVar[tuple[str, ...]] = (
        "checkpoint",
        "num_features",
        "explained_variance",
        "l0",
        "positions",
        "activations_id",
        "weights",
    )
    stage: Literal["import"] = "import"
    path: Annotated[DataPath, Field(json_schema_extra=OPERATIONAL)]
    """Directory of the files, or the file of weights itself. Files of torch (`.pt`) are read for tensors alone: no code in them runs."""
    layout: Literal["sae_lens", "dictionary_learning", "ckkissane", "safetensors"]
    """Whose files they are. `dictionary_learning` is science-of-finetuning's too, `ckkissane` that of the public replication of model
    diffing, with W_enc, W_dec, b_enc and b_dec; `safetensors` are those with thresholds, as `crosscoder export` writes them."""
    activations: ActivationSourceConfig
    """What the crosscoder reads, as in training: language model, layers in the order of the crosscoder's, tokens, contexts. The files
    don't say it. `kind: stream` computes what little is needed, `kind: disk` takes it from an activation set."""
    activation_scale: list[Positive] = []
    """Factor on each layer's activations before this crosscoder saw them in training, in the order of `layers`, where that is not in its
    weights: for many, sqrt(d_model) over the layer's mean norm. Empty: none."""
    positions: PositiveCount = 4096
    """Positions on which the crosscoder is tried, for the explained variance in the result."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(json_schema_extra=OPERATIONAL)] = "auto"
    """`auto` takes a GPU when there is one."""

    def inputs(self) -> dict[str, Path]:
        return self.activations.inputs()
