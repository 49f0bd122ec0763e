"""Plain tensors that need no library: the folded crosscoder in the names and shapes that the public replications use.

    crosscoder.safetensors   W_enc [L, D, F], b_enc [F], threshold [F], W_dec [F, L, D], b_dec [L, D]; where there is a dense path,
                             dense_read [L D, R] and dense_write [R, L D]; all float32

L layers, D model width, F features, R rank of the dense path. On activations as the language model has them (see
`pipeline.crosscoder.folding`): every kind of crosscoder has this form. The public replication of model diffing
(github.com/ckkissane/crosscoder-model-diff-replication) has the same without thresholds, in `cc_weights.pt`.
"""

from pathlib import Path

from pipeline.exchange.exported import Exported
from pipeline.exchange.imported import Imported, folded_of
from pipeline.exchange.tensor_file import check_all_taken, read_tensors, take, weights_in, write_tensors

FILE = "crosscoder.safetensors"


def write(directory: Path, exported: Exported) -> list[str]:
    """Writes the file; gives sentences that whoever reads it has to know: none."""
    folded = exported.folded
    tensors = {"W_enc": folded.W_enc_LDF, "b_enc": folded.b_enc_F, "threshold": folded.threshold_F}
    tensors |= {"W_dec": folded.W_dec_FLD, "b_dec": folded.b_dec_LD}
    if folded.dense_read_CR is not None and folded.dense_write_RC is not None:
        tensors |= {"dense_read": folded.dense_read_CR, "dense_write": folded.dense_write_RC}
    write_tensors(directory / FILE, tensors)
    return []


def read(path: Path, num_layers: int) -> Imported:
    """The crosscoder at `path`, of either kind. Raises `UserError` for what is not of the layout."""
    file = weights_in(path, [FILE, "cc_weights.pt"])
    tensors = read_tensors(file)
    W_enc_LDF = take(tensors, file, "W_enc", (num_layers, None, None))
    _, d_model, num_features = W_enc_LDF.shape
    folded = folded_of(
        W_enc_LDF,
        take(tensors, file, "b_enc", (num_features,)),
        take(tensors, file, "W_dec", (num_features, num_layers, d_model)),
        take(tensors, file, "b_dec", (num_layers, d_model)),
        threshold_F=take(tensors, file, "threshold", (num_features,)) if "threshold" in tensors else None,
    )
    if "dense_read" in tensors:
        read_CR = take(tensors, file, "dense_read", (num_layers * d_model, None))
        write_RC = take(tensors, file, "dense_write", (read_CR.shape[1], num_layers * d_model))
        folded = folded._replace(dense_read_CR=read_CR, dense_write_RC=write_RC)
    check_all_taken(tensors, file)
    return Imported(folded, file)


def loading(exported: Exported) -> str:
    """How to load the file, as Python."""
    folded = exported.folded
    num_layers, d_model, _ = folded.W_enc_LDF.shape
    dense = " + (x @ t['dense_read']) @ t['dense_write']" if folded.dense_read_CR is not None else ""
    download = "" if exported.repository is None else "from huggingface_hub import hf_hub_download\n"
    file = f'"{FILE}"' if exported.repository is None else f'hf_hub_download("{exported.repository}", "{FILE}")'
    return f"""\
{download}from safetensors.torch import load_file

t = load_file({file})
x = activations.flatten(1)   # activations: [batch, {num_layers}, {d_model}], as the language model has them
value = x @ t["W_enc"].flatten(0, 1) + t["b_enc"]
features = value * (value > t["threshold"])   # [batch, features]
reconstruction = features @ t["W_dec"].flatten(1) + t["b_dec"].flatten(){dense}
reconstruction = reconstruction.unflatten(1, ({num_layers}, {d_model}))"""
