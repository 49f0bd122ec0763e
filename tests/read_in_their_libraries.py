"""Run by an interpreter that has sae-lens and dictionary_learning: reads an export as its card says, and writes what the library computes.

python read_in_their_libraries.py LAYOUT DIRECTORY ACTIVATIONS.safetensors OUTPUT.safetensors
"""

import importlib
import json
import sys

import torch
from safetensors.torch import load_file, save_file


def by_dictionary_learning(directory: str, acts_NLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    library = importlib.import_module("dictionary_learning")
    with open(f"{directory}/config.json") as file:
        name = "BatchTopKCrossCoder" if "k" in json.load(file) else "CrossCoder"
    crosscoder = getattr(library, name).from_pretrained(directory, from_hub=True)
    features_NF = crosscoder.encode(acts_NLD)
    x_NLD = crosscoder.decode(features_NF)
    assert torch.equal(x_NLD, crosscoder(acts_NLD))
    scale_F = load_file(f"{directory}/model.safetensors").get("feature_scale", torch.ones(features_NF.shape[1]))
    return features_NF / scale_F, x_NLD


def by_sae_lens(directory: str, acts_NLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sae = importlib.import_module("sae_lens").SAE.load_from_disk(f"{directory}/crosscoder")
    features_NF = sae.encode(acts_NLD.flatten(-2))
    return features_NF, sae(acts_NLD.flatten(-2)).unflatten(-1, acts_NLD.shape[1:])


READERS = {"sae_lens": by_sae_lens, "dictionary_learning": by_dictionary_learning}


if __name__ == "__main__":
    layout, directory, activations, output = sys.argv[1:]
    with torch.no_grad():
        features_NF, x_NLD = READERS[layout](directory, load_file(activations)["acts"])
    save_file({"features": features_NF.contiguous(), "x": x_NLD.contiguous()}, output)
