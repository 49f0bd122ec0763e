"""Which step trains on which positions: arithmetic on the step alone, so a resumed run needs no more than its number."""

from typing import NamedTuple

from pipeline.config.errors import UserError
from pipeline.config.train_crosscoder import TrainConfig

LONGEST_DEAD_WINDOW = 10_000_000


class Place(NamedTuple):
    """Where a step's batch begins in the data."""

    epoch: int
    cursor: int
    """Positions of the epoch that are already consumed."""


class Plan(NamedTuple):
    """`num_tokens` positions in batches of `batch_positions`, over epochs of `epoch_positions`; short batches end epochs."""

    epoch_positions: int
    batch_positions: int
    num_tokens: int
    dead_window_tokens: int
    """Training tokens without firing after which a feature is dead."""

    @classmethod
    def of(cls, config: TrainConfig, epoch_positions: int) -> "Plan":
        if epoch_positions < 1:
            raise UserError("the activations hold no positions to train on; check what the cache stage or the token set holds")
        num_tokens = config.num_tokens if config.num_tokens is not None else (config.epochs or 1) * epoch_positions
        window = config.dead_window_tokens or max(config.batch_positions, min(LONGEST_DEAD_WINDOW, num_tokens // 10))
        return cls(epoch_positions, config.batch_positions, num_tokens, window)

    @property
    def steps_an_epoch(self) -> int:
        return -(-self.epoch_positions // self.batch_positions)

    @property
    def num_steps(self) -> int:
        epochs, rest = divmod(self.num_tokens, self.epoch_positions)
        return epochs * self.steps_an_epoch + -(-rest // self.batch_positions)

    def tokens_after(self, steps: int) -> int:
        """Positions that the first `steps` steps train on."""
        epochs, steps_into = divmod(steps, self.steps_an_epoch)
        return min(epochs * self.epoch_positions + steps_into * self.batch_positions, self.num_tokens)

    def place_after(self, steps: int) -> Place:
        """Where the step that follows the first `steps` begins."""
        epoch, steps_into = divmod(steps, self.steps_an_epoch)
        return Place(epoch, steps_into * self.batch_positions)

    def positions_in(self, step: int) -> int:
        """Positions in step `step`, counted from 1."""
        return self.tokens_after(step) - self.tokens_after(step - 1)
