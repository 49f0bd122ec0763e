"""A crosscoder as plain weights on raw activations: normalization, parameterization and inference form are multiplied in.

Shapes: B positions in a batch, L layers, D model width, F features, R rank of the dense path.

    value_BF    = sum over l of raw_BLD[:, l] @ W_enc_LDF[l] + b_enc_F
    features_BF = value_BF where value_BF > threshold_F, else 0
    x_BLD       = features_BF @ W_dec_FLD + b_dec_LD, plus (raw @ dense_read) @ dense_write where there is a dense path

Exact: every kind of crosscoder has this form, in real numbers. It is what other libraries read.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.normalizer import Normalizer


class Folded(NamedTuple):
    """In the dtype that `fold` was asked for, on the CPU."""

    W_enc_LDF: Tensor
    b_enc_F: Tensor
    threshold_F: Tensor
    """From 0 on, in the unit of the features."""
    W_dec_FLD: Tensor
    b_dec_LD: Tensor
    dense_read_CR: Tensor | None
    dense_write_RC: Tensor | None

    def encode(self, raw_BLD: Tensor) -> Tensor:
        """features_BF."""
        value_BF = torch.addmm(self.b_enc_F, raw_BLD.flatten(1), self.W_enc_LDF.flatten(0, 1))
        return torch.where(value_BF > self.threshold_F, value_BF, 0.0)

    def decode(self, features_BF: Tensor, raw_BLD: Tensor | None = None) -> Tensor:
        """The reconstruction, [B, L, D]; the dense path, where there is one, needs the activations."""
        x_BC = torch.addmm(self.b_dec_LD.flatten(), features_BF, self.W_dec_FLD.flatten(1))
        if self.dense_read_CR is not None and self.dense_write_RC is not None:
            if raw_BLD is None:
                raise ValueError("this crosscoder has a dense path beside its features: its reconstruction needs the activations too")
            x_BC = x_BC + (raw_BLD.flatten(1) @ self.dense_read_CR) @ self.dense_write_RC
        return x_BC.view(-1, *self.b_dec_LD.shape)


@torch.no_grad()
def fold(crosscoder: Crosscoder, normalizer: Normalizer, dtype: torch.dtype = torch.float32) -> Folded:
    """The folded form of a trained crosscoder; products of weights are taken in float64 before they are rounded to `dtype`."""
    weights, form = crosscoder.weights(), crosscoder.inference_form()
    scale_L1, offset_LD = normalizer.scale_L.double().cpu()[:, None], normalizer.offset_LD.double().cpu()
    gain_F, shift_F, threshold_F = (part.double().cpu() for part in form)
    W_enc_LDF = weights.W_enc_LDF.double().cpu() * scale_L1[..., None] * gain_F
    b_enc_F = crosscoder.b_enc_F.double().cpu() * gain_F + shift_F - torch.einsum("ld,ldf->f", offset_LD, W_enc_LDF)
    W_dec_FLD = weights.W_dec_FLD.double().cpu() / scale_L1
    b_dec_LD = crosscoder.b_dec_LD.double().cpu() / scale_L1 + offset_LD
    read_CR = write_RC = None
    if crosscoder.dense is not None:
        scales_C = scale_L1.expand_as(offset_LD).flatten()
        read_CR = crosscoder.dense.read_CR.double().cpu() * scales_C[:, None]
        write_RC = crosscoder.dense.write_RC.double().cpu() / scales_C
        b_dec_LD = b_dec_LD - ((offset_LD.flatten() @ read_CR) @ write_RC).view_as(b_dec_LD)
        read_CR, write_RC = read_CR.to(dtype), write_RC.to(dtype)
    return Folded(
        W_enc_LDF=W_enc_LDF.to(dtype),
        b_enc_F=b_enc_F.to(dtype),
        threshold_F=threshold_F.to(dtype),
        W_dec_FLD=W_dec_FLD.to(dtype),
        b_dec_LD=b_dec_LD.to(dtype),
        dense_read_CR=read_CR,
        dense_write_RC=write_RC,
    )
