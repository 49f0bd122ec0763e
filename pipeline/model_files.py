"""The files that decide what a language model computes: found as transformers picks them, and hashed without torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config.errors import UserError

# Say where and by what a model was saved, not what it computes; `dtype` is the format of the file, whose bytes are hashed anyway.
_CONFIG_KEYS_WITHOUT_MEANING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}


def hash_of_files(directory: Path) -> str:
    """sha256 over the hashes of the weight files and the config: the same wherever they lie and in whatever dtype they are run."""
    hashes = [records.hash_file(path) for path in weight_files(directory)]
    return with_config(" ".join(hashes), records.read_json(directory / "config.json"))


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers reads the weights from, in the order in which it looks for them."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (directory / single).exists():
            return [directory / single]
        if (directory / f"{single}.index.json").exists():
            index = records.read_json(directory / f"{single}.index.json")
            return [directory / name for name in sorted(set(index["weight_map"].values()))]
    raise UserError(f"{directory} holds neither model.safetensors nor pytorch_model.bin: it is not a saved model")


def with_config(weights_hash: str, config: dict[str, Any]) -> str:
    """The hash of a model: that of its weights and of what its config.json says of what it computes."""
    meaning = {key: value for key, value in config.items() if key not in _CONFIG_KEYS_WITHOUT_MEANING}
    return hashlib.sha256(f"{weights_hash}\n{json.dumps(meaning, sort_keys=True, default=str)}".encode()).hexdigest()
