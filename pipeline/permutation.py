"""A seeded permutation of 0 ... n-1 that is computed where it is needed and stored nowhere.

A Feistel network on pairs: n positions are laid out in a rectangle of `rows` x `columns` cells, a little more than n, and each
round adds a keyed hash of one coordinate to the other, which can be undone whatever the hash. A result that falls outside
0 ... n-1 is put through again until it falls inside (cycle walking), which keeps the whole a permutation (Black and Rogaway
2002, "Ciphers with arbitrary finite domains"). It is integer arithmetic only, so CPU and GPU agree.
"""

import math

import torch
from torch import Tensor

NUM_ROUNDS = 8
# On a CPU: so few stay in its cache, and are less than PyTorch would share among threads, which wait for each other at every operation.
_AT_A_TIME = 16_384
_LOW_63_BITS = (1 << 63) - 1


class Permutation:
    """A permutation of 0 ... n-1 drawn by `seed`; `stream` tells apart permutations that share a seed."""

    def __init__(self, n: int, *, seed: int, stream: int = 0) -> None:
        if n < 0:
            raise ValueError(f"a permutation of {n} numbers")
        self.n = n
        self._rows = max(1, math.isqrt(max(n, 1) - 1) + 1)
        self._columns = max(1, -(-n // self._rows))
        key = _scramble(_scramble(torch.tensor(seed & _LOW_63_BITS)) ^ torch.tensor(stream & _LOW_63_BITS))
        self._keys: list[int] = _scramble(key + torch.arange(1, NUM_ROUNDS + 1)).tolist()

    def __call__(self, indices: Tensor) -> Tensor:
        """Where the permutation puts each of `indices` (int64, each in 0 ... n-1), on their device."""
        if indices.device.type == "cpu" and indices.numel() > _AT_A_TIME:
            return torch.cat([self(some) for some in torch.split(indices, _AT_A_TIME)])
        out = self._rounds(indices)
        while bool((outside := out >= self.n).any()):
            out = torch.where(outside, self._rounds(out), out)
        return out

    def all(self, device: torch.device | str = "cpu") -> Tensor:
        """The images of 0 ... n-1, in order."""
        return self(torch.arange(self.n, device=device))

    def _rounds(self, indices: Tensor) -> Tensor:
        row = torch.div(indices, self._columns, rounding_mode="floor")
        column = indices - row * self._columns
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                row = (row + keyed_hash(column, key) % self._rows) % self._rows
            else:
                column = (column + keyed_hash(row, key) % self._columns) % self._columns
        return row * self._columns + column


def keyed_hash(values: Tensor, key: int) -> Tensor:
    """A keyed hash of each value, 0 or more."""
    return _scramble(values + key) & _LOW_63_BITS


def _scramble(values: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014); int64 arithmetic wraps, so the bits are those of uint64."""
    values = (values ^ _shift_right(values, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    values = (values ^ _shift_right(values, 27)) * (0x94D049BB133111EB - (1 << 64))
    return values ^ _shift_right(values, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    return (values >> bits) & ((1 << (64 - bits)) - 1)
