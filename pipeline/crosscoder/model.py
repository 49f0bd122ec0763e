"""The crosscoder: one dictionary of features that reads and writes several layers (Lindsey et al. 2024).

Shapes: B positions in a batch, L layers read and written, D model width, F features. Works on normalized activations
(see `pipeline.crosscoder.normalizer`).

    pre_BF  = sum over l of acts_BLD[:, l] @ W_enc_LDF[l] + b_enc_F
    x_BLD   = features_BF @ W_dec_FLD + b_dec_LD
"""

import torch
from torch import Tensor, nn

from pipeline.config.crosscoder import BatchTopk, CrosscoderConfig
from pipeline.crosscoder.initialization import initial_weights
from pipeline.crosscoder.sparsity import ACTIVATION_FUNCTIONS, Firing, decoder_norms, update_threshold


class Crosscoder(nn.Module):
    """Parameters are float32; under autocast the two matrix products run in its dtype.

    Buffers: `threshold`, the rank above which a feature fires at inference where the activation function has one, and
    `num_threshold_updates`, the batches that it is a running average of.
    """

    threshold: Tensor
    num_threshold_updates: Tensor

    def __init__(self, config: CrosscoderConfig, *, num_layers: int, d_model: int, seed: int | None = None) -> None:
        """With a seed the weights are drawn; without one they are left empty, for weights that will be loaded."""
        super().__init__()
        self.settings = config.activation_function
        self.activation_function = ACTIVATION_FUNCTIONS[type(config.activation_function)]
        num_features = config.num_features
        if seed is None:
            W_enc_LDF, W_dec_FLD = torch.empty(num_layers, d_model, num_features), torch.empty(num_features, num_layers, d_model)
        else:
            W_enc_LDF, W_dec_FLD = initial_weights(config.initialization, num_layers, d_model, num_features, seed)
        self.W_enc_LDF = nn.Parameter(W_enc_LDF)
        self.b_enc_F = nn.Parameter(torch.zeros(num_features))
        self.W_dec_FLD = nn.Parameter(W_dec_FLD)
        self.b_dec_LD = nn.Parameter(torch.zeros(num_layers, d_model))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("num_threshold_updates", torch.zeros((), dtype=torch.int64))

    def decoder_norms(self) -> Tensor:
        """[F]: the sum over layers of each feature's decoder norms, float32."""
        return decoder_norms(self.W_dec_FLD)

    def pre_activations(self, acts_BLD: Tensor) -> Tensor:
        """[B, F], before the activation function."""
        return torch.addmm(self.b_enc_F, acts_BLD.flatten(1), self.W_enc_LDF.flatten(0, 1))

    def fire(self, pre_BF: Tensor) -> Firing:
        """The features as in training: BatchTopK looks at the whole batch."""
        return self.activation_function.in_training(pre_BF, self.W_dec_FLD, self.settings)

    def encode(self, acts_BLD: Tensor) -> Tensor:
        """features_BF at inference: each position alone, by the threshold that training estimated."""
        pre_BF = self.pre_activations(acts_BLD)
        return self.activation_function.at_inference(pre_BF, self.W_dec_FLD, self.threshold, self.settings)

    def update_threshold(self, smallest_rank: Tensor) -> None:
        """Takes the smallest rank that fired in a training batch into the running average that is the threshold."""
        if isinstance(self.settings, BatchTopk):
            update_threshold(self.threshold, self.num_threshold_updates, smallest_rank, self.settings.threshold_momentum)

    def decode(self, features_BF: Tensor) -> Tensor:
        """The reconstruction of all layers' normalized activations, [B, L, D]."""
        x_BC = torch.addmm(self.b_dec_LD.flatten(), features_BF, self.W_dec_FLD.flatten(1))
        return x_BC.view(-1, *self.b_dec_LD.shape)
