"""Run by an interpreter that has dictionary_learning: reads an export as its card says, and writes what the library computes.

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


READERS = {"dictionary_learning": by_dictionary_learning}


if __name__ == "__main__":
    layout, directory, activations, output = sys.argv[1:]
    with torch.no_grad():
        features_NF, x_NLD = READERS[layout](directory, load_file(activations)["acts"])
    save_file({"features": features_NF.contiguous(), "x": x_NLD.contiguous()}, output)
