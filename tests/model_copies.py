"""Copies of made-up models without weights that anything could load: directories, and a hub's cache; for tests without torch."""

import json
from pathlib import Path


def copy_of_model(directory: Path, weights: bytes = b"weights", **config: object) -> Path:
    """Writes a config.json and a model.safetensors, and gives the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, **config}))
    (directory / "model.safetensors").write_bytes(weights)
    return directory


def put_on_hub(cache: Path, name: str, commit: str, branch: str = "main", **files: bytes) -> Path:
    """Puts a model into the hub's cache as the commit that `branch` now is; gives the snapshot's directory."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    return copy_of_model(repository / "snapshots" / commit, **files)
