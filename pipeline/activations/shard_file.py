"""The file of an activation shard: plain safetensors whose data start at a multiple of 4,096 bytes.

    8 bytes          length of the header, little-endian uint64
    header           JSON, padded with spaces so that the data start at 4,096 (or a multiple)
    act              [N, L, D] in the model's dtype, one position's L x D contiguous
    document         uint32[N], index in the token set
    token            uint16[N] or uint32[N], as in the token set; a separator is the end-of-text id
    position         uint16[N], place in the context
    left_out         uint32[E], only where E positions are left out for their norm or token: the places in the generation's order
                     that have no row, ascending

Three positions of two layers of width 4 in bfloat16 are 48 bytes of `act` from byte 4,096 on, then 12 of `document` from 4,144,
6 of `token` from 4,156 and 6 of `position` from 4,162; the file ends at 4,168. Any safetensors library reads it.

Shapes: N rows in the shard, B of them, E positions without one, L layers read, D model width.
"""

import json
import os
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from pipeline.activations.left_out import NO_PLACES, Places, kept_between, rows_between
from pipeline.activations.source import ActivationBatch
from pipeline.config.errors import UserError

ALIGNMENT = 4096
_SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint32: "U32",
    torch.uint16: "U16",
}


class ShardLayout(NamedTuple):
    """Where everything lies in a shard file; a pure function of these six."""

    num_rows: int
    num_layers: int
    d_model: int
    dtype: torch.dtype
    token_dtype: torch.dtype
    num_left_out: int = 0

    def columns(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor, in the order of the file."""
        columns = {
            "act": (self.dtype, (self.num_rows, self.num_layers, self.d_model)),
            "document": (torch.uint32, (self.num_rows,)),
            "token": (self.token_dtype, (self.num_rows,)),
            "position": (torch.uint16, (self.num_rows,)),
        }
        return columns | ({"left_out": (torch.uint32, (self.num_left_out,))} if self.num_left_out else {})

    def entry_bytes(self) -> dict[str, int]:
        """Bytes of one entry of each tensor's first dimension: of a row, or of a position left out."""
        return {name: dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64)) for name, (dtype, shape) in self.columns().items()}

    def header(self) -> bytes:
        """All that precedes the data."""
        entries, start = {}, 0
        sizes = self.entry_bytes()
        for name, (dtype, shape) in self.columns().items():
            stop = start + shape[0] * sizes[name]
            entries[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    def offsets(self) -> dict[str, int]:
        """The first byte of each tensor in the file."""
        out, start = {}, len(self.header())
        sizes = self.entry_bytes()
        for name, (_, shape) in self.columns().items():
            out[name] = start
            start += shape[0] * sizes[name]
        return out

    def file_bytes(self) -> int:
        """Size of the whole file."""
        sizes = self.entry_bytes()
        return len(self.header()) + sum(shape[0] * sizes[name] for name, (_, shape) in self.columns().items())


class ShardFileWriter:
    """Writes a shard from front to back, hashing as it goes; activations go straight to the file, the small columns wait."""

    def __init__(self, file: IO[bytes], layout: ShardLayout) -> None:
        self._file = file
        self._layout = layout
        self._hasher = xxhash.xxh3_128()
        self._small: list[ActivationBatch] = []
        self._write(np.frombuffer(layout.header(), np.uint8))

    def append(self, rows: ActivationBatch) -> None:
        """Adds the next rows, which are on the CPU."""
        self._write(_bytes_of(rows.acts_BLD))
        self._small.append(rows._replace(acts_BLD=rows.acts_BLD[:0]))

    def finish(self, left_out: Places = NO_PLACES) -> str:
        """Writes the small columns, and the places without a row; gives the xxh3-128 of the whole file."""
        num_rows = sum(len(rows.tokens_B) for rows in self._small)
        if num_rows != self._layout.num_rows:
            raise RuntimeError(f"{num_rows} rows were written, the header says {self._layout.num_rows}")
        if len(left_out) != self._layout.num_left_out:
            raise RuntimeError(f"{len(left_out)} positions are left out, the header says {self._layout.num_left_out}")
        columns = self._layout.columns()
        for name, field in (("document", "documents_B"), ("token", "tokens_B"), ("position", "positions_B")):
            parts = [getattr(rows, field) for rows in self._small]
            values = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
            self._write(_bytes_of(values.to(columns[name][0])))
        if len(left_out):
            self._write(left_out.astype("<u4").view(np.uint8))
        return self._hasher.hexdigest()

    def _write(self, data: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
        self._hasher.update(data.data)
        self._file.write(data.data)


class ShardFile:
    """Reads rows of a shard at random, by plain reads: a file that is cut short is an error, not a crash of the process."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path = path
        self._layout = layout
        self._offsets = layout.offsets()
        self._entry_bytes = layout.entry_bytes()
        self._descriptor = os.open(path, os.O_RDONLY)
        header = layout.header()
        if os.pread(self._descriptor, len(header), 0) != header:
            self.close()
            raise UserError(f"{path} does not have the header that its record asks for: {_damaged(path)}")

        left_out = torch.empty(layout.num_left_out, dtype=torch.uint32)
        if layout.num_left_out:
            self._read_into("left_out", 0, left_out)
        self._left_out: Places = left_out.numpy().astype(np.int64)

    def close(self) -> None:
        os.close(self._descriptor)

    def rows_between(self, start: int, stop: int) -> tuple[int, int]:
        """The rows that stand in the places `start` to `stop` of the generation's order: the first, and one past the last."""
        return rows_between(self._left_out, start, stop)

    def kept_between(self, start: int, stop: int) -> Places:
        """Of the places `start` to `stop` of the generation's order, those with a row; counted from `start`."""
        return kept_between(self._left_out, start, stop)

    def read(self, start: int, stop: int, into: ActivationBatch) -> None:
        """Reads rows `start` to `stop` into the tensors of `into`, which are on the CPU and have that many rows."""
        columns = self._layout.columns()
        self._read_into("act", start, into.acts_BLD)
        for name, target in (("document", into.documents_B), ("token", into.tokens_B), ("position", into.positions_B)):
            stored = torch.empty(stop - start, dtype=columns[name][0])
            self._read_into(name, start, stored)
            target.copy_(stored)

    def _read_into(self, name: str, start: int, tensor: Tensor) -> None:
        view = memoryview(_bytes_of(tensor).data)
        offset = self._offsets[name] + start * self._entry_bytes[name]
        while len(view):
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise UserError(f"{self.path} ends at byte {offset:,}, expected {self._layout.file_bytes():,} bytes: {_damaged(self.path)}")
            view, offset = view[count:], offset + count


def _bytes_of(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The memory of a contiguous CPU tensor."""
    data: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return data


def _damaged(path: Path) -> str:
    return f"the shard is damaged; delete {path.with_suffix('.json')} and run the cache stage again, it redoes only that shard"
