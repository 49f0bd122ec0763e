"""Configuration of the stage `train`: activations, a crosscoder, its loss, and the course of its training."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.activation_source import ActivationSourceConfig
from pipeline.config.crosscoder import CrosscoderConfig, Positive
from pipeline.config.schema import OPERATIONAL, Config, Fraction, PositiveCount
from pipeline.config.stage import StageConfig

NonNegative = Annotated[float, Field(ge=0.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]


class NoPenalty(Config):
    """Nothing in the loss makes features sparse: for activation functions that are sparse by themselves."""

    kind: Literal["none"] = "none"


class DecoderNormL1(Config):
    """Each feature's activation times the sum over layers of its decoder norms (Lindsey et al. 2024)."""

    kind: Literal["decoder_norm_l1"] = "decoder_norm_l1"
    coefficient: NonNegative
    """Weight against the squared error, which is summed over width and layers and averaged over positions."""
    warmup_fraction: Fraction = 0.05
    """Share of all steps over which the coefficient rises linearly from 0."""


class NoAuxiliary(Config):
    """No help for dead features."""

    kind: Literal["none"] = "none"


class Auxk(Config):
    """The `k` strongest dead features of each position reconstruct what the living left over (Gao et al. 2024)."""

    kind: Literal["auxk"] = "auxk"
    coefficient: NonNegative = 1 / 32
    """Weight of the share of the residual that they leave unexplained, against the share of the activations' variance that
    the crosscoder leaves unexplained."""
    k: PositiveCount | None = None
    """Dead features a position; None takes half the model's width."""
    refresh_steps: PositiveCount = 10
    """Which features are dead is looked up every so many steps; each look-up waits for the device once."""


class Loss(Config):
    """Squared error, summed over width and layers, averaged over positions, plus the two terms chosen here."""

    sparsity: Annotated[DecoderNormL1 | NoPenalty, Field(discriminator="kind")]
    auxiliary: Annotated[Auxk | NoAuxiliary, Field(discriminator="kind")]


class Optimizer(Config):
    """Adam on float32 weights, and the course of its learning rate."""

    learning_rate: Positive = 2e-4
    """At the peak."""
    warmup_fraction: Fraction = 0.02
    """Share of all steps over which it rises linearly from 0."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """How it falls to `final_fraction` of the peak; `constant` does not fall."""
    decay_fraction: Fraction = 0.2
    """Share of all steps, the last ones, over which it falls."""
    final_fraction: Fraction = 0.0
    """What remains of the peak when training ends."""
    beta1: Momentum = 0.9
    """Adam's running average of gradients."""
    beta2: Momentum = 0.999
    """Adam's running average of squared gradients."""
    epsilon: Positive = 1e-8
    """Adam's addend in the denominator."""
    gradient_clip_norm: Positive | None = 1.0
    """Largest norm of all gradients together; None does not clip."""

    @model_validator(mode="after")
    def _phases_fit(self) -> "Optimizer":
        if self.decay != "constant" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction and decay_fraction add up to more than 1; make one of them smaller")
        return self


class Checkpoints(Config):
    """When the state of training is saved. A run that is asked to stop saves besides, and so does its end."""

    every_tokens: PositiveCount | None = 50_000_000
    """None means not by tokens."""
    every_minutes: Positive | None = 30.0
    """None means not by time."""
    keep: PositiveCount = 2
    """So many of the newest stay on disk."""


class TrainConfig(StageConfig):
    RESULT_NAMES: ClassVar[tuple[str, ...]] = (
        "steps",
        "tokens",
        "epochs",
        "loss",
        "loss_reconstruction",
        "loss_sparsity",
        "loss_auxiliary",
        "l0",
        "explained_variance",
        "dead_features",
        "dead_fraction",
        "threshold",
        "seconds",
        "tokens_per_second",
        "peak_memory_gib",
        "checkpoint",
        "activations_id",
    )
    stage: Literal["train"] = "train"
    activations: ActivationSourceConfig
    """Where activations come from: `kind: disk` or `kind: stream`."""
    crosscoder: CrosscoderConfig
    loss: Loss
    optimizer: Optimizer = Optimizer()
    num_tokens: PositiveCount | None = None
    """Positions to train on in all, over as many epochs as that takes; give this or `epochs`."""
    epochs: PositiveCount | None = None
    """Times that every position is trained on; give this or `num_tokens`."""
    batch_positions: PositiveCount = 4096
    """Positions in a step; the last batch of an epoch may be shorter."""
    dead_window_tokens: PositiveCount = 10_000_000
    """A feature is dead when it did not fire in so many of the latest training tokens."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; weights, their updates and sums in the loss are float32 in either case."""
    compile: bool = False
    """Compile the step with torch.compile: a minute at the start, fewer passes over memory then."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(json_schema_extra=OPERATIONAL)] = "auto"
    """`auto` takes a GPU when there is one."""
    log_every_steps: PositiveCount = 50
    """A row of metrics for every so many steps, over all of them."""
    checkpoints: Checkpoints = Field(default=Checkpoints(), json_schema_extra=OPERATIONAL)

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.num_tokens is None) == (self.epochs is None):
            raise ValueError("give either num_tokens or epochs, one of them says how long to train; set the other one to null")
        return self

    def inputs(self) -> dict[str, Path]:
        return self.activations.inputs()
