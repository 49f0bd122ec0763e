"""A buffer on the device that is refilled, row by row, with the next fills while the current ones are consumed.

Shapes: N rows that fit, L layers read, D model width.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.activations.harvest import Harvested, Harvester
from pipeline.activations.left_out import LeftOut
from pipeline.activations.order import Order
from pipeline.activations.source import ActivationBatch
from pipeline.config.errors import UserError
from pipeline.run import byte_size


class Fill(NamedTuple):
    """What the buffer holds at a time."""

    generations: Sequence[int]
    places: Callable[[torch.device], Tensor]
    """When each position is taken, as its place among all of the fill's; positions generation by generation as they are stored."""

    def num_positions(self, order: Order) -> int:
        return sum(int(order.rows[generation]) for generation in self.generations)


def one_generation(generation: int, order: Order) -> Fill:
    """A fill whose positions are taken as they are stored."""
    return Fill([generation], lambda device: torch.arange(int(order.rows[generation]), device=device))


class RollingBuffer:
    """Gives the rows of `fills`, one fill after the other, each in its own shuffled order.

    Only the first fill is waited for. A row that was taken frees its slot, and as soon as there are free slots for a model
    batch of the next fill, one is computed into them; so memory holds one fill, never two.

    Positions are counted with those that are left out: these lie in the buffer, too, and are passed over when rows are taken, so
    that filling it never waits to learn which they are.
    """

    def __init__(self, harvester: Harvester, fills: Sequence[Fill]) -> None:
        self._harvester = harvester
        self._queue = list(fills)
        self._device = harvester.model.device
        capacity = max((fill.num_positions(harvester.order) for fill in fills), default=0)
        self._store = _allocate(capacity, max((len(fill.generations) for fill in fills), default=0), harvester)
        self.left_out = LeftOut.none(harvester.row_shape[0])
        """Of the current fill."""
        self._slots = torch.empty(0, dtype=torch.int64, device=self._device)
        """Where the current fill's rows lie, in the order of their consumption."""
        self._spare = torch.arange(capacity, device=self._device)
        """Slots that the current fill does not use."""
        self._taken = 0
        self._next = self._begin_next()

    @property
    def num_left(self) -> int:
        """Positions of the current fill that were not taken yet."""
        return len(self._slots) - self._taken

    def fill(self) -> Iterator[int]:
        """Makes the next fill the current one, which must be used up; yields the positions computed so far after each step."""
        if self.num_left:
            raise RuntimeError(f"{self.num_left} positions of the current fill are left")
        coming = self._next
        if coming is None:
            raise RuntimeError("there is no further fill")
        while coming.step(self._store, free=len(coming.free_slots)):
            yield coming.num_filled
        coming.finish()
        num_rows = coming.num_filled
        self._slots = torch.empty_like(coming.free_slots[:num_rows])
        self._slots[coming.places] = coming.free_slots[:num_rows]
        if self._harvester.exclusion.is_off:
            self.left_out = LeftOut.none(self._harvester.row_shape[0])
        else:
            self.left_out = LeftOut.of(self._store.reasons_B[self._slots], self._store.rows.acts_BLD, self._slots)
        self._spare = coming.free_slots[num_rows:]
        self._taken = 0
        self._next = self._begin_next()

    def skip(self, num_positions: int) -> None:
        """Counts the next positions of the current fill as taken."""
        self._taken += num_positions

    def take(self, num_positions: int) -> ActivationBatch:
        """The rows of the next positions, as copies: fewer where some are left out. Computes some of the next fill into the
        slots freed."""
        if num_positions > self.num_left:
            raise RuntimeError(f"{num_positions} positions asked for, {self.num_left} left")
        slots = self._slots[self._taken : self._taken + num_positions]
        kept = self.left_out.kept_between(self._taken, self._taken + num_positions)
        if len(kept) < num_positions:
            slots = slots[torch.from_numpy(kept).to(self._device)]
        taken = ActivationBatch(*(column.index_select(0, slots) for column in self._store.rows))
        self._taken += num_positions
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
    """A fill on its way into the buffer: its k-th position as harvested goes to the k-th slot that becomes free."""

    def __init__(self, harvester: Harvester, fill: Fill, free_slots: Tensor) -> None:
        self.free_slots = free_slots
        self.num_filled = 0
        self.places = _places_of_harvested(harvester.order, fill, free_slots.device)
        self._step_rows = [batch.num_rows for generation in fill.generations for batch in harvester.order.model_batches(generation)]
        self._rows = itertools.chain.from_iterable(harvester.rows(generation) for generation in fill.generations)
        self._steps_done = 0

    def step(self, store: Harvested, *, free: int) -> bool:
        """Computes one more model batch if it fits into the first `free` slots; whether it did."""
        if self._steps_done == len(self._step_rows) or self.num_filled + self._step_rows[self._steps_done] > free:
            return False
        made = next(self._rows)
        slots = self.free_slots[self.num_filled : self.num_filled + len(made.reasons_B)]
        for column, values in zip((*store.rows, store.reasons_B), (*made.rows, made.reasons_B), strict=True):
            column.index_copy_(0, slots, values)
        self.num_filled += len(slots)
        self._steps_done += 1
        return True

    def finish(self) -> None:
        """Ends the harvest, with what it still has to check."""
        for _ in self._rows:
            raise RuntimeError("the harvest gave more rows than its order has")


def _places_of_harvested(order: Order, fill: Fill, device: torch.device) -> Tensor:
    """When each position of the fill is taken, as its place among all of them; positions as they are harvested."""
    places_as_stored, first = fill.places(device), 0
    places = []
    for generation in fill.generations:
        places.append(places_as_stored[first : first + int(order.rows[generation])][order.places(generation, device)])
        first += int(order.rows[generation])
    return torch.cat(places)


def _allocate(num_rows: int, num_generations: int, harvester: Harvester) -> Harvested:
    device = harvester.model.device
    num_layers, d_model = harvester.row_shape
    size = num_rows * (num_layers * d_model * harvester.model.dtype.itemsize + 24)
    try:
        acts_NLD = torch.empty((num_rows, num_layers, d_model), dtype=harvester.model.dtype, device=device)
        numbers = [torch.empty(num_rows, dtype=torch.int64, device=device) for _ in range(3)]
        reasons_N = torch.empty(num_rows, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # on a CPU there is no class of its own for it
        if "memory" not in str(error):
            raise
        smaller = f"contexts_per_generation below {harvester.settings.contexts_per_generation:,}"
        if num_generations > 1:
            smaller = f"shuffle_generations below {num_generations}, or {smaller}"
        raise UserError(
            f"a buffer of {num_rows:,} positions, {num_generations} generations, takes {byte_size(size)}, more than is free on "
            f"{device}; set {smaller}"
        ) from error
    return Harvested(ActivationBatch(acts_NLD, *numbers), reasons_N)
