"""Runs to compare with, from a line in an evaluation's YAML to what the frozen run records."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load
from pipeline.config.errors import UserError
from pipeline.config.evaluate_crosscoder import EvaluateConfig
from pipeline.config.site_file import Site
from pipeline.tokens import write_token_set
from slurm.submission import input_preflight
from slurm.submission.chain_order import in_order
from slurm.submission.freezing import bind_runs


def evaluation(runs: Path, **changes: Any) -> EvaluateConfig:
    values = {"stage": "evaluate", "name": "x", "crosscoder": "train/cross", "tokens": "/tokens", "language_model": {"model": "demo"}}
    config = load.from_values(values | changes, where="evaluate.yaml", site=Site(runs=runs))
    assert isinstance(config, EvaluateConfig)
    return config


def test_runs_may_be_named_as_elsewhere(tmp_path: Path) -> None:
    config = evaluation(tmp_path, compare_with=["train/one", "train/two/20261123-091530-k3f9", str(tmp_path / "elsewhere")])
    assert config.compare_with == [tmp_path / "train/one", tmp_path / "train/two/20261123-091530-k3f9", tmp_path / "elsewhere"]
    assert config.inputs() == {
        "crosscoder": tmp_path / "train/cross",
        "tokens": Path("/tokens"),
        "compare_with[0]": config.compare_with[0],
        "compare_with[1]": config.compare_with[1],
        "compare_with[2]": config.compare_with[2],
    }


def test_a_run_that_is_still_to_come_is_bound_when_it_is_queued_and_waited_for(tmp_path: Path) -> None:
    config = evaluation(tmp_path, compare_with=["train/one", "train/two"])
    made = {field: tmp_path / f"{field}-run" for field in ("crosscoder", "compare_with[0]", "compare_with[1]")}
    bound = bind_runs(config, made, tmp_path)
    assert isinstance(bound, EvaluateConfig)
    assert bound.compare_with == [made["compare_with[0]"], made["compare_with[1]"]]
    assert bound.crosscoder == made["crosscoder"]
    with pytest.raises(UserError, match=r"compare_with\[1\] is .*train/two, but no run of train/two has finished"):
        bind_runs(config, {field: made[field] for field in ("crosscoder", "compare_with[0]")}, tmp_path)
    train = {"stage": "train", "activations": {"kind": "disk", "path": "/a"}, "loss": {}, "epochs": 1}
    train["crosscoder"] = {"num_features": 8, "activation_function": {"kind": "relu"}}
    trained = [load.from_values({**train, "name": name}, where=name, site=Site(runs=tmp_path)) for name in ("two", "cross", "one")]
    ordered, _ = in_order([("evaluate", config), *((made.name, made) for made in trained)], tmp_path)
    assert ordered[-1][0] == "evaluate"


def test_training_tokens_that_are_no_data_set_are_refused_at_submission(tmp_path: Path) -> None:
    write_token_set(tmp_path / "set/validation", {"a": [[1, 2]]}, vocab_size=10, end_of_text_id=0)
    config = evaluation(tmp_path, tokens=str(tmp_path / "set/validation"), training_tokens=str(tmp_path / "set"))
    faults = [fault for fault in input_preflight.faults_of(config, tmp_path) if "training_tokens" in fault]
    assert len(faults) == 1
    assert faults[0].startswith(f"training_tokens is {tmp_path / 'set'}, which is not a data set")
