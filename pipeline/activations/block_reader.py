"""Pools of an epoch's order from shards on disk: blocks are read side by side, each row put where the pool's permutation has it.

While batches are cut from one pool, the next is read: two pools are in memory, and a third as long as batches of it are kept.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.activations.epoch_order import Block, EpochOrder, Pool, Strip, batch_sizes, num_before
from pipeline.activations.order import Numbers
from pipeline.activations.shard_file import ShardFile
from pipeline.activations.source import ActivationBatch

# One read at a time would wait for the copy to memory, and on a network for each answer.
NUM_READERS = 4


class BlockReader:
    """Reads the rows of an epoch; a context manager, which ends its threads. Shapes: P positions in a pool.

    open_shard : opens the shard of a generation.
    empty : memory for so many rows, on the CPU.
    check : raises `UserError` if the shard of a generation is damaged. Called from threads, before its first row is read.
    """

    def __init__(
        self,
        order: EpochOrder,
        *,
        open_shard: Callable[[int], ShardFile],
        empty: Callable[[int], ActivationBatch],
        check: Callable[[int], None],
    ) -> None:
        self._order = order
        self._open_shard = open_shard
        self._empty = empty
        self._check = check
        self._opened: dict[int, ShardFile] = {}
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="check-hashes")
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="read-blocks")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def __enter__(self) -> "BlockReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        threads = (self._checker, self._readers, self._ahead)
        for executor in threads:
            executor.shutdown(wait=False, cancel_futures=True)
        for executor in threads:
            executor.shutdown()
        self._keep_open(set())

    def batches(self, batch_positions: int, cursor: int) -> Iterator[ActivationBatch]:
        """The rest of the epoch from `cursor` on. A batch is a part of a pool's memory, or memory of its own where it crosses pools."""
        pools = self._pools(self._order.strips_from(cursor), cursor)
        pool, place = _EMPTY, 0
        for size in batch_sizes(self._order.num_positions - cursor, batch_positions):
            parts, missing = [], size
            while missing:
                if place == pool.num_positions:
                    pool, place = _EMPTY, 0  # before the next is waited for, so that its memory is free
                    pool = next(pools)
                count = min(missing, pool.num_positions - place)
                parts.append(pool.rows_between(place, place + count))
                place, missing = place + count, missing - count
            yield parts[0] if len(parts) == 1 else self._joined(parts)

    def _joined(self, parts: list[ActivationBatch]) -> ActivationBatch:
        joined = self._empty(sum(len(part.tokens_B) for part in parts))
        for column, values in zip(joined, zip(*parts, strict=True), strict=True):
            torch.cat(values, out=column)
        return joined

    def _pools(self, strips: list[Strip], cursor: int) -> Iterator["_PoolRows"]:
        """The rows of each pool, in their order, without those before `cursor`."""
        reading: Future[_PoolRows] | None = None
        checks: list[Future[None]] = []
        for number, strip in enumerate(strips):
            if number == 0:
                checks = [self._readers.submit(self._check, generation) for generation in strip.generations]
            # The next strip's shards are checked while this one is read.
            following = strips[number + 1].generations if number + 1 < len(strips) else []
            next_checks = [self._checker.submit(self._check, generation) for generation in following]
            for pool in self._order.pools(strip):
                if pool.last <= cursor:
                    continue
                coming = self._ahead.submit(self._read, pool, checks, cursor)
                if reading is not None:
                    yield reading.result()
                reading = coming
            checks = next_checks
        if reading is not None:
            yield reading.result()

    def _read(self, pool: Pool, checks: list[Future[None]], cursor: int) -> "_PoolRows":
        for check in checks:
            check.result()
        self._keep_open({block.generation for block in pool.blocks})
        places = torch.split(pool.places(torch.device("cpu")), [block.num_positions for block in pool.blocks])
        # Positions that the harvest left out have a place, but no row.
        kept = [
            places_B.numpy()[self._opened[block.generation].kept_between(block.start, block.stop)]
            for block, places_B in zip(pool.blocks, places, strict=True)
        ]
        has_row = np.zeros(pool.num_positions, np.int64)
        has_row[np.concatenate(kept)] = 1
        num_before_P = np.concatenate(([0], np.cumsum(has_row)))
        rows = self._empty(int(num_before_P[-1]))
        reads = [self._readers.submit(self._read_block, block, num_before_P[at], rows) for block, at in zip(pool.blocks, kept, strict=True)]
        for read in reads:
            read.result()
        return _PoolRows(rows, num_before_P).without_first(num_before(pool, cursor))

    def _read_block(self, block: Block, rows_B: Numbers, into: ActivationBatch) -> None:
        """Reads the rows of a block and puts them where `rows_B` says."""
        shard = self._opened[block.generation]
        first, last = shard.rows_between(block.start, block.stop)
        rows = ActivationBatch(*(torch.empty((last - first, *column.shape[1:]), dtype=column.dtype) for column in into))
        shard.read(first, last, rows)
        for column, values in zip(into, rows, strict=True):
            _rows_as_bytes(column)[rows_B] = _rows_as_bytes(values)

    def _keep_open(self, generations: set[int]) -> None:
        """Closes the shards of other generations, and opens those that are not."""
        for generation in set(self._opened) - generations:
            self._opened.pop(generation).close()
        for generation in generations - set(self._opened):
            self._opened[generation] = self._open_shard(generation)


class _PoolRows(NamedTuple):
    """What is left of a pool, in memory."""

    rows: ActivationBatch
    num_before_P: Numbers
    """Rows before each of its positions, and before its end."""

    @property
    def num_positions(self) -> int:
        return len(self.num_before_P) - 1

    def rows_between(self, start: int, stop: int) -> ActivationBatch:
        """The rows of its positions `start` to `stop`, in the same memory."""
        first, last = self.num_before_P[[start, stop]].tolist()
        return ActivationBatch(*(column[first:last] for column in self.rows))

    def without_first(self, num_positions: int) -> "_PoolRows":
        return self._replace(num_before_P=self.num_before_P[num_positions:])


def _rows_as_bytes(column: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.void]]:
    """A contiguous CPU tensor as an array of rows. NumPy copies such rows whole, without holding up other threads.

    PyTorch's `index_copy_` took twice as long for rows of 3 KB.
    """
    rows = column.flatten(1) if column.dim() > 1 else column[:, None]
    data: np.ndarray[tuple[int, ...], np.dtype[np.void]] = rows.view(torch.uint8).numpy().view(f"V{rows.shape[1] * rows.itemsize}")[:, 0]
    return data


_EMPTY = _PoolRows(ActivationBatch(*(torch.empty(0) for _ in range(4))), np.zeros(1, np.int64))
