"""Which position an epoch takes when: those of several generations side by side, in an order of its own for each epoch.

An epoch puts the generations in an order and cuts it into *strips* of `shuffle_generations`. Within a strip each generation is
cut into *blocks* of rows that lie one behind the other, and the blocks of all generations are interleaved. About
`shuffle_positions` rows of blocks in a row form a *pool*, whose rows are permuted together. Batches are cut from the pools,
one pool after the other. So a disk is read block by block, and a batch holds rows of every generation of its strip.

All orders are computed permutations, keyed by seed, epoch and place; nothing is stored. Positions without a row, which the
harvest left out for their norm or token, are counted like others. For example, two generations of four
rows, blocks of two, pools of four: the strip's blocks may be (1, 2-3) (0, 0-1) (1, 0-1) (0, 2-3); the first pool permutes
rows 2 and 3 of generation 1 with rows 0 and 1 of generation 0.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.activations.order import Numbers
from pipeline.config.activation_source import Shuffle
from pipeline.config.errors import UserError
from pipeline.permutation import Permutation

# 2,048 rows of two layers of width 768 in bfloat16 are 6 MB: long enough for a disk to be read at its full rate.
_MOST_BLOCK_ROWS = 2048
# A pool has at least so many blocks of each generation, or the share of each would vary from pool to pool.
_BLOCKS_IN_A_POOL = 4

_GENERATIONS, _BLOCKS, _ROWS = 1, 2, 3
"""What a permutation is of. Streams below 2^60 are those of the harvest's order (see `order`)."""


class Block(NamedTuple):
    """Positions `start` to `stop` of a generation, as they are stored."""

    generation: int
    start: int
    stop: int

    @property
    def num_positions(self) -> int:
        return self.stop - self.start


class Pool(NamedTuple):
    """Blocks whose positions are permuted together."""

    first: int
    """Place of its first position in the epoch."""
    blocks: list[Block]
    num_positions: int
    permutation: Permutation

    @property
    def last(self) -> int:
        """One past the place of its last position in the epoch."""
        return self.first + self.num_positions

    def places(self, device: torch.device) -> Tensor:
        """When each of its positions is taken, as its place in the pool; positions block by block. int64."""
        return self.permutation.all(device)


class Strip(NamedTuple):
    """Generations that are mixed with each other."""

    first: int
    """Place of its first position in the epoch."""
    generations: list[int]
    num_positions: int

    @property
    def last(self) -> int:
        """One past the place of its last position in the epoch."""
        return self.first + self.num_positions


class EpochOrder:
    """The order of one epoch over generations of `rows` positions each."""

    def __init__(self, rows: Numbers, shuffle: Shuffle, *, seed: int, epoch: int) -> None:
        self.num_positions = int(rows.sum())
        self._rows = rows
        self._seed = seed
        self._epoch = epoch
        self._pool_rows = shuffle.shuffle_positions
        per_generation = shuffle.shuffle_positions // (_BLOCKS_IN_A_POOL * shuffle.shuffle_generations)
        self._block_rows = max(1, min(_MOST_BLOCK_ROWS, per_generation))
        self.strips = self._cut_into_strips(shuffle.shuffle_generations)

    def strips_from(self, cursor: int) -> list[Strip]:
        """The strips that are not wholly among the first `cursor` positions. Raises `UserError` if there are not so many."""
        if not 0 <= cursor <= self.num_positions:
            raise UserError(
                f"the position in the data is {cursor:,}, but an epoch has {self.num_positions:,} positions: the state is of other "
                "activations"
            )
        return [strip for strip in self.strips if strip.last > cursor]

    def pools(self, strip: Strip) -> list[Pool]:
        """The pools of a strip, in order, of nearly the same size."""
        blocks = self._interleaved_blocks(strip)
        num_pools = -(-strip.num_positions // self._pool_rows)
        sizes = np.array([block.num_positions for block in blocks], np.int64)
        starts = np.cumsum(sizes) - sizes
        bounds = np.searchsorted(starts * num_pools // strip.num_positions, np.arange(num_pools + 1), side="left")
        pools = []
        for begin, end in itertools.pairwise(bounds.tolist()):
            if begin == end:
                continue
            first, num_positions = strip.first + int(starts[begin]), int(sizes[begin:end].sum())
            pools.append(Pool(first, blocks[begin:end], num_positions, self._permutation(num_positions, _ROWS, first)))
        return pools

    def places(self, strip: Strip, device: torch.device) -> Tensor:
        """When each of its positions is taken, as its place in the strip; positions generation by generation as they are stored. int64."""
        sizes = self._rows[strip.generations]
        first_row = dict(zip(strip.generations, (np.cumsum(sizes) - sizes).tolist(), strict=True))
        places = torch.empty(strip.num_positions, dtype=torch.int64, device=device)
        for pool in self.pools(strip):
            at = [np.arange(block.start, block.stop) + first_row[block.generation] for block in pool.blocks]
            places[torch.from_numpy(np.concatenate(at)).to(device)] = pool.places(device) + (pool.first - strip.first)
        return places

    def _cut_into_strips(self, most_generations: int) -> list[Strip]:
        num_generations = len(self._rows)
        order = np.arange(num_generations)
        if self._epoch > 0:
            order = self._permutation(num_generations, _GENERATIONS, 0).all().numpy()
        # As even as can be: a last strip of one generation would hardly be mixed.
        num_strips = -(-num_generations // most_generations)
        bounds = [number * num_generations // num_strips for number in range(num_strips + 1)]
        strips, first = [], 0
        for begin, end in itertools.pairwise(bounds):
            num_positions = int(self._rows[order[begin:end]].sum())
            strips.append(Strip(first, order[begin:end].tolist(), num_positions))
            first += num_positions
        return strips

    def _interleaved_blocks(self, strip: Strip) -> list[Block]:
        """The strip's blocks, each generation's in a shuffled order and spread evenly over the strip."""
        blocks = [
            Block(generation, start, min(start + self._block_rows, int(self._rows[generation])))
            for generation in strip.generations
            for start in range(0, int(self._rows[generation]), self._block_rows)
        ]
        shuffled = [blocks[index] for index in self._permutation(len(blocks), _BLOCKS, strip.first).all().tolist()]
        num_blocks = dict.fromkeys(strip.generations, 0)
        ranks = []
        for block in shuffled:
            ranks.append(num_blocks[block.generation])
            num_blocks[block.generation] += 1
        share = [(2 * rank + 1) / num_blocks[block.generation] for rank, block in zip(ranks, shuffled, strict=True)]
        # A stable sort: blocks with the same share stay in their shuffled order.
        return [shuffled[index] for index in np.argsort(share, kind="stable").tolist()]

    def _permutation(self, n: int, kind: int, place: int) -> Permutation:
        return Permutation(n, seed=self._seed, stream=kind << 60 | self._epoch << 40 | place)


def num_before(part: Strip | Pool, cursor: int) -> int:
    """How many of its positions are among the first `cursor` positions of the epoch."""
    return min(max(cursor - part.first, 0), part.num_positions)


def batch_sizes(num_left: int, batch_positions: int) -> Iterator[int]:
    """Positions of each batch of the rest of an epoch; the last may be short."""
    for start in range(0, num_left, batch_positions):
        yield min(batch_positions, num_left - start)
