"""What is read from the files of another library, whichever it is, and the crosscoder that it becomes."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config.crosscoder import CrosscoderConfig, FixedThreshold, Normalization, Relu
from pipeline.crosscoder.folding import Folded
from pipeline.crosscoder.model import Crosscoder


class Imported(NamedTuple):
    """A crosscoder on activations as they are, in float32, and the file that its weights were in."""

    folded: Folded
    file: Path


def folded_of(W_enc_LDF: Tensor, b_enc_F: Tensor, W_dec_FLD: Tensor, b_dec_LD: Tensor, *, threshold_F: Tensor | None) -> Folded:
    """These weights in float32, without a dense path; every threshold 0 where there are none."""
    # Behind a ReLU a threshold below 0 is one of 0.
    threshold_F = torch.zeros_like(b_enc_F) if threshold_F is None else threshold_F.clamp(min=0.0)
    W_enc_LDF, b_enc_F, threshold_F, W_dec_FLD, b_dec_LD = (
        part.float().contiguous() for part in (W_enc_LDF, b_enc_F, threshold_F, W_dec_FLD, b_dec_LD)
    )
    return Folded(W_enc_LDF, b_enc_F, threshold_F, W_dec_FLD, b_dec_LD, dense_read_CR=None, dense_write_RC=None)


def scaled(folded: Folded, scale_L: Tensor) -> Folded:
    """The same crosscoder on activations that were multiplied by `scale_L` before it saw them; products are taken in float64."""
    scale_L1 = scale_L.double()[:, None]
    changed = folded._replace(
        W_enc_LDF=(folded.W_enc_LDF.double() * scale_L1[..., None]).float(),
        W_dec_FLD=(folded.W_dec_FLD.double() / scale_L1).float(),
        b_dec_LD=(folded.b_dec_LD.double() / scale_L1).float(),
    )
    if folded.dense_read_CR is None or folded.dense_write_RC is None:
        return changed
    scale_C = scale_L1.expand_as(folded.b_dec_LD).flatten()
    read_CR, write_RC = folded.dense_read_CR.double() * scale_C[:, None], folded.dense_write_RC.double() / scale_C
    return changed._replace(dense_read_CR=read_CR.float(), dense_write_RC=write_RC.float())


def crosscoder_of(folded: Folded, layers: list[str]) -> tuple[CrosscoderConfig, Crosscoder]:
    """A crosscoder with these very weights: without normalization, and with thresholds that stay as they are."""
    _, d_model, num_features = folded.W_enc_LDF.shape
    function = FixedThreshold() if bool((folded.threshold_F > 0).any()) else Relu()
    rank = 0 if folded.dense_read_CR is None else folded.dense_read_CR.shape[1]
    normalization = Normalization(center=False, scale="none")
    config = CrosscoderConfig(num_features=num_features, activation_function=function, dense_rank=rank, normalization=normalization)
    crosscoder = Crosscoder(config, layers=layers, d_model=d_model)
    tensors = {"parameterization.W_enc_LDF": folded.W_enc_LDF, "parameterization.W_dec_FLD": folded.W_dec_FLD}
    tensors |= {"b_enc_F": folded.b_enc_F, "b_dec_LD": folded.b_dec_LD}
    if isinstance(function, FixedThreshold):
        tensors["activation_function.threshold_F"] = folded.threshold_F
    if folded.dense_read_CR is not None and folded.dense_write_RC is not None:
        tensors |= {"dense.read_CR": folded.dense_read_CR, "dense.write_RC": folded.dense_write_RC}
    crosscoder.load_state_dict(tensors)
    return config, crosscoder
