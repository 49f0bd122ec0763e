"""The configurations under configs/groups/ train, go on where they were stopped, and keep every feature to its own sites."""

from pathlib import Path
from typing import Any

import pytest
import torch
from shipped import files
from toy_activations import MemorySource, random_activations

from pipeline.config import load
from pipeline.config.activation_source import DiskActivations
from pipeline.config.site_file import Site
from pipeline.config.train_crosscoder import TrainConfig
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.crosscoder.trainer import Trainer
from pipeline.run import Run, Stopped

CPU = torch.device("cpu")
PATHS = files("configs/groups/*.yaml")
CACHED = {"demo": ["transformer.h.2", "transformer.h.3"], "diffing": ["base/transformer.h.3", "chat/transformer.h.3"]}
"""The sites that configs/<name>/cache.yaml caches."""
FIRST, SECOND = (True, False), (False, True)
BOTH = (True, True)
WRITTEN = {
    "per-layer": [FIRST] * 512 + [SECOND] * 512,
    "shared-features": [BOTH] * 128 + [FIRST] * 448 + [SECOND] * 448,
    "weakly-causal": [BOTH] * 512 + [SECOND] * 512,
    "transcoder": [SECOND] * 1024,
    "diffing": [BOTH] * 512 + [FIRST] * 256 + [SECOND] * 256,
}
READ = WRITTEN | {"weakly-causal": [FIRST] * 512 + [SECOND] * 512, "transcoder": [FIRST] * 1024}


def trainer(directory: Path, path: Path) -> Trainer:
    """The shipped configuration on toy activations of width 6 at the sites that it names."""
    (directory / "data/models/answers").mkdir(parents=True, exist_ok=True)  # what python -m pipeline.demo.answering_model makes
    config = load.load(path, site=Site(data=directory / "data"))
    assert isinstance(config, TrainConfig)
    small: dict[str, Any] = {"num_tokens": 280, "held_out": None, "batch_positions": 32, "log_every_steps": 3, "device": "cpu"}
    source = MemorySource(random_activations(200))
    activations = config.activations
    source.layers = CACHED[activations.path.name] if isinstance(activations, DiskActivations) else activations.layers
    return Trainer(config.model_copy(update={**small, "dead_window_tokens": 64}), source, Run(directory), CPU)


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which TensorBoard reads two starts within a second is another test's."""
    monkeypatch.setattr("pipeline.crosscoder.training_log._wait_for_a_later_name", lambda directory: None)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_feature_reads_and_writes_the_sites_of_its_group_alone_however_it_is_trained(path: Path, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", path)
    whole.train()
    trained = load_crosscoder(tmp_path / "whole").crosscoder
    writes_FL, reads_FL = torch.tensor(WRITTEN[path.stem]), torch.tensor(READ[path.stem])
    assert trained.W_dec_FLD.any(-1).equal(writes_FL)
    assert trained.W_enc_LDF.any(1).T.equal(reads_FL)

    stopped = trainer(tmp_path / "stopped", path)
    stopped.train_step(next(iter(stopped.source.batches(batch_positions=32, epoch=0, cursor=0))).acts_BLD)
    for name, parameter in stopped.state.crosscoder.named_parameters():
        if parameter.dim() == 3 and parameter.grad is not None:
            moved_FL = parameter.grad.any(-1) if parameter.shape[0] == 1024 else parameter.grad.any(1).T
            own_FL = writes_FL if parameter.shape[0] == 1024 else reads_FL
            assert moved_FL.any(), name
            assert not (moved_FL & ~own_FL).any(), name
    stopped.run.request_stop("test")
    with pytest.raises(Stopped):
        stopped.train()
    trainer(tmp_path / "stopped", path).train()
    last = [max((tmp_path / name / "checkpoints").iterdir()) for name in ("whole", "stopped")]
    assert {file.name: file.read_bytes() for file in last[0].iterdir()} == {file.name: file.read_bytes() for file in last[1].iterdir()}


def test_every_configuration_has_its_sites_written_down_here() -> None:
    assert {path.stem for path in PATHS} == set(WRITTEN)
