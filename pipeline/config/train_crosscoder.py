"""Configuration of the stage `train`: activations, a crosscoder, its loss, and the course of its training."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.activation_source import ActivationSourceConfig, StreamedActivations
from pipeline.config.crosscoder import CrosscoderConfig, Momentum
from pipeline.config.language_models import ReadsModels
from pipeline.config.loss import Loss
from pipeline.config.schedule import Positive, Schedule
from pipeline.config.schema import OPERATIONAL, Config, DataPath, Fraction, PositiveCount
from pipeline.config.stage import StageConfig


class NoClipping(Config):
    """Gradients are taken as they are."""

    kind: Literal["none"] = "none"


class NormalizedGradient(Config):
    """Every step's gradient is scaled to norm 1, so that steps count alike whatever the loss's unit and however far it has fallen."""

    kind: Literal["normalized"] = "normalized"


class AbsoluteClipping(Config):
    """A fixed largest norm of all gradients together. What it does depends on the loss's unit: on layers, width and scale."""

    kind: Literal["absolute"] = "absolute"
    norm: Positive = 1.0
    """Larger gradients are scaled down to this norm."""


class RelativeClipping(Config):
    """The largest norm is a multiple of the running mean of the norms so far, so that it is free of the loss's unit."""

    kind: Literal["relative"] = "relative"
    factor: Positive = 4.0
    """Times the running mean of the norms, each counted after clipping."""
    momentum: Momentum = 0.99
    """Of that running mean; the first 1 / (1 - momentum) steps are averaged evenly."""


ClippingConfig = Annotated[NoClipping | NormalizedGradient | AbsoluteClipping | RelativeClipping, Field(discriminator="kind")]


class LearningRateSchedule(Schedule):
    """A factor on the learning rate: it rises over the first 2 % of all steps and falls to 0 over the last 20 %."""

    warmup_fraction: Fraction = 0.02
    """Share of all steps, the first ones, over which the factor moves to 1."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """The form of the way to `final_fraction`; `constant` stays at 1."""


class Optimizer(Config):
    """Adam on float32 weights, and the course of its learning rate."""

    learning_rate: Positive = 2e-4
    """At the peak."""
    schedule: LearningRateSchedule = LearningRateSchedule()
    beta1: Momentum = 0.9
    """Adam's running average of gradients."""
    beta2: Momentum = 0.999
    """Adam's running average of squared gradients."""
    epsilon: Positive = 1e-8
    """Adam's addend in the denominator."""
    clipping: ClippingConfig = NormalizedGradient()
    """What is done about the size of the gradient of all weights together."""


class NoHistory(Config):
    """Nothing but the checkpoints that are kept."""

    kind: Literal["none"] = "none"


class LogSpacedHistory(Config):
    """Steps whose logarithms are evenly spaced from 1 to the last."""

    kind: Literal["log_spaced"] = "log_spaced"
    points: PositiveCount = 20
    """So many, fewer where two would be the same step."""


class TokensHistory(Config):
    """A step every so many training tokens."""

    kind: Literal["every_tokens"] = "every_tokens"
    tokens: PositiveCount
    """Training tokens from one to the next."""


class HeldOut(ReadsModels):
    """Positions that training doesn't see, on which the crosscoder is measured with every row of metrics.

    The language model is that which activations on disk are of, needed once, at the start; a stream has its own.
    """

    tokens: Annotated[DataPath, Field(json_schema_extra=OPERATIONAL)]
    """Token set that training does not see: the `validation` folder that `tokenize` wrote."""
    positions: PositiveCount = 8192
    """Positions measured; their activations stay in memory: 25 MB at two layers of width 768 in bfloat16."""


class Checkpoints(Config):
    """When the state of training is saved. A run that is asked to stop saves besides, and so does its end."""

    every_tokens: PositiveCount | None = 50_000_000
    """None means not by tokens."""
    every_minutes: Positive | None = 30.0
    """None means not by time."""
    keep: PositiveCount = 2
    """So many of the newest stay on disk."""
    keep_best: bool = True
    """Where there are held-out positions, the checkpoint that explains most of their variance stays, too."""
    history: Annotated[NoHistory | LogSpacedHistory | TokensHistory, Field(discriminator="kind")] = NoHistory()
    """Snapshots of the crosscoder alone, in `history/` beside the checkpoints, for `crosscoder evolution`."""


class TrainConfig(StageConfig):
    RESULT_NAMES: ClassVar[tuple[str, ...]] = (
        "steps",
        "tokens",
        "epochs",
        "loss",
        "loss_*",
        "l0",
        "explained_variance",
        "held_out_explained_variance",
        "held_out_l0",
        "held_out_*",
        "best_step",
        "best_held_out_explained_variance",
        "dead_window_tokens",
        "dead_features",
        "dead_fraction",
        "threshold",
        "overfit_steps",
        "overfit_explained_variance",
        "seconds",
        "tokens_per_second",
        "peak_memory_gib",
        "checkpoint",
        "activations_id",
        "left_out",
    )
    stage: Literal["train"] = "train"
    activations: ActivationSourceConfig
    """Where activations come from: `kind: disk` or `kind: stream`."""
    crosscoder: CrosscoderConfig
    loss: Loss
    optimizer: Optimizer = Optimizer()
    num_tokens: PositiveCount | None = None
    """Positions to train on in all, those counted that are left out for their norm or token, over as many epochs as that takes; give
    this or `epochs`."""
    epochs: PositiveCount | None = None
    """Times that every position is trained on; give this or `num_tokens`."""
    overfit: bool = False
    """Trains on the first batch alone, again and again, and says after how many steps it explains 0.99 of that batch's variance: a
    first check of any variant. `num_tokens` over `batch_positions` are the steps."""
    batch_positions: PositiveCount = 4096
    """Positions in a step, those counted that are left out for their norm or token; the last batch of an epoch may be shorter."""
    micro_batch_positions: PositiveCount | None = None
    """Positions that go through the crosscoder at a time, to save memory; their gradients add up to those of the whole batch, and
    TopK over the batch is taken over all of it. Costs up to two more passes without a gradient. Null takes the batch at once."""
    layer_mask_rate: Fraction = 0.0
    """Probability with which the encoder sees a layer's mean in place of a position's activation there, while all layers are
    reconstructed (after fmxcoders, arXiv 2605.09438): features must then not hang on one layer."""
    layer_mask_schedule: Schedule = Schedule()
    """A factor on `layer_mask_rate`."""
    dead_window_tokens: PositiveCount | None = None
    """A feature is dead when it did not fire in so many of the latest training tokens. Null takes a tenth of the run's tokens,
    10 M at most."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; weights, their updates and sums in the loss are float32 in either case."""
    compile: bool = False
    """Compile the step with torch.compile: a minute at the start, fewer passes over memory then. The first batch of another size, as
    where positions are left out, has it compiled once more, for any size."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(json_schema_extra=OPERATIONAL)] = "auto"
    """`auto` takes a GPU when there is one."""
    held_out: HeldOut | None = None
    """Positions to measure as training goes; what runs are then compared by. Null measures training batches alone."""
    log_every_steps: PositiveCount = 50
    """A row of metrics for every so many steps, over all of them."""
    l0_window_steps: PositiveCount = 12_000
    """Steps that the row's `recent_l0` is a mean over; `l0` is one over the steps since the last row, `epoch_l0` over the epoch."""
    histogram_every_steps: Annotated[PositiveCount, Field(json_schema_extra=OPERATIONAL)] = 1000
    """Steps, rounded up to the next row, from one histogram of all features' norms and gradients in TensorBoard to the next."""
    checkpoints: Checkpoints = Field(default=Checkpoints(), json_schema_extra=OPERATIONAL)

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.num_tokens is None) == (self.epochs is None):
            raise ValueError("give either num_tokens or epochs, one of them says how long to train; set the other one to null")
        if self.overfit and self.num_tokens is None:
            raise ValueError(
                "overfit is true, but epochs says how long to train: of one batch that is a step each; give num_tokens instead"
            )
        return self

    @model_validator(mode="after")
    def _held_out_has_a_model(self) -> "TrainConfig":
        if self.held_out is not None and not self.held_out.models and not isinstance(self.activations, StreamedActivations):
            raise ValueError("held_out.language_model is missing: activations on disk don't say where their model is; name it there")
        if self.held_out is not None and self.held_out.models and isinstance(self.activations, StreamedActivations):
            raise ValueError("held_out.language_model is given, but a stream has its own, which is taken; leave it out")
        return self

    @model_validator(mode="after")
    def _held_out_is_not_trained_on(self) -> "TrainConfig":
        streamed = self.activations.inputs().get("tokens")
        if self.held_out is not None and self.held_out.tokens == streamed:
            raise ValueError(f"held_out.tokens is {streamed}, the token set that is trained on; name one that training does not see")
        return self

    @model_validator(mode="after")
    def _loss_fits(self) -> "TrainConfig":
        if fault := self.loss.fault(self.crosscoder):
            raise ValueError(fault)
        return self

    def inputs(self) -> dict[str, Path]:
        held_out = {} if self.held_out is None else {"held_out": self.held_out.tokens}
        return {**self.activations.inputs(), **held_out}

    def field_of_input(self, name: str) -> str:
        return {"activations": "activations.path", "tokens": "activations.tokens", "held_out": "held_out.tokens"}[name]
