"""The layout of `dictionary_learning`'s CrossCoder and BatchTopKCrossCoder (github.com/science-of-finetuning/dictionary_learning).

    config.json          arguments of the class: {"activation_dim": 768, "dict_size": 12288, "num_layers": 2, "code_normalization": "NONE"}
    model.safetensors    encoder.weight [L, D, F], encoder.bias [F], decoder.weight [L, F, D], decoder.bias [L, D], code_normalization_id;
                         of a BatchTopKCrossCoder also k and threshold, both scalars

L layers, D model width, F features. It encodes relu(x . encoder.weight + encoder.bias); a BatchTopKCrossCoder sets to 0 what, times the
feature's code normalization, is not above the threshold. That threshold is one for all features. With `code_normalization` NONE the
factor is 1, so features with thresholds of their own are brought to one threshold by their unit: feature i is given times
`feature_scale[i]`, its decoder divided by it. The library reads past that tensor, which it does not know.
"""

from pathlib import Path

import torch
from torch import Tensor

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.exchange.exported import Exported
from pipeline.exchange.tensor_file import write_tensors

NO_NORMALIZATION = 4
"""`code_normalization_id` of NONE."""
UNREACHED = 1e-30
"""A feature whose threshold lies above the others by more than the inverse of this never fires. Such is one without a decoder, where
features are ranked by its norm."""


def write(directory: Path, exported: Exported) -> list[str]:
    """Writes the two files; gives sentences that whoever reads them has to know.

    k, which the library uses only where it is told to ignore the threshold, is 0 where training had none. Raises `UserError` for what
    the layout can't hold: a dense path, and thresholds of which only some are 0.
    """
    folded, k = exported.folded, exported.k
    if folded.dense_read_CR is not None:
        rank = folded.dense_read_CR.shape[1]
        raise UserError(
            f"this crosscoder has a dense path of rank {rank} beside its features, which dictionary_learning has no place for; "
            "export it to sae_lens or safetensors"
        )
    num_layers, d_model, num_features = folded.W_enc_LDF.shape
    arguments = {"activation_dim": d_model, "dict_size": num_features, "num_layers": num_layers, "code_normalization": "NONE"}
    threshold, scale_F = _one_threshold(folded.threshold_F)
    W_enc_LDF, b_enc_F, W_dec_FLD = folded.W_enc_LDF, folded.b_enc_F, folded.W_dec_FLD
    remarks = []
    tensors: dict[str, Tensor] = {"code_normalization_id": torch.tensor(NO_NORMALIZATION)}
    if threshold is not None:
        reached_F = scale_F > UNREACHED
        # Pre-activations of 0 say "never" in a unit of 1, for whoever divides by the scale.
        W_enc_LDF, b_enc_F = W_enc_LDF * torch.where(reached_F, scale_F, 0.0), b_enc_F * torch.where(reached_F, scale_F, 0.0)
        scale_F = torch.where(reached_F, scale_F, 1.0)
        W_dec_FLD = W_dec_FLD / scale_F[:, None, None]
        tensors |= {"threshold": torch.tensor(threshold), "k": torch.tensor(k or 0, dtype=torch.int32)}
        arguments["k"] = k or 0
        if k is None:
            remarks.append("This crosscoder was not trained with a k, so `use_threshold=False` has no meaning for it: k is 0 there.")
        if bool((scale_F != 1).any()):
            tensors["feature_scale"] = scale_F.float()
            remarks.append(
                "The library has one threshold for all features, so feature i is given times `feature_scale[i]` (a tensor in "
                "model.safetensors) and its decoder divided by it. Which features fire, and the reconstruction, are the same."
            )
    tensors |= {
        "encoder.weight": W_enc_LDF,
        "encoder.bias": b_enc_F,
        "decoder.weight": W_dec_FLD.transpose(0, 1),
        "decoder.bias": folded.b_dec_LD,
    }
    write_tensors(directory / "model.safetensors", tensors)
    records.write_json(directory / "config.json", arguments)
    return remarks


def loading(exported: Exported) -> str:
    """How to load the files, as Python."""
    name = "CrossCoder" if exported.fires_from_0 else "BatchTopKCrossCoder"
    num_layers, d_model, _ = exported.folded.W_enc_LDF.shape
    return f"""\
# pip install git+https://github.com/science-of-finetuning/dictionary_learning
# (the package of that name on PyPI has no crosscoders)
from dictionary_learning import {name}

crosscoder = {name}.from_pretrained(DIRECTORY_OR_REPOSITORY, from_hub=True)
features = crosscoder.encode(activations)      # activations: [batch, {num_layers}, {d_model}], as the language model has them
reconstruction = crosscoder.decode(features)   # [batch, {num_layers}, {d_model}]"""


def _one_threshold(threshold_F: Tensor) -> tuple[float | None, Tensor]:
    """A threshold for all features, and the factor on each that makes it its own; None where every feature's is 0."""
    positive_F = threshold_F > 0
    if not bool(positive_F.any()):
        return None, torch.ones_like(threshold_F)
    if not bool(positive_F.all()):
        some, none = int(positive_F.nonzero()[0]), int((~positive_F).nonzero()[0])
        raise UserError(
            f"feature {none} fires from 0 on and feature {some} from {threshold_F[some].item():.4g}, but dictionary_learning has one "
            "threshold for all features; export this crosscoder to sae_lens or safetensors"
        )
    # The median: a number that float32 has, and most features keep their order of magnitude.
    chosen = threshold_F.float().median()
    return chosen.item(), chosen.double() / threshold_F
