"""Trains a crosscoder on an activation source, from the start or from the newest checkpoint of its run.

Shapes: B positions in a batch, L layers, D model width.

A step never waits for the device; a row of metrics, a look-up of dead features and a checkpoint do.
"""

import contextlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.activations.one_batch import OneBatch
from pipeline.activations.source import ActivationBatch, ActivationSource
from pipeline.config.errors import UserError
from pipeline.config.train_crosscoder import TrainConfig
from pipeline.crosscoder import checkpoint_files, schedules
from pipeline.crosscoder.dead_features import count_tokens, dead_features
from pipeline.crosscoder.held_out import HeldOutPositions
from pipeline.crosscoder.history import History
from pipeline.crosscoder.last_step import LastStep
from pipeline.crosscoder.objective import Objective, Outcome
from pipeline.crosscoder.training_log import TrainingLog
from pipeline.crosscoder.training_state import TrainingState
from pipeline.run import Run, Stopped


class Trainer:
    """One start of a training run."""

    def __init__(
        self, config: TrainConfig, source: ActivationSource, run: Run, device: torch.device, held_out_NLD: Tensor | None = None
    ) -> None:
        """held_out_NLD : raw activations of positions that the source does not hold, to measure the crosscoder on as it goes."""
        self.config = config
        self.held_out = None if held_out_NLD is None else HeldOutPositions(held_out_NLD)
        source = OneBatch(source, config.batch_positions) if config.overfit else source
        self.source = source
        self.run = run
        self.checkpoints = run.directory / "checkpoints"
        self.state = TrainingState(config, source, device)
        # Whatever an activation function or a penalty may draw in training follows from the seed, and from there on from the
        # state in the checkpoint.
        torch.manual_seed(config.seed)
        self._resume()
        self.objective = Objective(config, device.type)
        self.forward = torch.compile(self.objective.__call__) if config.compile else self.objective.__call__
        self.mean_LD = self.state.normalizer.normalized_mean()
        self.log = TrainingLog(run, self.state, self.held_out)
        self.history = History(config.checkpoints.history, run.directory / "history", self.state, self.held_out)
        self._saved_at = time.monotonic()

    def _resume(self) -> None:
        checkpoint_files.set_damaged_aside(self.checkpoints, self.run.say)
        kept = checkpoint_files.all_in(self.checkpoints)
        self.saved = kept[-1] if kept else None
        if self.saved is not None:
            self.state.restore(self.saved)
            self.run.say(f"resuming at step {self.state.step:,} of {self.state.plan.num_steps:,}, from {self.saved}")

    # -- the course of training -----------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Trains to the end and gives the values of `result.json`.

        Raises `Stopped`, after saving, when the run is asked to stop; `UserError` when the loss is no longer finite or the
        disk is full, the last checkpoint being kept.
        """
        started, first_tokens = time.monotonic(), self.state.tokens
        try:
            with contextlib.closing(self.log):
                while self.state.step < self.state.plan.num_steps:
                    self._train_epoch()
                checkpoint = self._save()
        except OSError as error:
            if not checkpoint_files.disk_is_full(error):
                raise
            raise UserError(
                f"{self.run.directory} could not be written: the disk is full; free some space and start the same command again, it "
                f"goes on from {self.saved or 'the beginning'}"
            ) from error
        seconds = time.monotonic() - started
        return self._result(checkpoint, seconds, (self.state.tokens - first_tokens) / seconds)

    def _train_epoch(self) -> None:
        """Trains on the rest of the epoch that the next step lies in, or to the end of training."""
        plan = self.state.plan
        place = plan.place_after(self.state.step)
        batches = self.source.batches(batch_positions=plan.batch_positions, epoch=place.epoch, cursor=place.cursor)
        with contextlib.ExitStack() as stack:
            if isinstance(batches, Generator):
                stack.callback(batches.close)
            while self.state.step < plan.num_steps and plan.place_after(self.state.step).epoch == place.epoch:
                raw_BLD = self._next_batch(batches)
                self.train_step(raw_BLD)
                self._after_step(raw_BLD)

    def _next_batch(self, batches: Any) -> Tensor:
        """The next batch's raw activations, cut where training ends. A stop asked for while waiting saves first."""
        began = time.monotonic()
        try:
            batch: ActivationBatch | None = next(batches, None)
        except Stopped:
            self._save()
            raise
        self.log.seconds_waited += time.monotonic() - began
        wanted = self.state.plan.positions_in(self.state.step + 1)
        found = 0 if batch is None else batch.acts_BLD.shape[0]
        if batch is None or (found < wanted and not self.source.provenance.leaves_out):
            place = self.state.plan.place_after(self.state.step)
            raise UserError(
                f"the activations gave {found:,} positions at {place.cursor:,} of epoch {place.epoch}, expected {wanted:,}: the source "
                f"is shorter than the {self.state.plan.epoch_positions:,} positions it announced; check it with `crosscoder verify`"
            )
        self.state.num_left_out += max(wanted - found, 0)
        return batch.acts_BLD[:wanted].to(self.state.device, non_blocking=True)

    def _after_step(self, raw_BLD: Tensor) -> None:
        state = self.state
        done = state.step == state.plan.num_steps
        if self._has_a_row(state.step):
            self.check_finite()
            self.log.write_row()
        self.run.report("train", state.tokens, state.plan.num_tokens, unit="tokens", done=done, note=self.log.note())
        # Before any checkpoint of this step: whoever resumes from that has the snapshot, and the window that begins after it.
        if self.history.is_due() and len(raw_BLD):
            self.check_finite()
            self.history.write(raw_BLD)
        if self.run.stop_reason is not None:
            self._save()
            self.run.check_stop()
        if self._checkpoint_is_due():
            self._save()

    def _has_a_row(self, step: int) -> bool:
        return step == self.state.plan.num_steps or step % self.config.log_every_steps == 0

    # -- one step -------------------------------------------------------------------------------------------------

    def train_step(self, raw_BLD: Tensor) -> None:
        """Forward, backward, update and counters of one batch of raw activations."""
        state, config = self.state, self.config
        step, num_steps, num_tokens = state.step + 1, state.plan.num_steps, raw_BLD.shape[0]
        if num_tokens == 0:  # an epoch can end with a batch of which every position is left out
            state.recent_l0.add(torch.zeros(1, device=state.device), step, 0)
            state.step, self.log.last_step = step, None
            return
        self._look_up_dead_features(step)
        acts_BLD = state.normalizer.normalize(raw_BLD)
        numbers = schedules.scheduled_numbers(config, step, num_steps)
        values = schedules.step_values(config, numbers, batch_shape=(num_tokens, len(state.layers)), device=state.device)
        state.optimizer.zero_grad(set_to_none=True)
        outcome = self._forward_and_backward(acts_BLD, values)
        if self._has_a_row(step):
            self.log.last_step = LastStep.of(state, raw_BLD, outcome)
        gradient_norm, clipped = state.clipping.clip(list(state.crosscoder.parameters()))
        state.optimizer.param_groups[0]["lr"] = numbers["learning_rate"]
        state.optimizer.step()
        count_tokens(state.tokens_since_fired_F, outcome.firings_F, num_tokens)
        if outcome.smallest_rank is not None:
            state.crosscoder.activation_function.update(outcome.smallest_rank)
        state.window.add(outcome, gradient_norm, clipped, step=step, num_tokens=num_tokens)
        if state.overfit is not None:
            state.overfit.add(outcome, step)
        state.recent_l0.add(outcome.firings_F, step, num_tokens)
        if state.feature_window is not None:
            state.feature_window.add(outcome, num_tokens)
        state.step = step

    def _forward_and_backward(self, acts_BLD: Tensor, values: schedules.StepValues) -> Outcome:
        """The gradients of a batch, at once or a part at a time."""
        state, size = self.state, self.config.micro_batch_positions
        if size is None or len(acts_BLD) <= size:
            outcome = self.forward(state.crosscoder, acts_BLD, self.mean_LD, values, state.dead_J)
            outcome.loss.backward()  # type: ignore[no-untyped-call]
            return outcome
        parts = torch.split(acts_BLD, size)
        kept = [None] * len(parts) if values.keep_BL is None else torch.split(values.keep_BL, size)
        of_parts = [values._replace(keep_BL=keep_BL) for keep_BL in kept]
        batch = self.objective.batch_sums(state.crosscoder, parts, self.mean_LD, of_parts)
        outcomes = []
        for part_BLD, of_part in zip(parts, of_parts, strict=True):
            outcome = self.forward(state.crosscoder, part_BLD, self.mean_LD, of_part, state.dead_J, batch)
            outcome.loss.backward()  # type: ignore[no-untyped-call]
            outcomes.append(outcome._replace(loss=outcome.loss.detach()))
        return Outcome.added(outcomes)

    def _look_up_dead_features(self, step: int) -> None:
        auxk, state = self.config.loss.auxk, self.state
        if auxk is None or state.tokens < state.plan.dead_window_tokens:
            return
        if (step - 1) % auxk.refresh_steps == 0:
            dead_J = dead_features(state.tokens_since_fired_F, state.plan.dead_window_tokens)
            state.dead_J = dead_J if dead_J.numel() > 0 else None

    def check_finite(self) -> None:
        """Raises `UserError` if any step's loss or gradient was NaN or infinite. Waits for the device."""
        bad_step = int(self.state.window.first_bad_step.item())
        if bad_step == 0:
            return
        place = self.state.plan.place_after(bad_step - 1)
        last = self.state.plan.positions_in(bad_step) + place.cursor
        raise UserError(
            f"the loss or its gradient is not finite at step {bad_step:,} (epoch {place.epoch}, positions {place.cursor:,} to {last:,}); "
            + (f"the last checkpoint, {self.saved}, is kept; " if self.saved else "no checkpoint was saved yet; ")
            + "lower optimizer.learning_rate or lengthen its warm-up, and start a new run"
        )

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _checkpoint_is_due(self) -> bool:
        settings, plan, step = self.config.checkpoints, self.state.plan, self.state.step
        if settings.every_tokens is not None:
            every = settings.every_tokens
            if plan.tokens_after(step) // every > plan.tokens_after(step - 1) // every:
                return True
        return settings.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * settings.every_minutes

    def _save(self) -> Path:
        """Seals a checkpoint of the state, unless one stands already, and deletes the oldest beyond those to keep."""
        self._saved_at = time.monotonic()
        self.check_finite()
        if self.saved is None or self.saved.name != checkpoint_files.name_of(self.state.step):
            self.log.flush()
            self._compare_with_best()
            self.saved = checkpoint_files.write(self.checkpoints, self.state.step, self.state.parts())
            best = self.state.best_step if self.config.checkpoints.keep_best else None
            checkpoint_files.remove_old(self.checkpoints, self.config.checkpoints.keep, spare=best)
        return self.saved

    def _compare_with_best(self) -> None:
        if self.held_out is None:
            return
        measured = self.held_out.measure(self.state.crosscoder, self.state.normalizer)
        explained = measured.metrics["held_out_explained_variance"]
        if explained is not None and (self.state.best_explained is None or explained > self.state.best_explained):
            self.state.best_step, self.state.best_explained = self.state.step, explained

    def _result(self, checkpoint: Path, seconds: float, tokens_per_second: float) -> dict[str, Any]:
        state = self.state
        result: dict[str, Any] = {"steps": state.step, "tokens": state.tokens, "epochs": state.tokens / state.plan.epoch_positions}
        if self.source.provenance.leaves_out:
            self.run.say(f"{state.num_left_out:,} of {state.tokens:,} positions were left out for their norm or token")
            result |= {"left_out": state.num_left_out}
        result |= {"dead_window_tokens": state.plan.dead_window_tokens, **self.log.results()}
        if state.overfit is not None:
            self.run.say(state.overfit.sentence(state.plan.num_steps))
            result |= state.overfit.results()
        if state.best_step is not None:
            result |= {"best_step": state.best_step, "best_held_out_explained_variance": state.best_explained}
        result |= {"seconds": seconds, "tokens_per_second": tokens_per_second}
        return result | {"checkpoint": str(checkpoint.relative_to(self.run.directory)), "activations_id": self.source.data_id}
