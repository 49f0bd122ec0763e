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
from typing import Any

import torch
from torch import Tensor

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.exchange.exported import Exported
from pipeline.exchange.imported import Imported, folded_of
from pipeline.exchange.tensor_file import check_all_taken, read_tensors, take, weights_in, write_tensors

NORMALIZATIONS = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
"""By `code_normalization_id`."""
NO_NORMALIZATION = 4
SHARE_OF_SAE, SHARE_OF_CROSSCODER = 1.0, 0.1
"""Of MIXED, unless config.json says otherwise."""
ABOVE_0 = 1e-8
"""What the library adds to a scale before it divides by it."""
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


def read(path: Path, num_layers: int) -> Imported:
    """The crosscoder at `path`, a directory or a file of weights. Raises `UserError` for what is not of the layout or can't be held here.

    Activation normalization that the library learned, and the threshold, are multiplied into the weights.
    """
    file = weights_in(path, ["model.safetensors", "ae.pt"])
    config = records.read_json(file.with_name("config.json")) if file.with_name("config.json").exists() else {}
    if config.get("encoder_layers") is not None:
        raise UserError(f"{file.with_name('config.json')} has encoder_layers: its encoder reads some layers only, which is not taken")
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in read_tensors(file).items()}
    W_enc_LDF = take(tensors, file, "encoder.weight", (num_layers, None, None)).double()
    _, d_model, num_features = W_enc_LDF.shape
    b_enc_F = take(tensors, file, "encoder.bias", (num_features,)).double()
    W_dec_FLD = take(tensors, file, "decoder.weight", (num_layers, num_features, d_model)).double().transpose(0, 1)
    b_dec_LD = take(tensors, file, "decoder.bias", (num_layers, d_model)).double()
    norms_F = _code_norms(W_dec_FLD, int(tensors.pop("code_normalization_id", torch.tensor(0))), config, file)
    threshold_F = take(tensors, file, "threshold", ()).double() / norms_F.clamp(min=1e-38) if "threshold" in tensors else None
    if "feature_scale" in tensors:
        scale_F = take(tensors, file, "feature_scale", (num_features,)).double()
        if not bool((scale_F > 0).all()):
            raise UserError(f"{file}: feature_scale holds numbers that are not above 0; the file is damaged")
        W_enc_LDF, b_enc_F, W_dec_FLD = W_enc_LDF / scale_F, b_enc_F / scale_F, W_dec_FLD * scale_F[:, None, None]
        threshold_F = None if threshold_F is None else threshold_F / scale_F
    mean_LD, scale_L11 = _normalizer(tensors, file, num_layers, d_model)
    W_enc_LDF, W_dec_FLD = W_enc_LDF * scale_L11, W_dec_FLD / (scale_L11[:, 0] + _added(scale_L11[:, 0]))
    b_enc_F = b_enc_F - torch.einsum("ld,ldf->f", mean_LD, W_enc_LDF)
    b_dec_LD = b_dec_LD / (scale_L11[:, 0] + _added(scale_L11[:, 0])) + mean_LD
    tensors.pop("k", None)
    check_all_taken(tensors, file)
    return Imported(folded_of(W_enc_LDF, b_enc_F, W_dec_FLD, b_dec_LD, threshold_F=threshold_F), file)


def _code_norms(W_dec_FLD: Tensor, number: int, config: dict[str, Any], file: Path) -> Tensor:
    """[F]: the code normalization, by which the library multiplies what it compares with the threshold."""
    name = NORMALIZATIONS.get(number, str(config.get("code_normalization", "CROSSCODER")))
    sae_F, crosscoder_F = W_dec_FLD.flatten(1).norm(dim=1), W_dec_FLD.norm(dim=2).sum(dim=1)
    shares = (
        config.get(f"code_normalization_alpha_{key}", default) for key, default in (("sae", SHARE_OF_SAE), ("cc", SHARE_OF_CROSSCODER))
    )
    of_sae, of_crosscoder = shares
    norms: dict[str, Tensor] = {"SAE": sae_F, "CROSSCODER": crosscoder_F, "NONE": torch.ones_like(sae_F)}
    norms["MIXED"] = sae_F * of_sae + crosscoder_F * of_crosscoder
    if name not in norms:
        raise UserError(f"{file} has code normalization {name}, by which a feature has an activation a layer; no crosscoder here has that")
    return norms[name]


def _normalizer(tensors: dict[str, Tensor], file: Path, num_layers: int, d_model: int) -> tuple[Tensor, Tensor]:
    """The mean [L, D] that is taken from activations, and what they are then multiplied by [L, 1, 1]."""
    mean_LD, std_LD = tensors.pop("activation_mean", None), tensors.pop("activation_std", None)
    scale = tensors.pop("activation_global_scale", None)
    tensors.pop("target_rms", None)
    if mean_LD is None or std_LD is None or bool(mean_LD.isnan().any()) or bool(std_LD.isnan().any()):
        return torch.zeros(num_layers, d_model, dtype=torch.float64), torch.ones(num_layers, 1, 1, dtype=torch.float64)
    if scale is None or scale.numel() not in (1, num_layers):
        raise UserError(f"{file} normalizes each neuron by itself, expected a scale a layer (activation_global_scale)")
    return mean_LD.double(), scale.double().flatten().expand(num_layers)[:, None, None]


def _added(scale_L1: Tensor) -> Tensor:
    """Nothing where there is no normalization: scale 1 is exact."""
    return torch.where(scale_L1 == 1, 0.0, ABOVE_0)


def loading(exported: Exported) -> str:
    """How to load the files, as Python."""
    name = "CrossCoder" if exported.fires_from_0 else "BatchTopKCrossCoder"
    num_layers, d_model, _ = exported.folded.W_enc_LDF.shape
    return f"""\
# pip install git+https://github.com/science-of-finetuning/dictionary_learning
# (the package of that name on PyPI has no crosscoders)
from dictionary_learning import {name}

crosscoder = {name}.from_pretrained("{exported.repository or "DIRECTORY"}", from_hub=True)   # True for a directory too
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
