"""Activations straight from the language model, shuffled in a buffer on the device, with no disk between."""

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

from pipeline import records
from pipeline.activations.buffer import Fill, RollingBuffer
from pipeline.activations.epoch_order import EpochOrder, batch_sizes, num_before
from pipeline.activations.halves import AGREEMENT, Halves
from pipeline.activations.harvest import Harvester
from pipeline.activations.layer_sums import counted
from pipeline.activations.source import ActivationBatch, LayerStatistics
from pipeline.config.activation_source import Harvest, StreamedActivations
from pipeline.config.token_limit import notices
from pipeline.language_models import Models
from pipeline.run import Run
from pipeline.tokens import TokenSet

OUTLIER_NORMS = "outlier_norms.json"
"""In the run directory: above which norms positions are left out, a layer each."""
STATISTICS = "statistics.json"
"""The same of the layers' moments, and what they are of."""


class ActivationStream:
    """An `ActivationSource` that computes its rows; a strip of generations is a fill of its buffer (see `epoch_order`).

    The rows, their order and so the batches are those of the activation set that the same settings make. Resuming computes
    at most one strip again: the one in which the cursor lies.
    """

    def __init__(
        self, tokens: TokenSet, model: Models, config: StreamedActivations, run: Run, *, outlier_norms: list[float] | None = None
    ) -> None:
        """outlier_norms : above which positions are left out, a layer each, where that is fixed already; else they are measured."""
        self.settings = self._config = config
        self.models = model
        self._run = run
        self._harvester = Harvester(tokens, model, config, run.check_stop)
        for remark in self._harvester.remarks:
            run.say(remark)
        self._leave_out(outlier_norms)
        self.provenance = self._harvester.provenance
        self.layers = config.layers
        self.d_model = model.d_model
        self.num_positions = self._harvester.order.num_positions
        for notice in notices(config.max_tokens, self.num_positions, where=config.tokens, unit="positions"):
            run.say(notice)

    def _leave_out(self, norms: list[float] | None) -> None:
        if norms is None and self._config.outlier_norm_ratio is not None:
            # Another GPU may round otherwise: a run that goes on elsewhere keeps the limits that it began with.
            path = self._run.directory / OUTLIER_NORMS
            norms = records.read_json(path) if path.exists() else records.write_once(path, self._harvester.measured_norms(self._run.say))
        self._harvester.leave_out(norms)
        for line in self._harvester.exclusion.sentences(self._config):
            self._run.say(line)

    @functools.cached_property
    def data_id(self) -> str:
        """sha256 over all that determines the rows and their order."""
        harvester = self._harvester
        settings = self._config.identity()
        rows_settings = {key: settings[key] for key in Harvest.model_fields if key in settings and key != "beginning_of_text"}
        made_from: list[Any] = [rows_settings, harvester.tokens.data_id, harvester.model.hash]
        if self.provenance.beginning_of_text_id is not None:
            made_from.append(self.provenance.beginning_of_text_id)
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def statistics(self) -> LayerStatistics:
        """Of the leading contexts of the order, as many as it takes for two halves to agree; computed when first asked for.

        A run that goes on has them from the run directory.
        """
        path = self._run.directory / STATISTICS
        made_from = {"activations_id": self.data_id, "statistics_contexts": self._config.statistics_contexts}
        if path.exists():
            saved = records.read_json(path)
            if {key: saved.get(key) for key in made_from} == made_from:
                return LayerStatistics.from_json(saved["statistics"])
        statistics = self._estimated()
        records.write_json(path, {**made_from, "statistics": statistics.to_json()})
        return statistics

    def _estimated(self) -> LayerStatistics:
        order = self._harvester.order
        limit = min(self._config.statistics_contexts, order.num_contexts)
        halves = Halves(*self._harvester.row_shape)
        sample = (
            pair
            for generation in range(order.num_generations)
            for pair in zip(order.model_batches(generation), self._harvester.rows(generation), strict=True)
        )
        for batch, made in sample:
            halves.add(counted(made.rows, self._config, made.reasons_B), len(batch.contexts_B))
            is_done = halves.agree() or halves.num_contexts >= limit
            self._run.report("statistics", min(halves.num_contexts, limit), limit, unit="contexts", done=is_done)
            if is_done:
                break
        self._run.say(self._outcome(halves))
        return halves.statistics()

    def _outcome(self, halves: Halves) -> str:
        disagreement, num_contexts = halves.disagreement(), halves.num_contexts
        if num_contexts >= self._harvester.order.num_contexts:
            return f"statistics: of all {num_contexts:,} contexts"
        if disagreement <= AGREEMENT:
            return f"statistics: halves agree within {disagreement:.2%} at {num_contexts:,} contexts"
        return (
            f"warning: statistics: halves differ by {disagreement:.2%} of the scale at {num_contexts:,} contexts, more than "
            f"{AGREEMENT:.0%}: the normalization is uncertain by about as much; set statistics_contexts higher than "
            f"{self._config.statistics_contexts:,}"
        )

    def batches(self, *, batch_positions: int, epoch: int, cursor: int) -> Iterator[ActivationBatch]:
        """See `ActivationSource`. The first batch waits until the buffer is full; later ones wait for a model batch at most."""
        order = EpochOrder(self._harvester.order.rows, self._config, seed=self._config.seed, epoch=epoch)
        strips = order.strips_from(cursor)
        fills = [Fill(strip.generations, functools.partial(order.places, strip)) for strip in strips]
        buffer, coming = RollingBuffer(self._harvester, fills), iter(strips)
        for size in batch_sizes(order.num_positions - cursor, batch_positions):
            parts, missing = [], size
            while missing:
                if not buffer.num_left:
                    strip = next(coming)
                    self._fill(buffer, strip.num_positions, first=strip is strips[0])
                    buffer.skip(num_before(strip, cursor))
                count = min(missing, buffer.num_left)
                parts.append(buffer.take(count))
                missing -= count
            yield parts[0] if len(parts) == 1 else ActivationBatch(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def _fill(self, buffer: RollingBuffer, num_rows: int, *, first: bool) -> None:
        for num_filled in buffer.fill():
            if first:
                self._run.report("filling the buffer", num_filled, num_rows, unit="positions", done=num_filled == num_rows)
