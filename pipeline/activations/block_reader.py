"""Pools of an epoch's order from shards on disk: blocks are read side by side, batches gathered from them by the pool's permutation.

While batches are gathered from one pool, the next is read. So two pools are in memory, which is used again and again: memory
that a process touches for the first time costs more than the copy into it.

Shapes: P positions in a pool.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.activations.epoch_order import Block, EpochOrder, Pool, Strip, batch_sizes, num_before
from pipeline.activations.shard_file import ShardFile
from pipeline.activations.source import ActivationBatch

# One read at a time would wait for the copy to memory, and on a network for each answer.
NUM_READERS = 4


class BlockReader:
    """Reads the rows of an epoch, once; a context manager, which ends its threads.

    open_shard : opens the shard of a generation.
    empty : memory for a batch of so many rows, on the CPU.
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
        self._free: list[ActivationBatch] = []
        """Memory of pools that are used up."""
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
        """The rest of the epoch from `cursor` on, each batch in memory of its own."""
        pools = self._pools(self._order.strips_from(cursor), cursor)
        pool, place = _InMemory(self._empty(0), torch.empty(0, dtype=torch.int64)), 0
        for size in batch_sizes(self._order.num_positions - cursor, batch_positions):
            batch, num_rows, missing = self._empty(size), 0, size
            while missing:
                if place == len(pool.rows_P):
                    pool, place = next(pools), 0
                count = min(missing, len(pool.rows_P) - place)
                num_rows += pool.gather(place, place + count, _from(batch, num_rows))
                place, missing = place + count, missing - count
            yield _up_to(batch, num_rows)

    def _pools(self, strips: list[Strip], cursor: int) -> Iterator["_InMemory"]:
        """Each pool in its order, without what comes before `cursor`; its memory is used again when the next is asked for."""
        reading: Future[_InMemory] | None = None
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
                    self._free.append(reading.result().memory)
                reading = coming
            checks = next_checks
        if reading is not None:
            yield reading.result()

    def _read(self, pool: Pool, checks: list[Future[None]], cursor: int) -> "_InMemory":
        for check in checks:
            check.result()
        self._keep_open({block.generation for block in pool.blocks})
        memory = self._memory_for(pool.num_positions)
        places = torch.split(pool.places(torch.device("cpu")), [block.num_positions for block in pool.blocks])
        # Positions that the harvest left out have a place, but no row.
        rows_P = torch.full((pool.num_positions,), -1, dtype=torch.int64)
        reads, start = [], 0
        for block, places_B in zip(pool.blocks, places, strict=True):
            kept = torch.from_numpy(self._opened[block.generation].kept_between(block.start, block.stop))
            rows_P[places_B[kept]] = torch.arange(start, start + len(kept))
            reads.append(self._readers.submit(self._read_block, block, _from(memory, start)))
            start += block.num_positions
        for read in reads:
            read.result()
        return _InMemory(memory, rows_P[num_before(pool, cursor) :])

    def _read_block(self, block: Block, into: ActivationBatch) -> None:
        """Reads the rows of a block, the first to the first row of `into`."""
        shard = self._opened[block.generation]
        first, last = shard.rows_between(block.start, block.stop)
        shard.read(first, last, _up_to(into, last - first))

    def _memory_for(self, num_positions: int) -> ActivationBatch:
        memory = self._free.pop() if self._free else None
        if memory is not None and len(memory.tokens_B) >= num_positions:
            return memory
        return ActivationBatch(*(torch.empty((num_positions, *column.shape[1:]), dtype=column.dtype) for column in self._empty(0)))

    def _keep_open(self, generations: set[int]) -> None:
        """Closes the shards of other generations, and opens those that are not."""
        for generation in set(self._opened) - generations:
            self._opened.pop(generation).close()
        for generation in generations - set(self._opened):
            self._opened[generation] = self._open_shard(generation)


class _InMemory(NamedTuple):
    """What is left of a pool, in memory."""

    memory: ActivationBatch
    rows_P: Tensor
    """int64: the row of each position, in the pool's order; -1 where there is none."""

    def gather(self, start: int, stop: int, into: ActivationBatch) -> int:
        """Copies the rows of the positions `start` to `stop` to the beginning of `into`; gives their number."""
        rows_B = self.rows_P[start:stop]
        rows_B = rows_B[rows_B >= 0]
        for column, target in zip(self.memory, _up_to(into, len(rows_B)), strict=True):
            torch.index_select(column, 0, rows_B, out=target)
        return len(rows_B)


def _from(batch: ActivationBatch, start: int) -> ActivationBatch:
    return ActivationBatch(*(column[start:] for column in batch))


def _up_to(batch: ActivationBatch, stop: int) -> ActivationBatch:
    return ActivationBatch(*(column[:stop] for column in batch))
