"""What stands where data are read and written is looked at before anything is queued."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_gpt2, tiny_token_set

from pipeline.config import load
from pipeline.config.cache_activations import CacheConfig
from pipeline.config.errors import UserError, sentence_of
from pipeline.config.site_file import Site
from pipeline.config.stage import StageConfig
from pipeline.run import Run
from pipeline.stages import cache_activations
from slurm.record import run_inputs
from slurm.submission import freezing, input_preflight


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A cache of a tiny model over a token set that lies in `sets/train`."""
    tiny_token_set(tmp_path / "sets/train")
    model = {"model": str(tiny_gpt2(tmp_path / "model")), "device": "cpu"}
    place = {"tokens": str(tmp_path / "sets/train"), "output": str(tmp_path / "acts")}
    return {"stage": "cache", "name": "x", **place, "language_model": model, "layers": ["transformer.h.0"], "context_tokens": 16}


def config(values: dict[str, Any], **changes: object) -> StageConfig:
    return load.from_values({**values, **changes}, where="x.yaml", site=Site())


def train(path: Path) -> StageConfig:
    crosscoder = {"num_features": 8, "activation_function": {"kind": "relu"}}
    loss: dict[str, Any] = {}
    activations = {"kind": "disk", "path": str(path)}
    values = {"stage": "train", "name": "x", "activations": activations, "crosscoder": crosscoder, "loss": loss, "epochs": 1}
    return load.from_values(values, where="train.yaml", site=Site())


def tokenize(tmp_path: Path, source: str) -> StageConfig:
    values = {"stage": "tokenize", "name": "x", "sources": [source], "output": str(tmp_path / "o"), "tokenizer": {"name": "demo"}}
    return load.from_values(values, where="tokenize.yaml", site=Site())


def test_a_directory_that_holds_no_set_is_refused_with_those_in_it(values: dict[str, Any], tmp_path: Path) -> None:
    (fault,) = input_preflight.faults_of(config(values, tokens=str(tmp_path / "sets")), tmp_path)
    assert fault == (
        f"tokens is {tmp_path}/sets, which is not a data set (it has no manifest.json); name one of those in it: {tmp_path}/sets/train"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^train.yaml: activations.path is .*empty, which is not a data set \(it has no manifest.json\)"):
        input_preflight.check([("train.yaml", train(tmp_path / "empty"))], tmp_path)


def test_a_held_out_set_that_is_none_is_named_by_its_own_field(tmp_path: Path) -> None:
    (tmp_path / "acts").mkdir()
    config = train(tmp_path / "acts")
    values = {**config.resolved(), "held_out": {"tokens": str(tmp_path), "language_model": {"model": "demo"}}}
    held_out = load.from_values(values, where="train.yaml", site=Site())
    (fault,) = input_preflight.faults_of(held_out, tmp_path, [tmp_path / "acts"])
    assert fault.startswith(f"held_out.tokens is {tmp_path}, which is not a data set")
    values["held_out"]["tokens"] = str(tmp_path / "nowhere")
    held_out = load.from_values(values, where="train.yaml", site=Site())
    with pytest.raises(UserError, match=r"^train.yaml: held_out.tokens: .*/nowhere does not exist"):
        run_inputs.describe_all(held_out, {"activations": tmp_path}, "train.yaml")


@pytest.mark.parametrize("link", ["acts", "disk"])
def test_an_output_through_a_broken_link_is_refused_with_where_it_leads(values: dict[str, Any], tmp_path: Path, link: str) -> None:
    (tmp_path / link).symlink_to("unmounted")
    output = tmp_path / "acts" if link == "acts" else tmp_path / "disk/acts"
    with pytest.raises(UserError) as refusal:
        freezing.check_outputs(config(values, output=str(output)), "x.yaml")
    assert str(refusal.value) == (
        f"x.yaml: output is {output}, but {tmp_path / link} is a link to unmounted, where nothing is; make what it leads to, or choose "
        "another output"
    )
    with pytest.raises(FileExistsError) as error:  # a root of runs, say, of which no submission is asked first
        output.mkdir(parents=True, exist_ok=True)
    assert (
        sentence_of(error.value)
        == f"{tmp_path / link} is a link to unmounted, where nothing is; make what it leads to, or choose another place"
    )
    (tmp_path / "unmounted").mkdir()
    freezing.check_outputs(config(values, output=str(output)), "x.yaml")


def test_a_directory_that_a_run_before_it_fills_is_let_through(tmp_path: Path) -> None:
    (tmp_path / "acts").mkdir()
    assert input_preflight.faults_of(train(tmp_path / "acts"), tmp_path, [tmp_path / "acts"]) == []
    input_preflight.check([("train.yaml", train(tmp_path / "acts"))], tmp_path, [tmp_path / "acts"])


def test_an_output_that_other_settings_or_other_data_made_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    made = config(values)
    assert isinstance(made, CacheConfig)
    cache_activations.run(made, Run(tmp_path / "run", stage="cache"))
    assert input_preflight.faults_of(made, tmp_path) == []
    assert input_preflight.faults_of(config(values, check_hashes=False), tmp_path) == []
    (fault,) = input_preflight.faults_of(config(values, context_tokens=8), tmp_path)
    assert fault == (
        f"output is {tmp_path}/acts, which was made with other settings: settings.context_tokens was 16, now it is 8; choose another "
        "output, or delete the directory to make it anew"
    )
    tiny_token_set(tmp_path / "sets/other", seed=1)
    (fault,) = input_preflight.faults_of(config(values, tokens=str(tmp_path / "sets/other")), tmp_path)
    assert "made with other settings: inputs.tokens was " in fault
    assert input_preflight.faults_of(config(values, context_tokens=8), tmp_path, [tmp_path / "acts"]) == []


def test_an_output_that_holds_something_else_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "acts").mkdir()
    assert input_preflight.faults_of(config(values), tmp_path) == []
    (tmp_path / "acts/thesis.tex").write_text("")
    (fault,) = input_preflight.faults_of(config(values), tmp_path)
    assert "which is not empty and was not made by this pipeline; choose another output" in fault


def test_text_that_is_not_there_is_no_stages_to_make(tmp_path: Path) -> None:
    (fault,) = input_preflight.faults_of(tokenize(tmp_path, str(tmp_path / "txt")), tmp_path)
    assert fault == f"sources[0] is {tmp_path}/txt, which does not exist; name files or folders of JSON lines that exist"
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for there in ("a.jsonl", "*.jsonl", "**/a.jsonl"):
        assert input_preflight.faults_of(tokenize(tmp_path, str(tmp_path / there)), tmp_path) == []
    assert len(input_preflight.faults_of(tokenize(tmp_path, str(tmp_path / "*.gz")), tmp_path)) == 1
