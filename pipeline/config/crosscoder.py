"""What a crosscoder is: its size, activation function, initialization, and the units that it works in."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.schema import Config, PositiveCount

Positive = Annotated[float, Field(gt=0.0)]
"""A number above 0."""


class Relu(Config):
    """Every feature with a positive pre-activation fires; sparsity comes from a penalty in the loss."""

    kind: Literal["relu"] = "relu"


class BatchTopk(Config):
    """The `k` times B highest of all features of a batch's B positions fire (Bussmann et al. 2024)."""

    kind: Literal["batch_topk"] = "batch_topk"
    k: PositiveCount
    """Features that fire a position, as a mean over the batch."""
    rank_by: Literal["activation_times_decoder_norm", "activation"] = "activation_times_decoder_norm"
    """What is highest: the activation times the sum over layers of the feature's decoder norms, so that scaling a feature
    up and its decoder down changes nothing (Minder et al. 2025), or the activation alone."""
    threshold_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Of the running average over batches of the smallest rank that fired, which is the threshold at inference. The
    first 1 / (1 - momentum) batches are averaged evenly. That rank hardly differs from batch to batch when k times B are
    thousands, but it grows several times over while the decoders do: a long memory (0.999 elsewhere) lags behind in a
    short run, and more features fire at inference than in training."""


ActivationFunctionConfig = Annotated[Relu | BatchTopk, Field(discriminator="kind")]


class Initialization(Config):
    """The weights before the first step; drawn from the stage's seed."""

    decoder: Literal["random_directions"] = "random_directions"
    """`random_directions`: a Gaussian direction a feature and layer, scaled to `decoder_norm`."""
    decoder_norm: Positive = 0.1
    """Euclidean norm of each feature's decoder vector in each layer, with activations of root-mean-square norm
    sqrt(d_model). How many features die depends strongly on it."""
    encoder: Literal["transposed_decoder", "random_directions"] = "transposed_decoder"
    """`transposed_decoder`: the encoder begins as the decoder transposed; `random_directions`: drawn on its own, with the
    same norms."""


class Normalization(Config):
    """The units that the crosscoder works in: what is done to a layer's activations before they reach it."""

    center: bool = True
    """Subtract the layer's mean first."""
    scale: Literal["layer", "none"] = "layer"
    """`layer`: one factor a layer, so that the mean squared norm is d_model; `none`: as the language model has them."""


class CrosscoderConfig(Config):
    num_features: PositiveCount
    """Size of the dictionary: features shared by all layers."""
    activation_function: ActivationFunctionConfig
    initialization: Initialization = Initialization()
    normalization: Normalization = Normalization()

    @model_validator(mode="after")
    def _fewer_fire_than_there_are(self) -> "CrosscoderConfig":
        if isinstance(self.activation_function, BatchTopk) and self.activation_function.k >= self.num_features:
            raise ValueError(f"activation_function.k is {self.activation_function.k}, expected less than num_features, {self.num_features}")
        return self
