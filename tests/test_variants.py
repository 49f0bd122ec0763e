"""Every configuration under configs/variants/ trains, goes on where it was stopped, and keeps what all of them promise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from shipped import files
from torch import Tensor
from toy_activations import MemorySource, random_activations

from pipeline.config import load
from pipeline.config.crosscoder import Factorized
from pipeline.config.site_file import Site
from pipeline.config.train_crosscoder import TrainConfig
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.crosscoder.folding import fold
from pipeline.crosscoder.trainer import Trainer
from pipeline.run import Run, Stopped

CPU = torch.device("cpu")
VARIANTS = files("configs/variants/*.yaml")
REVIVING = {"auxk", "pre_activation"}


def variant(path: Path, **changes: Any) -> TrainConfig:
    """The shipped configuration, made to train 9 steps on toy activations of width 6."""
    config = load.load(path, site=Site())
    assert isinstance(config, TrainConfig)
    small = {"num_tokens": 280, "held_out": None, "batch_positions": 32, "dead_window_tokens": 64, "log_every_steps": 3, "device": "cpu"}
    crosscoder = config.crosscoder
    if isinstance(crosscoder.parameterization, Factorized):
        crosscoder = crosscoder.model_copy(update={"parameterization": Factorized(rank=8)})
    return config.model_copy(update={**small, "crosscoder": crosscoder, **changes})


def trainer(directory: Path, config: TrainConfig) -> Trainer:
    return Trainer(config, MemorySource(random_activations(200)), Run(directory), CPU)


def weights_of(course: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in course.state.crosscoder.state_dict().items()}


def final_checkpoint(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in max((directory / "checkpoints").iterdir()).iterdir()}


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which TensorBoard reads two starts within a second is another test's."""
    monkeypatch.setattr("pipeline.crosscoder.training_log._wait_for_a_later_name", lambda directory: None)


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_a_variant_that_is_stopped_and_started_again_ends_with_the_bytes_of_one_that_was_not(path: Path, tmp_path: Path) -> None:
    config = variant(path)
    whole = trainer(tmp_path / "whole", config)
    before = weights_of(whole)
    whole.train()
    after = weights_of(whole)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name for name, _ in whole.state.crosscoder.named_parameters()} <= moved | {"activation_function.log_threshold_F"}
    stopped = trainer(tmp_path / "stopped", config)
    stopped.train_step(next(iter(stopped.source.batches(batch_positions=32, epoch=0, cursor=0))).acts_BLD)
    stopped.run.request_stop("test")
    with pytest.raises(Stopped):
        stopped.train()
    trainer(tmp_path / "stopped", config).train()
    assert final_checkpoint(tmp_path / "stopped") == final_checkpoint(tmp_path / "whole")


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_micro_batches_train_a_variant_as_one_batch_does(path: Path, tmp_path: Path) -> None:
    course = {}
    for size in (None, 10):
        one = trainer(tmp_path / str(size), variant(path, micro_batch_positions=size))
        one.state.dead_J = torch.tensor([3, 5]) if one.config.loss.auxk else None
        one.train_step(next(iter(one.source.batches(batch_positions=32, epoch=0, cursor=0))).acts_BLD)
        gradients = {name: p.grad for name, p in one.state.crosscoder.named_parameters() if p.grad is not None}
        course[size] = gradients
    for name, gradient in course[None].items():
        # Sums of up to 32 float32 terms in another order, of the size of the largest of them.
        torch.testing.assert_close(course[10][name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_a_trained_variant_loads_and_folds_exactly(path: Path, tmp_path: Path) -> None:
    course = trainer(tmp_path, variant(path))
    course.train()
    trained = load_crosscoder(tmp_path)
    raw_NLD = random_activations(200)
    features_NF = trained.encode(raw_NLD)
    assert (features_NF > 0).any()
    exact = fold(trained.crosscoder.double(), trained.normalizer.double(), torch.float64)
    acts_NLD = (raw_NLD.double() - trained.normalizer.offset_LD) * trained.normalizer.scale_L[:, None]
    with torch.no_grad():
        expected_NF = trained.crosscoder.encode(acts_NLD)
        x_NLD = trained.crosscoder.decode(expected_NF, acts_NLD) / trained.normalizer.scale_L[:, None] + trained.normalizer.offset_LD
    scale = expected_NF.abs().max().item()
    torch.testing.assert_close(exact.encode(raw_NLD.double()), expected_NF, rtol=1e-10, atol=1e-12 * scale)
    torch.testing.assert_close(exact.decode(expected_NF, raw_NLD.double()), x_NLD, rtol=1e-10, atol=1e-12 * x_NLD.abs().max().item())
    torch.testing.assert_close(features_NF, expected_NF.float(), rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("path", [p for p in VARIANTS if REVIVING & set(variant(p).loss.terms())], ids=lambda path: path.stem)
def test_a_variant_that_means_to_revive_features_gives_dead_encoders_a_gradient(path: Path, tmp_path: Path) -> None:
    course = trainer(tmp_path, variant(path, layer_mask_rate=0.0))
    with torch.no_grad():
        course.state.crosscoder.b_enc_F[:4] = -1e3
    course.state.dead_J = torch.arange(4)
    course.train_step(next(iter(course.source.batches(batch_positions=32, epoch=0, cursor=0))).acts_BLD)
    gradient = course.state.crosscoder.b_enc_F.grad
    assert gradient is not None
    assert (gradient[:4] != 0).any()


def test_all_ten_variants_of_the_notes_are_there() -> None:
    notes = {"v1", "v1a", "v1b", "v1c", "v1d", "v1e", "v1f", "v1g", "v2", "ref"}
    assert notes <= {path.stem for path in VARIANTS}
