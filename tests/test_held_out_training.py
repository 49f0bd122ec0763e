"""What a training run measures on positions that it isn't trained on, and what its result is made of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_gpt2
from toy_activations import BATCH_TOPK, MemorySource, random_activations, train_config

from pipeline.config.cache_activations import CacheConfig
from pipeline.config.errors import UserError
from pipeline.config.schema import build
from pipeline.config.train_crosscoder import LogSpacedHistory, NoHistory, TokensHistory
from pipeline.crosscoder import checkpoint_files
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.crosscoder.held_out import HeldOutPositions
from pipeline.crosscoder.history import snapshot_steps
from pipeline.crosscoder.plan import Plan
from pipeline.crosscoder.trainer import Trainer
from pipeline.run import Run
from pipeline.stages import cache_activations, train_crosscoder
from pipeline.tokens import TokenSet, write_token_set

CPU = torch.device("cpu")
HELD_OUT = random_activations(90, seed=9)


def trainer(directory: Path, variant: str = "batch_topk", **changes: Any) -> Trainer:
    return Trainer(train_config(variant, **changes), MemorySource(random_activations(300)), Run(directory), CPU, HELD_OUT)


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_held_out_metrics_agree_with_their_definitions_written_out(tmp_path: Path) -> None:
    course = trainer(tmp_path)
    result = course.train()
    trained = load_crosscoder(tmp_path)
    features_NF = trained.encode(HELD_OUT)
    x_NLD = trained.decode(features_NF).double()
    raw_NLD = HELD_OUT.double()
    error_NL, deviation_NL = (raw_NLD - x_NLD).square().sum(-1), (raw_NLD - raw_NLD.mean(0)).square().sum(-1)
    explained_L = (1 - error_NL.sum(0) / deviation_NL.sum(0)).tolist()
    # Reconstructions are float32 of size 10: 1e-6 relative, squared and summed.
    assert result["held_out_explained_variance_by_layer"] == pytest.approx(explained_L, abs=1e-5)
    assert result["held_out_explained_variance"] == pytest.approx(sum(explained_L) / 2, abs=1e-5)
    assert result["held_out_l0"] == (features_NF > 0).sum().item() / 90
    assert result["held_out_silent_features"] == (~(features_NF > 0).any(0)).sum().item()
    median = error_NL.sqrt().median(0).values / raw_NLD.norm(dim=-1).median(0).values
    assert result["held_out_median_error_by_layer"] == pytest.approx(median.tolist(), rel=1e-4)
    scalar = (raw_NLD * x_NLD).sum((0, 2)) / x_NLD.square().sum((0, 2))
    assert result["held_out_best_scalar_by_layer"] == pytest.approx(scalar.tolist(), rel=1e-5)


def test_how_held_out_positions_are_divided_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    course = trainer(tmp_path)
    whole = course.held_out.measure(course.state.crosscoder, course.state.normalizer).metrics
    monkeypatch.setattr("pipeline.crosscoder.held_out.NUMBERS_AT_A_TIME", 64 * 7)
    parts = HeldOutPositions(HELD_OUT).measure(course.state.crosscoder, course.state.normalizer).metrics
    assert parts["held_out_l0"] == whole["held_out_l0"]
    assert parts["held_out_explained_variance"] == pytest.approx(whole["held_out_explained_variance"], rel=1e-5)


def test_a_result_is_a_mean_over_the_last_twentieth_of_the_tokens_each_row_by_its_own(tmp_path: Path) -> None:
    # Three epochs of 300 positions, then batches of 32, 32 and 5: the last row is of those 5 alone.
    course = trainer(tmp_path, num_tokens=969, log_every_steps=32)
    result = course.train()
    logged = rows(tmp_path)
    sizes = [row["tokens"] - before for row, before in zip(logged, [0, *[row["tokens"] for row in logged]], strict=False)]
    assert sizes[-1] < 0.05 * logged[-1]["tokens"], "the last row alone must be too little, or this test shows nothing"
    expected = sum(row["loss"] * size for row, size in zip(logged[-2:], sizes[-2:], strict=True)) / sum(sizes[-2:])
    assert result["loss"] == pytest.approx(expected)
    assert result["held_out_explained_variance"] == logged[-1]["held_out_explained_variance"]


def test_the_checkpoint_that_explains_most_of_the_held_out_variance_stays(tmp_path: Path) -> None:
    # A learning rate that ruins the crosscoder in the second half: the best one is not among the newest.
    schedule = {"warmup_fraction": 0.4, "initial_fraction": 0.0, "decay": "constant"}
    optimizer = {"learning_rate": 2.0, "schedule": schedule}
    course = trainer(tmp_path, optimizer=optimizer, checkpoints={"every_tokens": 64, "every_minutes": None, "keep": 1})
    result = course.train()
    kept = [int(path.name) for path in checkpoint_files.all_in(tmp_path / "checkpoints")]
    assert kept == [result["best_step"], result["steps"]]
    assert result["best_step"] < result["steps"]
    best = load_crosscoder(tmp_path / "checkpoints" / checkpoint_files.name_of(result["best_step"]))
    metrics = HeldOutPositions(HELD_OUT).measure(best.crosscoder, best.normalizer).metrics
    assert metrics["held_out_explained_variance"] == pytest.approx(result["best_held_out_explained_variance"], rel=1e-6)


def test_the_steps_of_a_history_by_hand() -> None:
    plan = Plan(epoch_positions=1000, batch_positions=10, num_tokens=1000, dead_window_tokens=10)
    assert snapshot_steps(NoHistory(), plan) == set()
    assert snapshot_steps(LogSpacedHistory(points=5), plan) == {1, 3, 10, 32, 100}
    assert snapshot_steps(TokensHistory(tokens=250), plan) == {25, 50, 75, 100}
    assert snapshot_steps(TokensHistory(tokens=300), plan) == {30, 60, 90, 100}


def test_snapshots_are_loadable_crosscoders_with_what_each_feature_did_on_held_out_positions(tmp_path: Path) -> None:
    checkpoints = {"every_tokens": None, "every_minutes": None, "history": {"kind": "log_spaced", "points": 4}}
    course = trainer(tmp_path, checkpoints=checkpoints)
    course.train()
    snapshots = checkpoint_files.all_in(tmp_path / "history")
    assert [int(path.name) for path in snapshots] == [1, 3, 10, course.state.step]
    last = load_crosscoder(snapshots[-1])
    assert torch.equal(last.crosscoder.W_dec_FLD, course.state.crosscoder.W_dec_FLD)
    features = checkpoint_files.read_part(snapshots[-1], "features")
    tensors = features.tensors
    features_NF = last.encode(HELD_OUT)
    assert torch.equal(tensors["held_out_firings"], (features_NF > 0).sum(0))
    torch.testing.assert_close(tensors["held_out_sum"], features_NF.double().sum(0))
    assert features.facts["measured_on"] == "held-out positions"
    assert features.facts["norm_ratio_by_layer"] == rows(tmp_path)[-1]["held_out_norm_ratio_by_layer"]


def test_held_out_positions_on_disk_activations_need_a_named_model() -> None:
    with pytest.raises(UserError, match=r"held_out\.language_model is missing: activations on disk"):
        train_config(held_out={"tokens": Path("nowhere")})


def test_the_stage_measures_a_token_set_with_the_model_that_its_activations_are_of(tmp_path: Path) -> None:
    tokens = {name: made(tmp_path / name, seed) for name, seed in (("train", 1), ("validation", 2))}
    model = {"model": str(tiny_gpt2(tmp_path / "model", vocab_size=tokens["train"].vocab_size)), "device": "cpu"}
    harvest = {"tokens": tmp_path / "train", "language_model": model, "layers": ["transformer.h.0"], "context_tokens": 16}
    cache = build(CacheConfig, {"stage": "cache", "name": "x", "output": tmp_path / "set", **harvest}, "test")
    cache_activations.run(cache, Run(tmp_path / "cache"))
    small = {"epochs": 1, "num_tokens": None, "batch_positions": 64, "crosscoder": {"num_features": 48, "activation_function": BATCH_TOPK}}
    small |= {"loss": {}, "name": "x"}
    found = {}
    for kind, activations in (("disk", {"path": tmp_path / "set"}), ("stream", harvest)):
        held_out = {"tokens": tmp_path / "validation", "positions": 100} | ({"language_model": model} if kind == "disk" else {})
        config = train_config("batch_topk", **small, activations={"kind": kind, **activations}, held_out=held_out)
        found[kind] = train_crosscoder.run(config, Run(tmp_path / kind))
    measured = [{name: value for name, value in result.items() if name.startswith("held_out")} for result in found.values()]
    assert measured[0]["held_out_explained_variance"] == pytest.approx(measured[1]["held_out_explained_variance"], rel=0.05)
    assert 0 < measured[0]["held_out_l0"] < 48
    with pytest.raises(UserError, match="the token set that is trained on; name one that training does not see"):
        train_config(**small, activations={"kind": "stream", **harvest}, held_out={"tokens": tmp_path / "train"})
    (tmp_path / "link").symlink_to(tmp_path / "train")  # by another name it is known by its data id
    own = train_config(**small, activations={"kind": "stream", **harvest}, held_out={"tokens": tmp_path / "link"})
    with pytest.raises(UserError, match="the token set that is trained on; name one that training does not see"):
        train_crosscoder.run(own, Run(tmp_path / "own"))
    other = {**model, "model": str(tiny_gpt2(tmp_path / "other", vocab_size=tokens["train"].vocab_size, seed=5))}
    held_out = {"tokens": tmp_path / "validation", "language_model": other}
    wrong = train_config(**small, activations={"kind": "disk", "path": tmp_path / "set"}, held_out=held_out)
    with pytest.raises(UserError, match="name the model that they were computed with"):
        train_crosscoder.run(wrong, Run(tmp_path / "wrong"))


def made(directory: Path, seed: int) -> TokenSet:
    generator = np.random.default_rng(seed)
    documents = [generator.integers(1, 50, length).tolist() for length in generator.integers(5, 40, 30)]
    return write_token_set(directory, {"a-000": documents}, vocab_size=300, end_of_text_id=0, tokenizer_hash="")
