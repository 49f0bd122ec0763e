"""Tensors to a safetensors file and back, in the precision that other libraries expect."""

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline import records
from pipeline.config.errors import UserError


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes `tensors` to `path`, float64 ones as float32. Raises `UserError` for a number that is not finite then."""
    written = {name: _single(tensor).contiguous() for name, tensor in tensors.items()}
    for name, tensor in written.items():
        if not bool(torch.isfinite(tensor).all()) and name != "threshold":
            raise UserError(f"{name} of this crosscoder has numbers that float32 can't hold; was its training sound?")
    with records.atomic_file(path) as file:
        file.write(safetensors.torch.save(written, metadata={"format": "pt"}))


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor
