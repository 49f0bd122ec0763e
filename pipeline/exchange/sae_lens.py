"""The layout of SAELens: the whole crosscoder as one of its autoencoders, over the layers' activations side by side.

    crosscoder/cfg.json                   {"architecture": "jumprelu", "d_in": 1536, "d_sae": 12288, "apply_b_dec_to_input": false, ...}
    crosscoder/sae_weights.safetensors    W_enc [L D, F], b_enc [F], W_dec [F, L D], b_dec [L D]; threshold [F]; W_skip [L D, L D]

L layers, D model width, F features. SAELens has no crosscoders, but what it encodes is a vector of any length: the layers' activations
one after another make one of L times D. The architecture is `standard` where features fire from 0 on, else `jumprelu`; with a dense
path, which SAELens has in transcoders alone, `skip_transcoder` or `jumprelu_skip_transcoder`, whose input and output are the same vector.
"""

import re
from pathlib import Path
from typing import Any

import torch

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.config.sites import ATTENTION_OUTPUT, MLP_OUTPUT, RESIDUAL, SiteName
from pipeline.exchange.exported import Exported
from pipeline.exchange.imported import Imported, folded_of
from pipeline.exchange.tensor_file import check_all_taken, read_tensors, take, weights_in, write_tensors

FOLDER = "crosscoder"
"""SAELens loads from the hub by repository and folder."""
VERSION = "6.54.12"
"""The release whose layout this is; cfg.json names it, and releases from 6.0 on read it as it stands."""
HOOKS = {RESIDUAL: "hook_resid_post", MLP_OUTPUT: "hook_mlp_out", ATTENTION_OUTPUT: "hook_attn_out"}
"""What TransformerLens calls the points of a block."""


def write(directory: Path, exported: Exported) -> list[str]:
    """Writes the two files; gives sentences that whoever reads them has to know."""
    folded = exported.folded
    num_layers, d_model, num_features = folded.W_enc_LDF.shape
    tensors = {"W_enc": folded.W_enc_LDF.flatten(0, 1), "b_enc": folded.b_enc_F}
    tensors |= {"W_dec": folded.W_dec_FLD.flatten(1), "b_dec": folded.b_dec_LD.flatten()}
    if not exported.fires_from_0:
        tensors["threshold"] = folded.threshold_F
    config: dict[str, Any] = {"architecture": architecture(exported), "d_in": num_layers * d_model, "d_sae": num_features}
    if folded.dense_read_CR is not None and folded.dense_write_RC is not None:
        tensors["W_skip"] = (folded.dense_read_CR @ folded.dense_write_RC).T
        config["d_out"] = num_layers * d_model
    config |= {"dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False, "normalize_activations": "none"}
    config |= {"reshape_activations": "none", "metadata": _metadata(exported)}
    (directory / FOLDER).mkdir()
    write_tensors(directory / FOLDER / "sae_weights.safetensors", tensors)
    records.write_json(directory / FOLDER / "cfg.json", config)
    if num_layers == 1:
        return ["In TransformerLens take `from_pretrained_no_processing`: other ways to load a model change its activations."]
    width = num_layers * d_model
    vector = f"the activations of the {num_layers} layers at one position, one after another in the order above"
    advice = (
        "It hooks into no single place of a model: collect the layers' activations, then encode. A feature is one number for all layers."
    )
    return [f"To SAELens this is one autoencoder of vectors of length {width:,}: {vector}. {advice}"]


def read(path: Path, num_layers: int) -> Imported:
    """The autoencoder at `path`, as a crosscoder of `num_layers` layers side by side. Raises `UserError` for what it can't be."""
    directory = path / FOLDER if (path / FOLDER).is_dir() else path
    file = weights_in(directory, ["sae_weights.safetensors"])
    config, tensors = records.read_json(file.with_name("cfg.json")), read_tensors(file)
    kind = config.get("architecture", "standard")
    faults = {
        f"architecture {kind}": kind not in ("standard", "jumprelu", "skip_transcoder", "jumprelu_skip_transcoder"),
        f"normalize_activations {config.get('normalize_activations')}": config.get("normalize_activations", "none") not in ("none", False),
        f"activation_fn {config.get('activation_fn')}": config.get("activation_fn", "relu") != "relu",
        f"reshape_activations {config.get('reshape_activations')}": config.get("reshape_activations", "none") != "none",
    }
    if found := [fault for fault, is_there in faults.items() if is_there]:
        raise UserError(
            f"{file.with_name('cfg.json')} has {found[0]}, which no crosscoder here computes; taken are standard and jumprelu autoencoders "
            "and skip transcoders without normalization"
        )
    W_enc_CF = take(tensors, file, "W_enc", (None, None))
    width, num_features = W_enc_CF.shape
    if width % num_layers:
        raise UserError(f"{file}: vectors have length {width}, which is not that of {num_layers} layers side by side; name other layers")
    b_enc_F, b_dec_C = take(tensors, file, "b_enc", (num_features,)), take(tensors, file, "b_dec", (width,))
    if config.get("apply_b_dec_to_input", "d_out" not in config):
        b_enc_F = (b_enc_F.double() - b_dec_C.double() @ W_enc_CF.double()).float()
    folded = folded_of(
        W_enc_CF.view(num_layers, -1, num_features),
        b_enc_F,
        take(tensors, file, "W_dec", (num_features, width)).view(num_features, num_layers, -1),
        b_dec_C.view(num_layers, -1),
        threshold_F=take(tensors, file, "threshold", (num_features,)) if "jumprelu" in kind else None,
    )
    if "skip" in kind:
        skip_CC = take(tensors, file, "W_skip", (width, width))
        folded = folded._replace(dense_read_CR=skip_CC.T.contiguous(), dense_write_RC=torch.eye(width))
    check_all_taken(tensors, file)
    return Imported(folded, file)


def architecture(exported: Exported) -> str:
    """SAELens's name for it."""
    if exported.folded.dense_read_CR is not None:
        return "skip_transcoder" if exported.fires_from_0 else "jumprelu_skip_transcoder"
    return "standard" if exported.fires_from_0 else "jumprelu"


def loading(exported: Exported) -> str:
    """How to load the files, as Python."""
    num_layers, d_model, _ = exported.folded.W_enc_LDF.shape
    whole = "" if exported.folded.dense_read_CR is None else "\nreconstruction = sae(x)   # decode(features) leaves the dense path out"
    from_hub = f'SAE.from_pretrained("{exported.repository}", "{FOLDER}")   # or SAE.load_from_disk("{FOLDER}")'
    load = f'SAE.load_from_disk("{FOLDER}")' if exported.repository is None else from_hub
    return f"""\
# pip install sae-lens
from sae_lens import SAE

sae = {load}
x = activations.flatten(-2)   # activations: [..., {num_layers}, {d_model}], as the language model has them
features = sae.encode(x)
reconstruction = sae.decode(features){whole}
reconstruction = reconstruction.unflatten(-1, ({num_layers}, {d_model}))"""


def _metadata(exported: Exported) -> dict[str, Any]:
    trained = exported.trained
    metadata = {"sae_lens_version": VERSION, "layers": trained.layers, "context_size": trained.provenance.context_tokens}
    metadata["prepend_bos"] = trained.provenance.beginning_of_text_id is not None
    if "" in exported.language_models:
        metadata["model_name"] = exported.language_models[""].partition("@")[0]
    hooks = [_hook(layer) for layer in trained.layers]
    if len(hooks) == 1 and hooks[0] is not None:
        metadata["hook_name"] = hooks[0]
    return metadata


def _hook(layer: str) -> str | None:
    """TransformerLens's name of a site; None of a site that is not the only model's, or whose block has no number."""
    site = SiteName.parse(layer)
    number = re.search(r"\.(\d+)$", site.block)
    return None if site.model or number is None else f"blocks.{number[1]}.{HOOKS[site.point]}"
