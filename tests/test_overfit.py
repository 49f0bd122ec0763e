"""`overfit: true`: training on one batch, and the steps that it takes to be explained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_variants import VARIANTS, variant
from toy_activations import RELU, MemorySource, random_activations, train_config

from pipeline.config.errors import UserError
from pipeline.crosscoder.overfit import ENOUGH
from pipeline.crosscoder.trainer import Trainer
from pipeline.run import Run, Stopped

LEARNS = {"topk": True, "jump-relu-l0": True, "ref": False}
"""Of three kinds of activation function, whether 150 steps on toy activations do: the l1 term of `ref` keeps it from it."""
EASY: dict[str, Any] = {
    "overfit": True,
    "num_tokens": 3200,
    "log_every_steps": 1,
    "crosscoder": {"num_features": 64, "activation_function": RELU},
    "loss": {"l1": {"coefficient": 1e-3}},
    "optimizer": {"learning_rate": 0.01},
}


def trainer(directory: Path, config: Any) -> Trainer:
    return Trainer(config, MemorySource(random_activations(100)), Run(directory, stage="train"), torch.device("cpu"))


def rows_explained(course: Trainer) -> list[float]:
    return [row["explained_variance"] for row in course.log.rows]


@pytest.mark.parametrize("path", [path for path in VARIANTS if path.stem in LEARNS], ids=lambda path: path.stem)
def test_a_shipped_variant_says_whether_it_learns_one_batch(path: Path, tmp_path: Path) -> None:
    course = trainer(tmp_path, variant(path, overfit=True, num_tokens=32 * 150, log_every_steps=1))
    result, explained = course.train(), rows_explained(course)
    assert result["steps"] == 150
    reached = [step for step, value in enumerate(explained, start=1) if value >= ENOUGH]
    assert result["overfit_steps"] == (reached[0] if reached else None)
    assert bool(reached) == LEARNS[path.stem]
    assert result["overfit_explained_variance"] == pytest.approx(max(explained), abs=1e-6)


def test_every_step_trains_on_the_same_positions_and_the_first_that_explains_them_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    course = trainer(tmp_path, train_config(**EASY))
    source = course.source
    epochs = [next(iter(source.batches(batch_positions=32, epoch=epoch, cursor=0))).positions_B.tolist() for epoch in (0, 7)]
    assert epochs[0] == epochs[1]
    assert len(set(epochs[0])) == 32
    result, explained = course.train(), rows_explained(course)
    first = next(step for step, value in enumerate(explained, start=1) if value >= ENOUGH)
    assert result["overfit_steps"] == first
    assert f"the batch's explained variance reached 0.99 at step {first} of 100" in capsys.readouterr().out


def test_a_batch_that_is_not_learned_gives_a_sentence_and_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    course = trainer(tmp_path, train_config(**EASY | {"num_tokens": 96}))
    result = course.train()
    assert result["overfit_steps"] is None
    assert f"did not reach 0.99 in 3 steps, it came to {max(rows_explained(course)):.4f} at best" in capsys.readouterr().out


def test_what_was_reached_outlasts_a_stop(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", train_config(**EASY)).train()
    stopped = trainer(tmp_path / "stopped", train_config(**EASY))
    first = whole["overfit_steps"]
    while stopped.state.step <= first:
        stopped.train_step(next(iter(stopped.source.batches(batch_positions=32, epoch=0, cursor=0))).acts_BLD)
    stopped.run.request_stop("test")
    with pytest.raises(Stopped):
        stopped.train()
    again = trainer(tmp_path / "stopped", train_config(**EASY)).train()
    names = ("overfit_steps", "overfit_explained_variance")
    assert [again[name] for name in names] == [whole[name] for name in names]


def test_epochs_of_one_batch_are_refused() -> None:
    with pytest.raises(UserError, match="overfit is true, but epochs says how long to train"):
        train_config(**EASY | {"num_tokens": None, "epochs": 3})


def test_without_it_no_result_speaks_of_it(tmp_path: Path) -> None:
    assert not [name for name in trainer(tmp_path, train_config(num_tokens=64)).train() if name.startswith("overfit")]
