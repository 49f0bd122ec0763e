"""import: a crosscoder from the files of another library, as a checkpoint that every stage takes which takes one of `train`.

Its weights are on activations as the language model has them, so the checkpoint says no normalization. What it was trained on is not
known: it counts as trained on no tokens here, and no feature as dead in training. It is tried on a few positions, since nothing in the
files shows a wrong order of layers or a scale that is missing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline import records
from pipeline.activations.opening import open_source
from pipeline.activations.source import ActivationSource
from pipeline.config.errors import UserError
from pipeline.config.import_crosscoder import ImportConfig
from pipeline.crosscoder import checkpoint_files
from pipeline.crosscoder.checkpoint import crosscoder_part, load_crosscoder
from pipeline.crosscoder.normalizer import Normalizer
from pipeline.exchange import dictionary_learning, plain_tensors, sae_lens
from pipeline.exchange.imported import Imported, crosscoder_of, scaled
from pipeline.run import Run

READERS: dict[str, Callable[[Path, int], Imported]] = {
    "sae_lens": sae_lens.read,
    "dictionary_learning": dictionary_learning.read,
    "ckkissane": plain_tensors.read,
    "safetensors": plain_tensors.read,
}
LITTLE = 0.5
"""An explained variance below this says that something about the settings is likely wrong."""


def run(config: ImportConfig, run: Run) -> dict[str, Any]:
    """Runs the stage; gives where the checkpoint lies and how much of the activations it explains."""
    wants_gpu = config.device != "cpu" and torch.cuda.is_available()
    if config.device == "cuda" and not wants_gpu:
        raise UserError("device is cuda, but torch finds no GPU here; use device=auto or cpu, or ask for one with resources.gpus=1")
    device = torch.device("cuda" if wants_gpu else "cpu")
    source = open_source(config.activations, run, device)
    imported = READERS[config.layout](config.path, len(source.layers))
    folded, weights = imported.folded, records.hash_file(imported.file, run.check_stop)
    run.bind_input("weights", weights)
    d_model = folded.W_enc_LDF.shape[1]
    if d_model != source.d_model:
        raise UserError(
            f"{imported.file} reads activations of width {d_model}, but those named have width {source.d_model}; name its model"
        )
    if config.activation_scale:
        if len(config.activation_scale) != len(source.layers):
            raise UserError(
                f"activation_scale has {len(config.activation_scale)} factors for {len(source.layers)} layers; give one a layer"
            )
        folded = scaled(folded, torch.tensor(config.activation_scale))
    crosscoder_config, crosscoder = crosscoder_of(folded, source.layers)
    normalizer = Normalizer(source.statistics.mean_LD, torch.ones(len(source.layers)), center=False)
    facts: dict[str, Any] = {"layers": source.layers, "step": 0, "tokens": 0, "activations_id": source.data_id}
    facts |= {"dead_window_tokens": 1, "batch_positions": config.positions, **source.provenance._replace(tokens_id="").facts()}
    since_F = torch.zeros(crosscoder_config.num_features, dtype=torch.int64)
    part = crosscoder_part(crosscoder, normalizer, since_F, crosscoder_config, facts)
    checkpoint = checkpoint_files.write(run.directory / "checkpoints", 0, {"crosscoder": part})
    result = _tried(checkpoint, source, config.positions, device)
    explained, l0 = result["explained_variance"], result["l0"]
    of = f"of the variance of {result['positions']:,} positions"
    run.say(f"{crosscoder_config.num_features:,} features, L0 {l0:.2f}; it explains {explained:.4f} {of}")
    if explained < LITTLE:
        run.say(
            "beware, that is little: were its layers named in another order, is it of another place of the model, or does it expect "
            "activations that were scaled (activation_scale)?"
        )
    return {
        "checkpoint": str(checkpoint),
        "num_features": crosscoder_config.num_features,
        **result,
        "activations_id": source.data_id,
        "weights": weights,
    }


@torch.no_grad()
def _tried(checkpoint: Path, source: ActivationSource, positions: int, device: torch.device) -> dict[str, Any]:
    """Explained variance, pooled over layers in units of each layer's own spread, and L0, on the source's first positions."""
    trained = load_crosscoder(checkpoint, device)
    raw_NLD = next(iter(source.batches(batch_positions=positions, epoch=0, cursor=0))).acts_BLD.to(device).float()
    features_NF = trained.encode(raw_NLD)
    error_NLD = raw_NLD.double() - trained.decode(features_NF, raw_NLD).double()
    spread_L = (raw_NLD.double() - raw_NLD.double().mean(0)).square().sum((0, 2))
    unexplained = (error_NLD.square().sum((0, 2)) / spread_L).mean().item()
    return {"explained_variance": 1.0 - unexplained, "l0": (features_NF > 0).sum(1).double().mean().item(), "positions": len(raw_NLD)}
