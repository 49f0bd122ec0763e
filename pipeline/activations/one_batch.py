"""An activation source that is one batch of another: every epoch is that batch."""

from collections.abc import Generator, Iterator

from pipeline.activations.source import ActivationBatch, ActivationSource
from pipeline.config.errors import UserError


class OneBatch:
    """The first batch of a source's first epoch. Its statistics stay those of all of the source's positions.

    Raises `UserError` where the source has no position; `Stopped` where the run is asked to stop while the batch is computed.
    """

    def __init__(self, source: ActivationSource, batch_positions: int) -> None:
        batches = source.batches(batch_positions=batch_positions, epoch=0, cursor=0)
        batch = next(batches, None)
        if isinstance(batches, Generator):
            batches.close()
        if batch is None:
            raise UserError("the activations hold no positions to train on; check what the cache stage or the token set holds")
        self.batch: ActivationBatch = batch
        self.num_positions = len(batch.acts_BLD)
        self.data_id, self.provenance = source.data_id, source.provenance
        self.layers, self.d_model, self.statistics = source.layers, source.d_model, source.statistics

    def batches(self, *, batch_positions: int, epoch: int, cursor: int) -> Iterator[ActivationBatch]:
        """What is left of the batch from `cursor` on, in parts of `batch_positions`."""
        for start in range(cursor, self.num_positions, batch_positions):
            yield ActivationBatch(*(part[start : start + batch_positions] for part in self.batch))
