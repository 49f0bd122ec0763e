"""What a crosscoder is: its size, activation function, parameterization, initialization, and the units that it works in."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.schedule import NonNegative, Positive, Schedule
from pipeline.config.schema import Config, Count, PositiveCount
from pipeline.config.sites import SiteText

Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]


class Relu(Config):
    """Every feature with a positive pre-activation fires; sparsity comes from a penalty in the loss."""

    kind: Literal["relu"] = "relu"
    negative_gradient: NonNegative = 0.0
    """Share of the gradient that goes through where the pre-activation is negative; the feature is 0 there all the same.
    0 is the ordinary ReLU; 1 ignores negative values rather than clipping them."""


class _Ranked(Config):
    """What TopK and BatchTopK share."""

    k: PositiveCount
    """Features that fire at a position, as a mean over the batch for BatchTopK."""
    k_schedule: Schedule = Schedule()
    """A factor on k; rounded to at least 1."""
    rank_by: Literal["activation_times_decoder_norm", "activation"] = "activation_times_decoder_norm"
    """What is highest: the activation times the sum over layers of the feature's decoder norms, so that scaling a feature
    up and its decoder down changes nothing (Minder et al. 2025), or the activation alone."""
    threshold_momentum: Momentum = 0.95
    """Of the running average over batches of the smallest rank that fired, which is the threshold at inference. The
    first 1 / (1 - momentum) batches are averaged evenly. That rank hardly differs from batch to batch when k times B are
    thousands, but it grows several times over while the decoders do: a long memory (0.999 elsewhere) lags behind in a
    short run, and more features fire at inference than in training."""


class Topk(_Ranked):
    """The `k` highest features of each position fire (Gao et al. 2024). At inference a threshold decides, as for BatchTopK."""

    kind: Literal["topk"] = "topk"


class BatchTopk(_Ranked):
    """The `k` times B highest of all features of a batch's B positions fire (Bussmann et al. 2024)."""

    kind: Literal["batch_topk"] = "batch_topk"


class JumpRelu(Config):
    """A feature fires above a threshold of its own, which is learned (Rajamanoharan et al. 2024)."""

    kind: Literal["jump_relu"] = "jump_relu"
    initial_threshold: Positive = 0.1
    """Every feature's before the first step, in units of the pre-activation."""
    bandwidth: Positive = 2.0
    """Width of the window around the threshold in which pre-activations give it a gradient, in the same units."""
    bandwidth_schedule: Schedule = Schedule()
    """A factor on `bandwidth`."""


class Gated(Config):
    """One path decides whether a feature fires, another how much; they share directions (Rajamanoharan et al. 2024, "Gated")."""

    kind: Literal["gated"] = "gated"


class FixedThreshold(Config):
    """A feature fires above a threshold that stays as it is: that of an imported crosscoder, whose features have one each."""

    kind: Literal["fixed_threshold"] = "fixed_threshold"
    threshold: NonNegative = 0.0
    """Every feature's before weights are loaded, in units of the pre-activation."""


ActivationFunctionConfig = Annotated[Relu | Topk | BatchTopk | JumpRelu | Gated | FixedThreshold, Field(discriminator="kind")]


class Initialization(Config):
    """The weights before the first step; drawn from the stage's seed."""

    decoder: Literal["random_directions", "same_direction", "kaiming_uniform", "data_points"] = "random_directions"
    """`random_directions`: a Gaussian direction a feature and layer; `same_direction`: one Gaussian direction a feature, the
    same in every layer; `kaiming_uniform`: as torch draws a linear layer's weights; `data_points`: centered activations of
    randomly chosen positions, a position a feature."""
    decoder_norm: Positive | None = 0.1
    """Euclidean norm of each feature's decoder vector in each layer, with activations of root-mean-square norm
    sqrt(d_model). How many features die depends strongly on it. Null leaves the norms as they were drawn."""
    encoder: Literal["transposed_decoder", "random_directions", "kaiming_uniform"] = "transposed_decoder"
    """`transposed_decoder`: the encoder begins as the decoder transposed; else drawn on its own."""
    encoder_norm: Positive | None = None
    """Euclidean norm of each feature's encoder vector in each layer. Null: that of the decoder where the encoder is its
    transpose or a random direction, as drawn where it is Kaiming-uniform."""
    kaiming_fan_in: Literal["inputs", "storage"] = "inputs"
    """What counts as a unit's inputs for `kaiming_uniform`: those it has (L times D for the encoder, the features for the
    decoder), or what torch reads off the stored shape [L, D, F] and [F, L, D], which is D times F and L times D."""
    kaiming_gain: Literal["by_role", "sqrt_5"] = "by_role"
    """`by_role`: sqrt(2) for the encoder, whose features are rectified, 1 for the decoder; `sqrt_5`: 1 / sqrt(3), from the
    a = sqrt(5) that torch's linear layers use."""
    decoder_bias: Literal["zero", "mean"] = "zero"
    """`mean`: the activations' mean in the crosscoder's units, which is zero where they are centered."""


class Normalization(Config):
    """The units that the crosscoder works in: what is done to a layer's activations before they reach it."""

    center: bool = True
    """Subtract the layer's mean first."""
    scale: Literal["layer", "mean_norm", "none"] = "layer"
    """`layer`: one factor a layer, so that the mean squared norm is d_model; `mean_norm`: so that the mean norm is
    sqrt(d_model), as in the public replication of Lindsey et al.; `none`: as the language model has them."""


class Free(Config):
    """Encoder and decoder are independent weights."""

    kind: Literal["free"] = "free"


class Aligned(Config):
    """The inner product of each feature's encoder and decoder, over all layers, is held at one (after arXiv 2605.18629).

    The encoder that works is e + (1 - <e, d>) d / |d|^2 for stored weights e and d: read alone, a feature gives back its own
    coefficient.
    """

    kind: Literal["aligned"] = "aligned"


class Factorized(Config):
    """Each feature's weights are drawn from a cross-layer basis that all features share (after fmxcoders, arXiv 2605.09438).

    The F x (L D) matrix of encoder weights is a product of F x rank coefficients and a rank x (L D) basis; the decoder's likewise,
    with factors of its own.
    """

    kind: Literal["factorized"] = "factorized"
    rank: PositiveCount
    """Vectors in the basis, each over all layers; at most layers times d_model."""


ParameterizationConfig = Annotated[Free | Aligned | Factorized, Field(discriminator="kind")]


class Group(Config):
    """Features that read and write the same layers and cost the same."""

    features: PositiveCount
    """How many; the groups follow one another in the dictionary."""
    reads: Literal["all"] | Annotated[list[SiteText], Field(min_length=1)] = "all"
    """Layers that their encoders see, by name."""
    writes: Literal["all"] | Annotated[list[SiteText], Field(min_length=1)] = "all"
    """Layers that their decoders reconstruct, by name. A layer that no group writes is not reconstructed and not in the loss."""
    cost: Positive = 1.0
    """What they weigh against others: penalties on activations are multiplied by it, and ranks of TopK divided. Below 1 favors them,
    as designated shared features are in model diffing."""


class CrosscoderConfig(Config):
    """The dictionary, and how it comes to its features."""

    num_features: PositiveCount
    """Size of the dictionary, over all groups."""
    groups: list[Group] = []
    """Which features read and write which layers; empty: all read and write all."""
    activation_function: ActivationFunctionConfig
    parameterization: ParameterizationConfig = Free()
    dense_rank: Count = 0
    """Rank of a linear path beside the dictionary, for what is not sparse (arXiv 2606.14040); 0: no such path."""
    initialization: Initialization = Initialization()
    normalization: Normalization = Normalization()

    @model_validator(mode="after")
    def _fewer_fire_than_there_are(self) -> "CrosscoderConfig":
        if isinstance(self.activation_function, _Ranked) and self.activation_function.k >= self.num_features:
            raise ValueError(f"activation_function.k is {self.activation_function.k}, expected less than num_features, {self.num_features}")
        return self

    @model_validator(mode="after")
    def _groups_add_up(self) -> "CrosscoderConfig":
        total = sum(group.features for group in self.groups)
        if self.groups and total != self.num_features:
            raise ValueError(f"the groups have {total} features together, expected num_features, {self.num_features}")
        return self
