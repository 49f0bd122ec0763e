"""Run by an interpreter that has sae-lens and dictionary_learning: reads an export as its card says, and writes what the library computes;
or makes one of the library's own, saves it as the library does, and writes what it computes.

python read_in_their_libraries.py LAYOUT|made:KIND DIRECTORY ACTIVATIONS.safetensors OUTPUT.safetensors
"""

import functools
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


def randomized(module: torch.nn.Module, *, threshold: float) -> None:
    """Every weight drawn, of a size at which some features fire and some don't."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    for name, tensor in module.state_dict().items():
        if name == "threshold":
            tensor.fill_(threshold)


def their_crosscoder(kind: str, directory: str, acts_NLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    library = importlib.import_module("dictionary_learning")
    normalizes = {"activation_mean": acts_NLD.mean(0), "activation_std": acts_NLD.std(0)} if "normalizing" in kind else {}
    name = "BatchTopKCrossCoder" if "batch_topk" in kind else "CrossCoder"
    further = {"k": 5} if "batch_topk" in kind else {}
    crosscoder = getattr(library, name)(acts_NLD.shape[2], 40, acts_NLD.shape[1], **further, **normalizes)
    randomized(crosscoder, threshold=0.02 if normalizes else 0.5)
    crosscoder.save_pretrained(directory)
    torch.save(crosscoder.state_dict(), f"{directory}/weights.pt")
    features_NF = crosscoder.encode(acts_NLD)
    return features_NF, crosscoder.decode(features_NF)


def their_autoencoder(kind: str, directory: str, acts_NLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    library = importlib.import_module("sae_lens")
    name = {"standard": "StandardSAE", "jumprelu": "JumpReLUSAE"}[kind]
    acts_NC = acts_NLD.flatten(1)
    sae = getattr(library, name)(getattr(library, f"{name}Config")(d_in=acts_NC.shape[1], d_sae=40))
    randomized(sae, threshold=0.5)
    sae.save_model(directory)
    return sae.encode(acts_NC), sae(acts_NC).view_as(acts_NLD)


READERS = {"sae_lens": by_sae_lens, "dictionary_learning": by_dictionary_learning}
READERS |= {
    f"made:{kind}": functools.partial(their_crosscoder, kind)
    for kind in ("relu", "batch_topk", "normalizing relu", "normalizing batch_topk")
}
READERS |= {f"made:{kind}": functools.partial(their_autoencoder, kind) for kind in ("standard", "jumprelu")}


if __name__ == "__main__":
    layout, directory, activations, output = sys.argv[1:]
    with torch.no_grad():
        features_NF, x_NLD = READERS[layout](directory, load_file(activations)["acts"])
    save_file({"features": features_NF.contiguous(), "x": x_NLD.contiguous()}, output)
