"""The encoder and decoder weights of a crosscoder, as functions of what is stored and trained.

Shapes: L layers, D model width, F features, R vectors of a shared basis.

A new parameterization is a class here with its settings in `pipeline.config.crosscoder`, and an entry in `PARAMETERIZATIONS`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config.crosscoder import Aligned, Factorized, Free
from pipeline.config.errors import UserError
from pipeline.config.schema import Config


class Weights(NamedTuple):
    """What encodes and decodes; float32."""

    W_enc_LDF: Tensor
    W_dec_FLD: Tensor


def layer_norms(W_dec_FLD: Tensor) -> Tensor:
    """[F, L]: the Euclidean norm of each feature's decoder in each layer, float32."""
    norms_FL: Tensor = torch.linalg.vector_norm(W_dec_FLD, dim=-1)
    return norms_FL


def decoder_norms(W_dec_FLD: Tensor) -> Tensor:
    """[F]: the sum over layers of each feature's decoder norms, float32."""
    return layer_norms(W_dec_FLD).sum(dim=-1)


class FreeWeights(nn.Module):
    """Stored as they are used."""

    def __init__(self, settings: Free, W_enc_LDF: Tensor, W_dec_FLD: Tensor) -> None:
        super().__init__()
        self.W_enc_LDF = nn.Parameter(W_enc_LDF)
        self.W_dec_FLD = nn.Parameter(W_dec_FLD)

    def forward(self) -> Weights:
        return Weights(self.W_enc_LDF, self.W_dec_FLD)

    def gradients(self) -> Weights:
        """Of what is stored, after a backward pass."""
        return Weights(_gradient(self.W_enc_LDF), _gradient(self.W_dec_FLD))


class AlignedWeights(nn.Module):
    """The stored encoder, moved along the decoder until their inner product over all layers is one."""

    both_LF: Tensor | None

    def __init__(self, settings: Aligned, W_enc_LDF: Tensor, W_dec_FLD: Tensor) -> None:
        super().__init__()
        self.W_enc_LDF = nn.Parameter(W_enc_LDF)
        self.W_dec_FLD = nn.Parameter(W_dec_FLD)
        # 1 for the layers that a feature both reads and writes, where groups tell: the inner product is over those.
        self.register_buffer("both_LF", None, persistent=False)

    def forward(self) -> Weights:
        d_LDF = self.W_dec_FLD.permute(1, 2, 0)
        if self.both_LF is not None:
            d_LDF = d_LDF * self.both_LF[:, None]
        inner_F = (self.W_enc_LDF * d_LDF).sum(dim=(0, 1))
        squared_F = d_LDF.square().sum(dim=(0, 1)).clamp(min=torch.finfo(torch.float32).tiny)
        return Weights(self.W_enc_LDF + d_LDF * ((1.0 - inner_F) / squared_F), self.W_dec_FLD)

    def gradients(self) -> Weights:
        """Of what is stored, after a backward pass."""
        return Weights(_gradient(self.W_enc_LDF), _gradient(self.W_dec_FLD))


class FactorizedWeights(nn.Module):
    """Products of coefficients [F, R] and a basis [R, L, D]: the best of that rank for the weights it begins from.

    The encoder begins with the decoder's factors where it begins as the decoder transposed.
    """

    def __init__(self, settings: Factorized, W_enc_LDF: Tensor, W_dec_FLD: Tensor) -> None:
        super().__init__()
        num_layers, d_model, _ = W_enc_LDF.shape
        if settings.rank > num_layers * d_model:
            raise UserError(f"parameterization.rank is {settings.rank}, but {num_layers} layers of width {d_model} have no more directions")
        self.encoder_FR, self.encoder_basis_RLD = _factors(W_enc_LDF.permute(2, 0, 1), settings.rank)
        self.decoder_FR, self.decoder_basis_RLD = _factors(W_dec_FLD, settings.rank)

    def forward(self) -> Weights:
        W_enc_FLD = torch.einsum("fr,rld->fld", self.encoder_FR, self.encoder_basis_RLD)
        return Weights(W_enc_FLD.permute(1, 2, 0), torch.einsum("fr,rld->fld", self.decoder_FR, self.decoder_basis_RLD))

    def gradients(self) -> Weights:
        """Of the two bases, after a backward pass: the coefficients belong to no layer. R stands where F stands elsewhere."""
        return Weights(_gradient(self.encoder_basis_RLD).permute(1, 2, 0), _gradient(self.decoder_basis_RLD))


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Zero where the loss does not depend on the parameter."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _factors(W_FLD: Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Coefficients and an orthonormal basis, of unit vectors over all layers, on which the weights are projected.

    The basis are the principal directions of a weight matrix; for one that is still empty, to be loaded, only its shape counts.
    """
    num_features, num_layers, d_model = W_FLD.shape
    if W_FLD.device.type == "meta":
        return nn.Parameter(W_FLD.new_empty(num_features, rank)), nn.Parameter(W_FLD.new_empty(rank, num_layers, d_model))
    flat_FC = W_FLD.reshape(num_features, -1)
    # The eigenvectors of the C x C Gram matrix, in float64 so that their order is stable; C = L D is far below F.
    _, vectors_CC = torch.linalg.eigh((flat_FC.T @ flat_FC).double())
    basis_RC = vectors_CC.flip(1)[:, :rank].T.to(flat_FC.dtype)
    coefficients_FR = flat_FC @ basis_RC.T
    # A projection of random directions on R of C dimensions keeps R / C of the squared norm: the norms are set back.
    lost_F1 = flat_FC.norm(dim=1, keepdim=True) / coefficients_FR.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return nn.Parameter(coefficients_FR * lost_F1), nn.Parameter(basis_RC.reshape(rank, num_layers, d_model).contiguous())


class DensePath(nn.Module):
    """A linear map of small rank beside the dictionary: (acts @ read) @ write, zero at the start."""

    def __init__(self, num_layers: int, d_model: int, rank: int, generator: torch.Generator | None) -> None:
        super().__init__()
        width = num_layers * d_model
        self.read_CR = nn.Parameter(torch.randn(width, rank, generator=generator) / width**0.5 if generator else torch.empty(width, rank))
        self.write_RC = nn.Parameter(torch.zeros(rank, width))

    def forward(self, acts_BC: Tensor) -> Tensor:
        """[B, L D] to [B, L D]."""
        return (acts_BC @ self.read_CR) @ self.write_RC


PARAMETERIZATIONS: dict[type[Config], Any] = {Free: FreeWeights, Aligned: AlignedWeights, Factorized: FactorizedWeights}
"""By the type of its settings, a class that is made from the settings and the first W_enc_LDF and W_dec_FLD."""
