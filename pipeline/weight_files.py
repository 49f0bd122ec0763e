"""The files that hold a checkpoint's weights, as far as their index and their headers describe them: without torch, in milliseconds.

    config.json
    model.safetensors.index.json       {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors", ...}}
    model-00001-of-00002.safetensors   8 bytes: the header's length; the header, JSON: {"lm_head.weight": {"dtype": "BF16", ...}, ...}; data

A checkpoint in one file has no index. transformers loads whatever the files that the index names hold, in no order that it promises.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config.errors import UserError

NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where transformers looks for weights, in this order; an index names several files."""
LFS_POINTER_BYTES = 1024
"""A pointer is smaller."""
INTEGERS = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
}
"""Of the dtypes in a header those that hold no fractions."""
_SHARD = re.compile(r"(?P<stem>.+)-\d+-of-(?P<count>\d+)(?P<ending>\.\w+)")
_SHOWN = 3


def files_in(directory: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files that transformers reads the weights from; `config` is what config.json says. Raises `UserError` where one lacks."""
    explicit = config.get("transformers_weights")
    found = next((directory / name for name in ([explicit] if explicit else NAMES) if (directory / name).exists()), None)
    if found is None:
        raise UserError(f"{directory} holds neither model.safetensors nor pytorch_model.bin: it is not a saved model")
    if not found.name.endswith(".index.json"):
        return [found]
    try:
        names = sorted(set(records.read_json(found)["weight_map"].values()))
        parts = [directory / name for name in names]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{found} has no `weight_map` that names files: it is damaged; copy it again") from None
    if not names:
        raise UserError(f"{found} has an empty `weight_map`, which names no file: it is damaged; copy it again")
    if lacking := [part.name for part in parts if not part.exists()]:
        raise UserError(f"{directory} lacks {', '.join(lacking)}, which {found.name} names: the model is not whole; copy it again")
    if left_out := _left_out(directory, names):
        raise UserError(f"{found} leaves out {few(left_out)}, a part of the same model by its name: it is damaged; copy it again")
    return parts


def _left_out(directory: Path, names: Sequence[str]) -> list[str]:
    """Files in `directory` that are called parts of the same whole as those that are named: `model-00002-of-00002.safetensors`."""
    wholes = {found.groups() for name in names if (found := _SHARD.fullmatch(name))}
    beside = sorted(path.name for path in directory.iterdir())
    return [name for name in beside if name not in names and (found := _SHARD.fullmatch(name)) and found.groups() in wholes]


def fault(path: Path) -> str | None:
    """Why the file of weights at `path` can't be read, as far as its beginning and its size tell; None if nothing speaks against it."""
    size = path.stat().st_size
    if size == 0:
        return "is empty; copy it again"
    with open(path, "rb") as file:
        head = file.read(8)
        if head == b"version " and size < LFS_POINTER_BYTES:
            return "is a pointer of Git LFS, not the weights; run `git lfs pull` where it was cloned"
    if path.suffix != ".safetensors":
        return None
    try:
        header, start = _header(path)
        stated = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "does not begin as a safetensors file does; copy it again"
    if not header:
        return "holds no weights; save the model with save_pretrained, or name another directory"
    return None if size == stated else f"holds {size:,} bytes, its header says {stated:,}; copy it again"


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of each of its weights, and where their bytes begin."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), size)))
        return {name: entry for name, entry in header.items() if name != "__metadata__"}, file.tell()


def dtypes(path: Path) -> dict[str, str]:
    """The dtype of each weight in a safetensors file, as its header writes it (`BF16`)."""
    return {name: str(entry["dtype"]) for name, entry in _header(path)[0].items()}


def names_twice(held: Mapping[Path, Iterable[str]]) -> str | None:
    """A phrase if two of the files hold a weight of the same name; None if none do.

    held : the names of each file's weights.
    """
    for (one, first), (other, second) in itertools.combinations(held.items(), 2):
        if twice := sorted(set(first) & set(second)):
            return (
                f"{one} and {other.name} both hold {few(twice)}, and which of them counts nobody says; delete the file that is too many, "
                "or copy the model again"
            )
    return None


def integers_fault(held: Mapping[str, str], config: Mapping[str, Any]) -> str | None:
    """A phrase for weights that are integers where the model has float ones: quantized, with nothing that says how; None if none are.

    held : the dtype of each weight that counts, by its name.
    """
    integers = [f"{name}: {dtype}" for name, dtype in held.items()]
    if not integers or "quantization_config" in config:
        return None
    return (
        f"weights of the model are integers ({few(integers)}), as quantized ones are, but config.json has no quantization_config, so that "
        "they would be taken for the weights themselves; take the model as it was before, or mend its config.json"
    )


def faults(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """A phrase for each thing that speaks against the weights in `directory`; the first kind of fault that is found there."""
    try:
        parts = files_in(directory, config)
    except UserError as error:
        return [str(error)]
    if unreadable := [f"{path} {reason}" for path in parts if (reason := fault(path))]:
        return unreadable
    held = {path: dtypes(path) for path in parts if path.suffix == ".safetensors"}
    # Only what is called a weight: which of the others are parameters, and which masks and counters, the model itself says.
    integers = {
        name: INTEGERS[dtype] for file in held.values() for name, dtype in file.items() if dtype in INTEGERS and name.endswith(".weight")
    }
    found = integers_fault(integers, config)
    return [phrase for phrase in (names_twice(held), f"in {directory} {found}" if found else None) if phrase]


def few(names: Iterable[str]) -> str:
    """The first names, and whether there are more."""
    shown = list(names)
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
