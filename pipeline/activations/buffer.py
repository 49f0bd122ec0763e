"""A buffer on the device that is refilled, row by row, with the next generation while the current one is consumed.

Shapes: N rows that fit, L layers read, D model width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.activations.harvest import Harvester
from pipeline.activations.source import ActivationBatch
from pipeline.config.errors import UserError


class RollingBuffer:
    """Gives the rows of `generations`, one generation after the other, each in its own shuffled order.

    Only the first generation is waited for. A row that was taken frees its slot, and as soon as there are free slots for a
    model batch of the next generation, one is computed into them; so memory holds one generation, never two.
    """

    def __init__(self, harvester: Harvester, generations: Sequence[int]) -> None:
        self._harvester = harvester
        self._queue = list(generations)
        self._device = harvester.model.device
        capacity = max((int(harvester.order.rows[generation]) for generation in generations), default=0)
        self._store = _allocate(capacity, harvester)
        self._slots = torch.empty(0, dtype=torch.int64, device=self._device)
        """Where the current generation's rows lie, in the order of their consumption."""
        self._spare = torch.arange(capacity, device=self._device)
        """Slots that the current generation does not use."""
        self._taken = 0
        self._next = self._begin_next()

    @property
    def num_left(self) -> int:
        """Rows of the current generation that were not taken yet."""
        return len(self._slots) - self._taken

    def fill(self) -> Iterator[int]:
        """Makes the next generation the current one, which must be used up; yields the rows computed so far after each step."""
        if self.num_left:
            raise RuntimeError(f"{self.num_left} rows of the current generation are left")
        coming = self._next
        if coming is None:
            raise RuntimeError("there is no further generation")
        while coming.step(self._store, free=len(coming.free_slots)):
            yield coming.num_filled
        coming.finish()
        num_rows = coming.num_filled
        self._slots = torch.empty_like(coming.free_slots[:num_rows])
        self._slots[coming.places] = coming.free_slots[:num_rows]
        self._spare = coming.free_slots[num_rows:]
        self._taken = 0
        self._next = self._begin_next()

    def skip(self, num_rows: int) -> None:
        """Counts the next rows of the current generation as taken."""
        self._taken += num_rows

    def take(self, num_rows: int) -> ActivationBatch:
        """The next rows of the current generation, as copies; computes some of the next generation into the slots freed."""
        if num_rows > self.num_left:
            raise RuntimeError(f"{num_rows} rows asked for, {self.num_left} left")
        slots = self._slots[self._taken : self._taken + num_rows]
        taken = ActivationBatch(*(column.index_select(0, slots) for column in self._store))
        self._taken += num_rows
        if self._next is not None:
            while self._next.step(self._store, free=len(self._spare) + self._taken):
                pass
        return taken

    def _begin_next(self) -> "_Filling | None":
        if not self._queue:
            return None
        # Rows are taken in the order of `_slots`, so that is the order in which slots become free.
        return _Filling(self._harvester, self._queue.pop(0), torch.cat([self._spare, self._slots]))


class _Filling:
    """A generation on its way into the buffer: its k-th row as harvested goes to the k-th slot that becomes free."""

    def __init__(self, harvester: Harvester, generation: int, free_slots: Tensor) -> None:
        self.free_slots = free_slots
        self.num_filled = 0
        self.places = harvester.order.places(generation, free_slots.device)
        self._step_rows = [batch.num_rows for batch in harvester.order.model_batches(generation)]
        self._rows = harvester.rows(generation)
        self._steps_done = 0

    def step(self, store: ActivationBatch, *, free: int) -> bool:
        """Computes one more model batch if it fits into the first `free` slots; whether it did."""
        if self._steps_done == len(self._step_rows) or self.num_filled + self._step_rows[self._steps_done] > free:
            return False
        rows = next(self._rows)
        slots = self.free_slots[self.num_filled : self.num_filled + len(rows.tokens_B)]
        for column, values in zip(store, rows, strict=True):
            column.index_copy_(0, slots, values)
        self.num_filled += len(slots)
        self._steps_done += 1
        return True

    def finish(self) -> None:
        """Ends the harvest, with what it still has to check."""
        for _ in self._rows:
            raise RuntimeError("the harvest gave more rows than its order has")


def _allocate(num_rows: int, harvester: Harvester) -> ActivationBatch:
    device = harvester.model.device
    num_layers, d_model = harvester.row_shape
    gigabytes = num_rows * (num_layers * d_model * harvester.model.dtype.itemsize + 24) / 1e9
    try:
        acts_NLD = torch.empty((num_rows, num_layers, d_model), dtype=harvester.model.dtype, device=device)
        numbers = [torch.empty(num_rows, dtype=torch.int64, device=device) for _ in range(3)]
    except RuntimeError as error:  # on a CPU there is no class of its own for it
        if "memory" not in str(error):
            raise
        raise UserError(
            f"a generation of {num_rows:,} positions takes {gigabytes:.1f} GB, more than is free on {device}; "
            f"set contexts_per_generation below {harvester.settings.contexts_per_generation:,}"
        ) from error
    return ActivationBatch(acts_NLD, *numbers)
