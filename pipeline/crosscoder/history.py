"""Snapshots of a crosscoder as it is trained, for looking at how its features came to be.

history/
  00000012/                      the step; a checkpoint's `crosscoder` shard alone, whole or not there
    crosscoder.safetensors       as in a checkpoint; and held_out_firings [F], held_out_sum [F] where there are held-out positions
    crosscoder.json              its record
    manifest.json
"""

from pathlib import Path

from pipeline.config.train_crosscoder import LogSpacedHistory, NoHistory, TokensHistory
from pipeline.crosscoder import checkpoint_files
from pipeline.crosscoder.held_out import HeldOutPositions
from pipeline.crosscoder.plan import Plan
from pipeline.crosscoder.training_state import TrainingState


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

    def after_step(self) -> None:
        """Writes the snapshot of the step just made, if it is one of those asked for."""
        state = self.state
        if state.step not in self.steps or (self.directory / checkpoint_files.name_of(state.step)).exists():
            return
        further = {}
        if self.held_out is not None:
            measured = self.held_out.measure(state.crosscoder, state.normalizer)
            further = {"held_out_firings": measured.firings_F, "held_out_sum": measured.sum_F}
        checkpoint_files.write(self.directory, state.step, {"crosscoder": state.crosscoder_part(**further)})


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
