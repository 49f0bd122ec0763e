"""All that training changes, and its way into a checkpoint and back.

Shapes: L layers, D model width, F features, J dead features.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import records
from pipeline.activations.source import ActivationSource
from pipeline.config.errors import UserError
from pipeline.config.train_crosscoder import NoHistory, TrainConfig
from pipeline.crosscoder import checkpoint_files
from pipeline.crosscoder.checkpoint import crosscoder_part
from pipeline.crosscoder.checkpoint_files import Part
from pipeline.crosscoder.clipping import Clipping
from pipeline.crosscoder.feature_window import FeatureWindow
from pipeline.crosscoder.initialization import needs_data
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.normalizer import Normalizer
from pipeline.crosscoder.overfit import Overfit
from pipeline.crosscoder.plan import Plan
from pipeline.crosscoder.recent_l0 import RecentL0
from pipeline.crosscoder.training_window import Window


class TrainingState:
    """Crosscoder, optimizer, counters and the metrics not yet logged, after `step` steps.

    Learning rate, sparsity coefficient and position in the data follow from `step` (see `schedules` and `plan`).
    """

    def __init__(self, config: TrainConfig, source: ActivationSource, device: torch.device) -> None:
        self.config = config
        self.activations_id = source.data_id
        self.plan = Plan.of(config, source.num_positions)
        self._facts = {
            "dead_window_tokens": self.plan.dead_window_tokens,
            "batch_positions": config.batch_positions,
            "activations_id": source.data_id,
            **source.provenance.facts(),
        }
        self.layers = list(source.layers)
        self.device = device
        self.step = 0
        self.num_left_out = 0
        """Of `tokens`, positions that had no row."""
        self.normalizer = Normalizer.from_statistics(source.statistics, config.crosscoder.normalization).to(device)
        self.crosscoder = self._first_crosscoder(source)
        self.clipping = Clipping(config.optimizer.clipping).to(device)
        self.optimizer = torch.optim.Adam(
            self.crosscoder.parameters(),
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.epsilon,
            fused=device.type == "cuda",
        )
        self.tokens_since_fired_F = torch.zeros(config.crosscoder.num_features, dtype=torch.int64, device=device)
        self.dead_J: Tensor | None = None
        """Features that were dead when last looked up; None while there are none."""
        self.window = Window(list(config.loss.terms()), len(self.layers), device)
        self.recent_l0 = RecentL0(config.l0_window_steps, self.plan, device)
        self.overfit = Overfit(device) if config.overfit else None
        has_history = not isinstance(config.checkpoints.history, NoHistory)
        self.feature_window = FeatureWindow(config.crosscoder.num_features, device) if has_history else None
        self.best_step: int | None = None
        """The step whose checkpoint explained most of the held-out positions' variance; None while none was measured."""
        self.best_explained: float | None = None

    def _first_crosscoder(self, source: ActivationSource) -> Crosscoder:
        """As training begins, with weights drawn from the seed and, where the initialization asks for it, from the first batch."""
        settings = self.config.crosscoder
        data_NLD = None
        if needs_data(settings.initialization):
            batch = next(iter(source.batches(batch_positions=self.plan.batch_positions, epoch=0, cursor=0)))
            data_NLD = self.normalizer.normalize(batch.acts_BLD.to(self.device))
        crosscoder = Crosscoder(settings, layers=self.layers, d_model=source.d_model, seed=self.config.seed, data_NLD=data_NLD)
        if settings.initialization.decoder_bias == "mean":
            with torch.no_grad():
                crosscoder.b_dec_LD.copy_(self.normalizer.normalized_mean())
        return crosscoder.to(self.device)

    @property
    def tokens(self) -> int:
        """Positions trained on so far, those without a row counted."""
        return self.plan.tokens_after(self.step)

    def crosscoder_part(self) -> Part:
        """The shard of a checkpoint that a crosscoder is loaded from."""
        facts = {"layers": self.layers, "step": self.step, "tokens": self.tokens, **self._facts}
        return crosscoder_part(self.crosscoder, self.normalizer, self.tokens_since_fired_F, self.config.crosscoder, facts)

    def parts(self) -> dict[str, Part]:
        """The state as the shards of a checkpoint."""
        place = self.plan.place_after(self.step)
        facts: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "epoch": place.epoch, "cursor": place.cursor}
        facts |= {"activations_id": self.activations_id, "settings": self.config.identity()}
        facts |= {"best_step": self.best_step, "best_explained": self.best_explained, "left_out": self.num_left_out}
        facts |= {"window_steps": self.window.num_steps, "window_tokens": self.window.num_tokens}
        return {
            "crosscoder": self.crosscoder_part(),
            "training": Part({**self._optimizer_tensors(), **self._counters(), **self._random_states()}, facts),
        }

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        names = [name for name, _ in self.crosscoder.named_parameters()]
        state = self.optimizer.state_dict()["state"]
        return {f"adam.{names[i]}.{key}": tensor for i, tensors in state.items() for key, tensor in tensors.items()}

    def _counters(self) -> dict[str, Tensor]:
        dead_J = self.dead_J if self.dead_J is not None else torch.zeros(0, dtype=torch.int64)
        clipping = {f"clipping.{name}": buffer for name, buffer in self.clipping.named_buffers()}
        overfit = {} if self.overfit is None else self.overfit.state
        features = {} if self.feature_window is None else self.feature_window.state
        return {"window.sums": self.window.sums, "dead_features": dead_J, **self.recent_l0.state, **overfit, **features, **clipping}

    def _random_states(self) -> dict[str, Tensor]:
        states = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def restore(self, checkpoint: Path) -> None:
        """Takes the state of `checkpoint` over. Raises `UserError` if it was made with other settings or activations."""
        training = checkpoint_files.read_part(checkpoint, "training")
        self._check_same(training.facts, checkpoint)
        tensors = checkpoint_files.read_part(checkpoint, "crosscoder").tensors
        self.tokens_since_fired_F.copy_(tensors.pop("tokens_since_fired_F"))
        normalizer_tensors = {name: tensors.pop(name) for name in ("mean_LD", "scale_L")}
        center = self.config.crosscoder.normalization.center
        self.normalizer = Normalizer(**normalizer_tensors, center=center).to(self.device)
        self.crosscoder.load_state_dict(tensors)
        self._restore_optimizer(training.tensors)
        dead_J = training.tensors["dead_features"].to(self.device)
        self.dead_J = dead_J if dead_J.numel() > 0 else None
        self.window.sums.copy_(training.tensors["window.sums"])
        self.recent_l0.restore(training.tensors)
        if self.overfit is not None:
            self.overfit.restore(training.tensors)
        if self.feature_window is not None:
            self.feature_window.restore(training.tensors)
        self.clipping.load_state_dict({name: training.tensors[f"clipping.{name}"] for name, _ in self.clipping.named_buffers()})
        self.window.num_steps, self.window.num_tokens = training.facts["window_steps"], training.facts["window_tokens"]
        torch.set_rng_state(training.tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in training.tensors:
            torch.cuda.set_rng_state(training.tensors["random.cuda"], self.device)
        self.best_step, self.best_explained = training.facts["best_step"], training.facts["best_explained"]
        self.num_left_out = training.facts.get("left_out", 0)  # no version before 0.2 left any out
        self.step = training.facts["step"]

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for i, (name, _) in enumerate(self.crosscoder.named_parameters()):
            prefix = f"adam.{name}."
            state[i] = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _check_same(self, facts: records.Record, checkpoint: Path) -> None:
        if facts["activations_id"] != self.activations_id:
            raise UserError(
                f"{checkpoint} was trained on activations {facts['activations_id'][:12]}, now they are {self.activations_id[:12]}: "
                "the data changed; start a new run"
            )
        differs = _first_difference(facts["settings"], self.config.identity())
        if differs is not None:
            raise UserError(f"{checkpoint} was trained with other settings: {differs}; start a new run, or give the old settings")


def _first_difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str | None:
    for key in [*new, *(k for k in old if k not in new)]:
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            return _first_difference(before, now, f"{prefix}{key}.")
        return f"{prefix}{key} was {before!r}, now it is {now!r}"
    return None
