"""The name of a language model or tokenizer means one thing, wherever the job runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from model_copies import copy_of_model
from tiny_models import tiny_gpt2

from pipeline.config import load
from pipeline.config.errors import UserError
from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.pretrained import at_commits, pretrained_in
from pipeline.config.site_file import Site
from pipeline.config.stage import StageConfig
from pipeline.language_model import LanguageModel
from pipeline.text.tokenizer import load_tokenizer


def values(name: str, stage: str = "cache") -> dict[str, Any]:
    model = {"language_model": {"model": name}}
    harvest = {"tokens": "/tokens", "layers": ["h.0"], **model}
    return {
        "tokenize": {"stage": "tokenize", "name": "x", "sources": ["/text"], "output": "/o", "tokenizer": {"name": name}},
        "cache": {"stage": "cache", "name": "x", "output": "/o", **harvest},
        "evaluate": {"stage": "evaluate", "name": "x", "crosscoder": "/runs/train/x", "tokens": "/tokens", **model},
        "train": {
            "stage": "train",
            "name": "x",
            "activations": {"kind": "stream", **harvest},
            "crosscoder": {"num_features": 8, "activation_function": {"kind": "relu"}},
            "loss": {},
            "epochs": 1,
        },
    }[stage]


def read(name: str, stage: str = "cache", **more: Any) -> StageConfig:
    return load.from_values(values(name, stage), where="x.yaml", site=Site(data=Path("/data")), **more)


def name_in(config: StageConfig) -> str:
    (named,) = pretrained_in(config).values()
    return named.model if isinstance(named, LanguageModelConfig) else named.name


@pytest.mark.parametrize("stage", ["tokenize", "cache", "evaluate", "train"])
def test_a_name_that_something_here_has_becomes_its_absolute_path(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = copy_of_model(tmp_path / "models/llama")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("models/llama", "./models/llama", "~/models/llama", str(directory)):
        assert name_in(read(name, stage)) == str(directory)
    assert name_in(read("models/llama/config.json", stage)) == str(directory / "config.json")


@pytest.mark.parametrize("stage", ["tokenize", "cache", "evaluate", "train"])
def test_any_other_name_stays_and_is_one_on_the_hub(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [name_in(read(name, stage)) for name in ("gpt2", "meta/llama", "demo")] == ["gpt2", "meta/llama", "demo"]
    (tmp_path / "demo").mkdir()
    assert name_in(read("demo", stage)) == "demo"


def test_what_looks_like_a_path_and_is_not_there_is_refused_by_file_and_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ana")
    for name, there in (
        ("./llama", f"{tmp_path}/llama"),
        ("/no/llama", "/no/llama"),
        ("~/llama", "/home/ana/llama"),
        ("~nobody-here/llama", f"{tmp_path}/~nobody-here/llama"),
        ("../llama", f"{tmp_path}/../llama"),
    ):
        with pytest.raises(UserError) as error:
            read(name, "train")
        assert str(error.value) == (
            f"x.yaml: activations.language_model.model is {name}, but there is nothing at {there}; give a path that is there, or a name "
            "on the hub"
        )
    with pytest.raises(UserError, match=r"x\.yaml: tokenizer\.name is \./t\.json, but there is nothing at"):
        read("./t.json", "tokenize")


def test_a_name_may_be_under_one_of_the_sites_roots(tmp_path: Path) -> None:
    directory = copy_of_model(tmp_path / "llama")
    site = Site(data=tmp_path, ssd=tmp_path, runs=tmp_path)
    for root in ("data", "ssd", "runs"):
        config = load.from_values(values(f"{{{root}}}/llama"), where="x.yaml", site=site)
        assert name_in(config) == str(directory)


def test_a_frozen_name_is_not_looked_for_again_and_a_changed_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_of_model(tmp_path / "gpt2")
    copy_of_model(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert name_in(read("gpt2", "train", frozen=values("gpt2", "train"))) == "gpt2"
    assert name_in(read("other", "train", frozen=values("gpt2", "train"))) == str(tmp_path / "other")
    assert name_in(read("gpt2", "train")) == str(tmp_path / "gpt2")


def test_a_commit_takes_the_place_of_the_revision_wherever_the_model_stands() -> None:
    for stage, field in (("tokenize", "tokenizer"), ("cache", "language_model"), ("train", "language_model")):
        config = read("meta/llama", stage)
        (named,) = pretrained_in(at_commits(config, {field: "a39f"})).values()
        assert named.revision == "a39f"
        assert at_commits(config, {}) == config


def test_a_name_on_the_hub_is_never_taken_for_a_directory_beside_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_gpt2(tmp_path / "gpt2")
    (tmp_path / "gpt2/tokenizer.json").write_text(json.dumps({}))
    monkeypatch.chdir(tmp_path)
    sentence = rf"is gpt2, a name on the hub, but transformers would take {tmp_path}/gpt2 for it; start this in another directory"
    with pytest.raises(UserError, match=f"language_model.model {sentence}"):
        LanguageModel.load(LanguageModelConfig(model="gpt2", device="cpu"))
    with pytest.raises(UserError, match=f"tokenizer.name {sentence}"):
        load_tokenizer("gpt2", revision=None, special_text="token", end_of_text=None)
