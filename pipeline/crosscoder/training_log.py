"""Rows of metrics in `metrics.jsonl`, and the same numbers as TensorBoard curves."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from pipeline.crosscoder import schedules
from pipeline.crosscoder.activation_functions import RankedFunction
from pipeline.crosscoder.held_out import HeldOutPositions
from pipeline.crosscoder.last_step import LastStep, norms_by_layer
from pipeline.crosscoder.training_curves import Curves
from pipeline.crosscoder.training_state import TrainingState
from pipeline.run import Run

RESULT_SHARE = 0.05
"""Of the run's tokens: so many of the last ones a result is a mean over, at least."""
TIME_FIELDS = ("seconds", "tokens_per_second", "data_wait_share", "peak_memory_gib")
"""What a resumed run can't repeat; all other fields of a row are the same as without the interruption."""


class TrainingLog:
    """Continues what earlier starts of the run logged up to the step that it resumes from, and drops what lies beyond."""

    def __init__(self, run: Run, state: TrainingState, held_out: HeldOutPositions | None) -> None:
        self.run = run
        self.state = state
        self.held_out = held_out
        run.rewind_metrics(state.step)
        self.rows = _rows(run)
        """Of the run so far, the oldest first."""
        # Earlier starts may have drawn points beyond the checkpoint: TensorBoard hides those from purge_step on.
        _wait_for_a_later_name(run.directory / "tensorboard")
        self.writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=state.step + 1)
        self.curves = Curves(self.writer, state.layers)
        self.seconds_waited = 0.0
        """Since the last row, that the trainer's thread waited for its next batch."""
        self.last_step: LastStep | None = None
        """The step that the next row ends with, once it was made."""
        self._started = self._row_started = time.monotonic()
        self._row_first_tokens = state.tokens

    def write_row(self) -> None:
        """Logs the window since the last row, if it has any rows of activations, and begins the next. Waits for the device, once."""
        if self.state.window.num_tokens == 0:
            return  # nothing but a batch of which every position was left out
        row = {"step": self.state.step, "tokens": self.state.tokens, "epoch": self.state.plan.place_after(self.state.step - 1).epoch}
        row |= self.state.window.metrics() | self.state.recent_l0.metrics() | _state_metrics(self.state)
        row |= {} if self.last_step is None else self.last_step.metrics()
        if self.held_out is not None:
            row |= self.held_out.measure(self.state.crosscoder, self.state.normalizer).metrics
        row |= self._time_metrics()
        self.run.log_metrics(row)
        self.curves.add_row(row)
        self._draw_histograms()
        self.rows.append(row)
        self.state.window.clear()

    @property
    def last_row(self) -> dict[str, Any] | None:
        """None before the first row."""
        return self.rows[-1] if self.rows else None

    def results(self) -> dict[str, Any]:
        """What a run's result says of its end: of the state as the last row has it, of training steps a mean over the last rows.

        Those cover `RESULT_SHARE` of the run's tokens at least; a row counts by the tokens that it is of, so that one of a
        single position decides nothing.
        """
        if not self.rows:
            return {}
        last = self.rows[-1]
        sizes = [row["tokens"] - before for row, before in zip(self.rows, [0, *(row["tokens"] for row in self.rows)], strict=False)]
        first = len(self.rows) - 1
        while first > 0 and sum(sizes[first:]) < RESULT_SHARE * last["tokens"]:
            first -= 1
        recent, weights = self.rows[first:], sizes[first:]
        found = {name: last[name] for name in last if name.startswith(("dead", "threshold", "peak", "held_out"))}
        for name in last:
            if name.startswith(("loss", "l0", "explained")):
                found[name] = _mean([row[name] for row in recent], weights)
        return found

    def _time_metrics(self) -> dict[str, Any]:
        now = time.monotonic()
        elapsed = max(now - self._row_started, 1e-9)
        row = {"seconds": now - self._started, "tokens_per_second": (self.state.tokens - self._row_first_tokens) / elapsed}
        row["data_wait_share"] = min(1.0, self.seconds_waited / elapsed)
        if self.state.device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.state.device) / 2**30
        self._row_started, self._row_first_tokens, self.seconds_waited = now, self.state.tokens, 0.0
        return row

    def _draw_histograms(self) -> None:
        """Of every feature's norms, at the end and where as many steps as the settings ask for went by since the last ones."""
        state, every = self.state, self.state.config.histogram_every_steps
        before = self.rows[-1]["step"] if self.rows else 0
        if state.step // every == before // every and state.step != state.plan.num_steps:
            return
        with torch.no_grad():
            encoder_FL, decoder_FL = norms_by_layer(state.crosscoder.weights())
        histograms = {"encoder_norm": encoder_FL, "decoder_norm": decoder_FL}
        if self.last_step is not None:
            histograms["encoder_gradient_norm"] = self.last_step.encoder_gradient_FL
            histograms["decoder_gradient_norm"] = self.last_step.decoder_gradient_FL
        self.curves.add_histograms(histograms, state.step)

    def note(self) -> str:
        """The last row in a few words, for the progress line."""
        row = self.last_row
        if row is None:
            return ""
        explained = row["explained_variance"]
        return f"loss {row['loss']:.4g}  L0 {row['l0']:.1f}" + (f"  explained {explained:.3f}" if explained is not None else "")

    def flush(self) -> None:
        """Puts the curves on disk; before a checkpoint, so that none of its points can be missing."""
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _state_metrics(state: TrainingState) -> dict[str, Any]:
    config, step, num_steps = state.config, state.step, state.plan.num_steps
    with torch.no_grad():
        num_dead = (state.tokens_since_fired_F >= state.plan.dead_window_tokens).sum().item()
        encoder_FL, decoder_FL = norms_by_layer(state.crosscoder.weights())
    row = {
        "dead_features": num_dead,
        "dead_fraction": num_dead / config.crosscoder.num_features,
        "encoder_norm_by_layer": encoder_FL.mean(dim=0).tolist(),
        "decoder_norm_by_layer": decoder_FL.mean(dim=0).tolist(),
        **schedules.scheduled_numbers(config, step, num_steps),
    }
    function = state.crosscoder.activation_function
    if isinstance(function, RankedFunction) and function.num_threshold_updates.item() > 0:
        row["threshold"] = function.threshold.item()
    return row


def _wait_for_a_later_name(directory: Path) -> None:
    """Until a new event file comes after those of earlier starts, a second at most.

    TensorBoard reads event files in the order of their names, which hold the second they were made in and then host and process id:
    of two starts within a second the later one may be read first, and what it drew be hidden.
    """
    seconds = [int(path.name.split(".")[3]) for path in directory.glob("events.out.tfevents.*.*")]
    ahead = max(seconds, default=0) + 1 - time.time()
    if 0 < ahead <= 1:  # more: a clock was put back, which no wait makes good
        time.sleep(ahead)


def _rows(run: Run) -> list[dict[str, Any]]:
    path = run.directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [dict(json.loads(line)) for line in lines]


def _mean(values: list[Any], weights: list[int]) -> Any:
    """Of numbers, or of lists of numbers entry by entry; None where one is missing."""
    if isinstance(values[0], list):
        return [_mean(list(entries), weights) for entries in zip(*values, strict=True)]
    if any(value is None for value in values):
        return None
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
