"""Tensors to a safetensors file and back, in the precision that other libraries expect."""

from collections.abc import Sequence
from pathlib import Path

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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a file of torch with a dictionary of tensors, on the CPU in float32 if they are numbers.

    No code in the file runs. Raises `UserError` for a file that is damaged, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            found = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # the readers' own errors, and those of pickle, zip and Unicode that torch lets through
        raise UserError(
            f"{path} is damaged or holds more than tensors, which is not read: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{path} holds no plain dictionary of tensors, expected the weights of a crosscoder alone")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def weights_in(path: Path, names: Sequence[str]) -> Path:
    """The file of weights at `path`: itself, or the first of `names` in that directory, or the only `.pt` there.

    Raises `UserError` where there is none.
    """
    if path.is_file():
        return path
    found = [path / name for name in names if (path / name).is_file()] or sorted(path.glob("*.pt"))
    if len(found) == 1 or (found and found[0].name in names):
        return found[0]
    state = f"holds {len(found)} files of weights; name one of them" if found else f"holds none of {', '.join(names)}"
    raise UserError(f"{path} {state if path.is_dir() else 'does not exist'}; path is the directory of the files, or the file of weights")


def take(tensors: dict[str, Tensor], path: Path, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """Takes the tensor `name` out of `tensors`. Raises `UserError` where it is missing or not of `shape`; None in it is any size."""
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise UserError(f"{path} has no {name}, but {', '.join(sorted(tensors)) or 'nothing'}; is it of another layout?")
    if not tensor.is_floating_point():
        raise UserError(f"{path}: {name} is {str(tensor.dtype).removeprefix('torch.')}, expected floating-point numbers")
    if len(tensor.shape) != len(shape) or any(size not in (None, found) for size, found in zip(shape, tensor.shape, strict=True)):
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise UserError(f"{path}: {name} is {' x '.join(map(str, tensor.shape)) or 'a scalar'}, expected {wanted or 'a scalar'}")
    # An infinite threshold is of a feature that never fires.
    if bool(tensor.isnan().any() if name == "threshold" else ~torch.isfinite(tensor).all()):
        raise UserError(f"{path}: {name} holds numbers that are not finite; the file is damaged, or its training was")
    return tensor


def check_all_taken(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises `UserError` if a tensor is left, which would change what the crosscoder computes."""
    if tensors:
        raise UserError(f"{path} holds {', '.join(sorted(tensors))} besides, which this layout does not have: it would be left out")
