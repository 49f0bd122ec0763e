"""The crosscoder: one dictionary of features that reads and writes several layers (Lindsey et al. 2024).

Shapes: B positions in a batch, L layers read and written, D model width, F features. Works on normalized activations
(see `pipeline.crosscoder.normalizer`).

    pre_BF  = sum over l of acts_BLD[:, l] @ W_enc_LDF[l] + b_enc_F
    x_BLD   = features_BF @ W_dec_FLD + b_dec_LD, plus the dense path's output where there is one
"""

import torch
from torch import Generator, Tensor, nn

from pipeline.config.crosscoder import CrosscoderConfig
from pipeline.crosscoder.activation_functions import InferenceForm, make_activation_function
from pipeline.crosscoder.groups import Groups
from pipeline.crosscoder.initialization import initial_weights
from pipeline.crosscoder.schedules import StepValues
from pipeline.crosscoder.weights import PARAMETERIZATIONS, AlignedWeights, DensePath, Weights, decoder_norms


class Crosscoder(nn.Module):
    """Parameters are float32; under autocast the matrix products run in its dtype."""

    def __init__(
        self, config: CrosscoderConfig, *, layers: list[str], d_model: int, seed: int | None = None, data_NLD: Tensor | None = None
    ) -> None:
        """With a seed the weights are drawn; without one they are left empty, for weights that will be loaded.

        layers : names of the layers, in the order of the L axis; the groups name them.
        data_NLD : normalized activations, for initializations that begin from them.
        """
        super().__init__()
        num_layers = len(layers)
        shape = (num_layers, d_model, config.num_features)
        if seed is None:
            with torch.device("meta"):
                first = Weights(torch.empty(shape), torch.empty(config.num_features, num_layers, d_model))
        else:
            first = initial_weights(config.initialization, *shape, seed, data_NLD)
        self.parameterization = PARAMETERIZATIONS[type(config.parameterization)](config.parameterization, *first)
        self.b_enc_F = nn.Parameter(torch.zeros(config.num_features))
        self.b_dec_LD = nn.Parameter(torch.zeros(num_layers, d_model))
        self.activation_function = make_activation_function(config.activation_function, config.num_features)
        self._k = getattr(config.activation_function, "k", None)
        generator = None if seed is None else Generator().manual_seed(seed + 1)
        self.dense = DensePath(num_layers, d_model, config.dense_rank, generator) if config.dense_rank else None
        if seed is None:
            self.parameterization.to_empty(device="cpu")
        self.groups = Groups(config, layers) if config.groups else None
        if self.groups is not None and isinstance(self.parameterization, AlignedWeights):
            self.parameterization.register_buffer("both_LF", (self.groups.reads_FL * self.groups.writes_FL).T, persistent=False)

    def weights(self) -> Weights:
        """What encodes and decodes, with the layers that a group doesn't read or write at zero."""
        weights: Weights = self.parameterization()
        return weights if self.groups is None else self.groups.masked(weights)

    @property
    def W_enc_LDF(self) -> Tensor:
        """The encoder that works; what is stored where the parameterization is free and there are no groups."""
        return self.weights().W_enc_LDF

    @property
    def W_dec_FLD(self) -> Tensor:
        """The decoder that works; what is stored where the parameterization is free and there are no groups."""
        return self.weights().W_dec_FLD

    def decoder_norms(self) -> Tensor:
        """[F]: the sum over layers of each feature's decoder norms, float32."""
        return decoder_norms(self.W_dec_FLD)

    def ranking_norms(self, norms_F: Tensor) -> Tensor:
        """The decoder norms by which features compete: over their group's cost."""
        return norms_F if self.groups is None else norms_F / self.groups.cost_F

    def only_written(self, vectors_BLD: Tensor) -> Tensor:
        """The vectors with zeros in the layers that no group of features writes: those are not reconstructed and not in the loss."""
        return vectors_BLD if self.groups is None else vectors_BLD * self.groups.written_L[:, None]

    def pre_activations(self, acts_BLD: Tensor, W_enc_LDF: Tensor) -> Tensor:
        """[B, F], before the activation function."""
        return torch.addmm(self.b_enc_F, acts_BLD.flatten(1), W_enc_LDF.flatten(0, 1))

    def inference_form(self) -> InferenceForm:
        """What decides at inference which features fire and how much."""
        return self.activation_function.inference_form(self.ranking_norms(self.decoder_norms()), self.b_enc_F)

    def encode(self, acts_BLD: Tensor) -> Tensor:
        """features_BF at inference: each position alone, by the thresholds that training learned or estimated."""
        value_BF, threshold_F = self.values_and_thresholds(acts_BLD)
        return torch.where(value_BF > threshold_F, value_BF, 0.0)

    def values_and_thresholds(self, acts_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F] and [F]: each feature's activation if it fires, and what that must be above for it to fire, at inference."""
        gain_F, shift_F, threshold_F = self.inference_form()
        return self.pre_activations(acts_BLD, self.W_enc_LDF) * gain_F + shift_F, threshold_F

    def encode_as_trained(self, acts_BLD: Tensor) -> Tensor:
        """features_BF as they fire in training: where features compete, against the rest of this batch, `k` as it is at the end."""
        weights = self.weights()
        values = StepValues(coefficients={}, k=self._k, bandwidth=torch.ones((), device=acts_BLD.device))
        pre_BF = self.pre_activations(acts_BLD, weights.W_enc_LDF)
        norms_F = self.ranking_norms(decoder_norms(weights.W_dec_FLD))
        return self.activation_function.fire(pre_BF, norms_F, self.b_enc_F, values, None).features_BF

    def decode(self, features_BF: Tensor, acts_BLD: Tensor | None = None, W_dec_FLD: Tensor | None = None) -> Tensor:
        """The reconstruction of all layers' normalized activations, [B, L, D]; the dense path adds its part of `acts_BLD`.

        W_dec_FLD : of `weights()`, where the caller has them already.
        """
        W_dec_FLD = self.W_dec_FLD if W_dec_FLD is None else W_dec_FLD
        x_BC = torch.addmm(self.b_dec_LD.flatten(), features_BF, W_dec_FLD.flatten(1))
        x_BLD = x_BC.view(-1, *self.b_dec_LD.shape)
        return x_BLD if self.dense is None else x_BLD + self.dense_part(acts_BLD)

    def dense_part(self, acts_BLD: Tensor | None) -> Tensor:
        """What the dense path makes of the activations, [B, L, D]; only where there is one."""
        assert self.dense is not None
        if acts_BLD is None:
            raise ValueError("this crosscoder has a dense path beside its features: its reconstruction needs the activations too")
        if self.groups is None:
            out_BC: Tensor = self.dense(acts_BLD.flatten(1))
            return out_BC.view_as(acts_BLD)
        read_BLD = acts_BLD * self.groups.reads_FL.amax(0)[:, None]
        written_BC: Tensor = self.dense(read_BLD.flatten(1))
        return self.only_written(written_BC.view_as(acts_BLD))
