"""What is looked at in a row's last step alone: gradients by layer, and medians over the batch's positions.

Sums over all steps would need these of every step; the medians also would need a state of their own in checkpoints.
Shapes: B positions in a batch, L layers, D model width, F features (of factorized weights: the vectors of their basis).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.crosscoder.objective import Outcome
from pipeline.crosscoder.training_state import TrainingState
from pipeline.crosscoder.weights import Weights, layer_norms


class LastStep(NamedTuple):
    """Of one step; float32, on the device."""

    encoder_gradient_FL: Tensor
    """Norm of the gradient of each feature's encoder in each layer, before clipping."""
    decoder_gradient_FL: Tensor
    median_norm_L: Tensor
    """Median over the batch of |x|, in the language model's units."""
    median_error_norm_L: Tensor
    """Median over the batch of |x - x_hat|, in the same units."""
    written: list[bool]
    """Of each layer, whether it is reconstructed."""

    @classmethod
    @torch.no_grad()
    def of(cls, state: TrainingState, raw_BLD: Tensor, outcome: Outcome) -> "LastStep":
        """Between the backward pass and clipping, which changes the gradients in place."""
        gradients = state.crosscoder.parameterization.gradients()
        groups = state.crosscoder.groups
        return cls(
            *norms_by_layer(gradients),
            torch.linalg.vector_norm(raw_BLD.float(), dim=-1).median(dim=0).values,
            (outcome.error_BL / state.normalizer.scale_L).median(dim=0).values,
            [True] * len(state.layers) if groups is None else (groups.written_L > 0).tolist(),
        )

    def metrics(self) -> dict[str, Any]:
        """By layer; waits for the device. None for the error of a layer that no feature writes."""
        norms, errors = self.median_norm_L.tolist(), self.median_error_norm_L.tolist()
        known = [error if written else None for error, written in zip(errors, self.written, strict=True)]
        return {
            "median_norm_by_layer": norms,
            "median_error_norm_by_layer": known,
            "median_error_by_layer": [
                error / norm if error is not None and norm > 0 else None for error, norm in zip(known, norms, strict=True)
            ],
            "encoder_gradient_norm_by_layer": torch.linalg.vector_norm(self.encoder_gradient_FL, dim=0).tolist(),
            "decoder_gradient_norm_by_layer": torch.linalg.vector_norm(self.decoder_gradient_FL, dim=0).tolist(),
        }


def norms_by_layer(weights: Weights) -> tuple[Tensor, Tensor]:
    """Encoder and decoder, [F, L] each: of every feature the norm in each layer, of weights or of their gradients."""
    return torch.linalg.vector_norm(weights.W_enc_LDF, dim=1).T, layer_norms(weights.W_dec_FLD)
