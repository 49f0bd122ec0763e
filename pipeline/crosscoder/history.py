"""Snapshots of a crosscoder as it is trained, for looking at how its features came to be.

history/
  00000012/                      the step; two shards, whole or not there
    crosscoder.safetensors       as in a checkpoint
    crosscoder.json              its record
    features.safetensors         small: all that `crosscoder evolution` reads; activations and norms in normalized units
        firings [F] int64              positions of the window (the training steps since the snapshot before) at which each fired
        activation_sum [F] float64     of its activations over them
        tokens_since_fired [F] int64
        decoder_norms [F, L] float32   after the step
        held_out_firings [F] int64, held_out_sum [F] float64     the same on the held-out positions, where there are any
    features.json                its record: step, tokens, window_tokens, layers, dead_window_tokens, and of the positions that it was
                                 measured on (`measured_on`: "held-out positions" or "the step's batch") `measured_positions`,
                                 norm_ratio_by_layer, best_scalar_by_layer, explained_variance_by_layer
    manifest.json
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.train_crosscoder import LogSpacedHistory, NoHistory, TokensHistory
from pipeline.crosscoder import checkpoint_files
from pipeline.crosscoder.checkpoint_files import Part
from pipeline.crosscoder.held_out import HeldOutPositions
from pipeline.crosscoder.plan import Plan
from pipeline.crosscoder.training_state import TrainingState
from pipeline.crosscoder.weights import layer_norms

MEASURED = ("norm_ratio_by_layer", "best_scalar_by_layer", "explained_variance_by_layer")


class History:
    """Writes the snapshots that the settings ask for; one that stands there already, from before a resume, is left as it is."""

    def __init__(
        self,
        settings: NoHistory | LogSpacedHistory | TokensHistory,
        directory: Path,
        state: TrainingState,
        held_out: HeldOutPositions | None,
    ) -> None:
        self.directory, self.state, self.held_out = directory, state, held_out
        self.steps = snapshot_steps(settings, state.plan)
        for left_by_a_kill in directory.glob(".*.tmp"):
            shutil.rmtree(left_by_a_kill)

    def is_due(self) -> bool:
        """Whether a snapshot of the step just made is asked for."""
        return self.state.step in self.steps

    def write(self, raw_BLD: Tensor) -> None:
        """The snapshot of the step just made on `raw_BLD`; the next window of the features begins."""
        state = self.state
        assert state.feature_window is not None, "a run with snapshots has a window"
        if not (self.directory / checkpoint_files.name_of(state.step)).exists():
            parts = {"crosscoder": state.crosscoder_part(), "features": self._features(raw_BLD)}
            checkpoint_files.write(self.directory, state.step, parts)
        state.feature_window.clear()

    @torch.no_grad()
    def _features(self, raw_BLD: Tensor) -> Part:
        state, window = self.state, self.state.feature_window
        assert window is not None
        looked_at = HeldOutPositions(raw_BLD) if self.held_out is None else self.held_out
        measured = looked_at.measure(state.crosscoder, state.normalizer)
        tensors = {
            "firings": window.firings_F.long(),
            "activation_sum": window.activation_sum_F,
            "tokens_since_fired": state.tokens_since_fired_F,
            "decoder_norms": layer_norms(state.crosscoder.W_dec_FLD),
        }
        if self.held_out is not None:
            tensors |= {"held_out_firings": measured.firings_F, "held_out_sum": measured.sum_F}
        facts: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "window_tokens": window.num_tokens, "layers": state.layers}
        facts |= {"dead_window_tokens": state.plan.dead_window_tokens, "measured_positions": len(looked_at.acts_NLD)}
        facts |= {"measured_on": "the step's batch" if self.held_out is None else "held-out positions"}
        return Part(tensors, facts | {name: measured.metrics[f"held_out_{name}"] for name in MEASURED})


def snapshot_steps(settings: NoHistory | LogSpacedHistory | TokensHistory, plan: Plan) -> set[int]:
    """The steps after which a snapshot is written, counted from 1; the last one always, where there are any."""
    if isinstance(settings, NoHistory) or plan.num_steps == 0:
        return set()
    if isinstance(settings, TokensHistory):
        every = settings.tokens
        due = {step for step in range(1, plan.num_steps + 1) if plan.tokens_after(step) // every > plan.tokens_after(step - 1) // every}
        return due | {plan.num_steps}
    last = settings.points - 1
    return {round(plan.num_steps ** (point / last)) for point in range(settings.points)} if last else {plan.num_steps}
