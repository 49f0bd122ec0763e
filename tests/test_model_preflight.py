"""A language model that isn't there is refused on the login node, before a run directory is made."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_gpt2

from pipeline import model_kinds
from pipeline.config import load
from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.site_file import Site
from pipeline.config.tokenize_text import TokenizerConfig
from slurm.submission import input_preflight, model_preflight


def model(name: str, revision: str | None = None) -> LanguageModelConfig:
    return LanguageModelConfig(model=name, revision=revision)


def put_in_cache(cache: Path, folder: str, commit: str, branch: str | None = None) -> None:
    (cache / folder / "snapshots" / commit).mkdir(parents=True)
    (cache / folder / "snapshots" / commit / "config.json").write_text("{}")
    (cache / folder / "snapshots" / commit / "pytorch_model.bin").write_bytes(b"PK")
    if branch:
        (cache / folder / "refs").mkdir()
        (cache / folder / "refs" / branch).write_text(commit)


def test_a_model_is_a_directory_with_a_config(tmp_path: Path) -> None:
    assert model_preflight.faults_of(model("demo")) == []
    assert model_preflight.faults_of(model(str(tmp_path))) == [f"language_model.model is {tmp_path}, a directory without a config.json"]
    (tmp_path / "config.json").write_text("{}")
    (fault,) = model_preflight.faults_of(model(str(tmp_path)))
    assert fault == f"language_model.model: {tmp_path} holds neither model.safetensors nor pytorch_model.bin: it is not a saved model"
    assert model_preflight.faults_of(LanguageModelConfig(model=str(tmp_path), random_weights=True)) == []
    for wrong, there in ((tmp_path / "no", "which does not exist"), (tmp_path / "config.json", "a file, not a directory")):
        (fault,) = model_preflight.faults_of(model(str(wrong)))
        assert fault == f"language_model.model is {wrong}, {there}; give a model's directory, or its name on the hub"
    (fault,) = model_preflight.faults_of(model("a/b/c"))
    assert "neither a directory here nor a name on the hub" in fault


def test_weights_that_are_no_weights_are_named_with_what_they_are(tmp_path: Path) -> None:
    weights = tiny_gpt2(tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    assert model_preflight.faults_of(model(str(tmp_path))) == []
    for content, fault in (
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 512\n",
            "is a pointer of Git LFS, not the weights; run `git lfs",
        ),
        (whole[:-100], f"holds {len(whole) - 100:,} bytes, its header says {len(whole):,}; copy it again"),
        (whole + b"0", f"holds {len(whole) + 1:,} bytes, its header says {len(whole):,}; copy it again"),
        (whole[:100], "does not begin as a safetensors file does"),
        (b"", "is empty; copy it again"),
        (b"\x02\0\0\0\0\0\0\0{}", "holds no weights; save the model with save_pretrained"),
        (b"\xff" * 100, "does not begin as a safetensors file does"),
        (b"<html>404 not found</html>", "does not begin as a safetensors file does"),
        (b"\x02\0\0\0\0\0\0\0[]", "does not begin as a safetensors file does"),
    ):
        weights.write_bytes(content)
        (found,) = model_preflight.faults_of(model(str(tmp_path)))
        assert found.startswith(f"language_model.model: {weights} {fault}")


@pytest.mark.parametrize("place", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_offline_only_what_the_cache_holds_is_let_through(tmp_path: Path, place: str) -> None:
    cache = tmp_path / {"HF_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}[place]
    put_in_cache(cache, "models--gpt2", "abc123", branch="main")
    put_in_cache(cache, "models--EleutherAI--pythia-70m", "def456")
    offline = {place: str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert model_preflight.faults_of(model("gpt2"), offline) == []
    assert model_preflight.faults_of(model("EleutherAI/pythia-70m", "def456"), offline) == []
    for absent in (model("gpt3"), model("gpt2", "other"), model("EleutherAI/pythia-70m")):
        (fault,) = model_preflight.faults_of(absent, offline)
        assert f"language_model.model is {absent.model}, which is not in the local cache {cache}, and HF_HUB_OFFLINE forbids" in fault
        assert model_preflight.faults_of(absent, {place: str(tmp_path)}) == []


def test_what_a_job_will_download_is_said(tmp_path: Path) -> None:
    values = {"stage": "cache", "name": "x", "tokens": "/tokens", "output": "/acts", "layers": ["h.0"], "language_model": {"model": "gpt3"}}
    config = load.from_values(values, where="cache.yaml", site=Site())
    (notice,) = model_preflight.notices([config, config], {"HF_HUB_CACHE": str(tmp_path)})
    assert notice.startswith(f"language_model.model gpt3 is not in the local cache {tmp_path}: the job will download it")
    put_in_cache(tmp_path, "models--gpt3", "abc", branch="main")
    assert model_preflight.notices([config], {"HF_HUB_CACHE": str(tmp_path)}) == []


def test_the_preflight_of_a_stage_refuses_a_model_that_is_not_there(tmp_path: Path) -> None:
    for stage in (
        {"stage": "cache", "tokens": "/tokens", "output": str(tmp_path / "a"), "layers": ["h.0"], "language_model": {"model": "a/b/c"}},
        {"stage": "evaluate", "crosscoder": "/runs/train/x", "tokens": "/tokens", "language_model": {"model": "a/b/c"}},
    ):
        config = load.from_values({"name": "x", **stage}, where="x.yaml", site=Site())
        faults = input_preflight.faults_of(config, tmp_path)
        assert any("language_model.model is 'a/b/c', neither a directory here nor a name on the hub" in fault for fault in faults)


def test_a_tokenizer_is_looked_for_as_a_model_is(tmp_path: Path) -> None:
    def faults(name: str, **variables: str) -> list[str]:
        return model_preflight.tokenizer_faults(TokenizerConfig(name=name), variables)

    assert faults("demo") == []
    assert faults(str(tmp_path)) == [f"tokenizer.name is {tmp_path}, a directory without a tokenizer.json"]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert faults(str(tmp_path)) == faults(str(tmp_path / "tokenizer.json")) == []
    assert "which does not exist" in faults(str(tmp_path / "no"))[0]
    assert "neither a directory here nor a name on the hub" in faults("a/b/c")[0]
    put_in_cache(tmp_path, "models--gpt2", "abc", branch="main")
    (tmp_path / "models--gpt2/snapshots/abc/tokenizer.json").write_text("{}")
    offline = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert faults("gpt2", **offline) == faults("gpt22") == []
    assert faults("gpt22", **offline)[0].startswith("tokenizer.name is gpt22, which is not in the local cache")
    values = {"stage": "tokenize", "name": "x", "sources": ["/text"], "output": "/o"}
    for name, said in (("gpt22", ["tokenizer.name gpt22 is not in the local cache"]), ("gpt2", [])):
        config = load.from_values({**values, "tokenizer": {"name": name}}, where="tokenize.yaml", site=Site())
        assert [notice[: len(said[0])] for notice in model_preflight.notices([config], {"HF_HUB_CACHE": str(tmp_path)})] == said


def test_weights_that_cannot_be_meant_are_named_at_submission(tmp_path: Path) -> None:
    tiny_gpt2(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    first, second = (tmp_path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    save_file(weights, first)
    save_file({"lm_head.weight": weights["transformer.wte.weight"].to(torch.int8)}, second)
    file.unlink()
    index = {"weight_map": dict.fromkeys(weights, first.name) | {"lm_head.weight": second.name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (integers,) = model_preflight.faults_of(model(str(tmp_path)))
    assert integers.startswith(f"language_model.model: in {tmp_path} weights of the model are integers (lm_head.weight: int8)")
    save_file({"transformer.wte.weight": weights["transformer.wte.weight"]}, second)
    (twice,) = model_preflight.faults_of(model(str(tmp_path)))
    assert twice.startswith(f"language_model.model: {first} and {second.name} both hold transformer.wte.weight, and which of them counts")


@pytest.mark.parametrize("name", ["tokenizer.json", ""])
def test_a_tokenizer_whose_ids_are_drawn_at_random_is_refused_at_submission(tmp_path: Path, name: str) -> None:
    def faults() -> list[str]:
        return model_preflight.tokenizer_faults(TokenizerConfig(name=str(tmp_path / name)))

    for dropout, fault in (("null", []), ("0.0", []), ("0", []), ("0.1", ["has model.dropout 0.1, which drops merges at random"])):
        (tmp_path / "tokenizer.json").write_text('{"model": {"dropout" : ' + dropout + ', "vocab": {"dropout": 7}}}')
        assert [fault in found for found, fault in zip(faults(), fault, strict=True)] == [True] * len(fault)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"sp_model_kwargs": {"enable_sampling": true, "alpha": 0.1}}')
    assert [f"{tmp_path / 'tokenizer_config.json'} has sp_model_kwargs.enable_sampling" in found for found in faults()] == (
        [] if name else [True]
    )


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ({"model_type": "bert"}, "whose model_type is 'bert', an encoder, which sees the future; use a causal language model"),
        ({"model_type": "roberta", "is_decoder": False}, "whose model_type is 'roberta', an encoder, which sees the future"),
        ({"model_type": "distilbert", "is_decoder": True}, "whose model_type is 'distilbert', an encoder, which sees the future"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "whose model_type is 't5', an encoder with a decoder, no causal language model"),
        ({"model_type": "bert", "is_decoder": True}, None),
        ({"model_type": "bart", "is_encoder_decoder": True}, None),
        ({"model_type": "gpt2"}, None),
        ({"model_type": 7}, None),
    ],
)
def test_an_encoder_is_refused_by_its_config_in_a_directory_and_in_the_cache(tmp_path: Path, said: object, fault: str | None) -> None:
    put_in_cache(tmp_path, "models--some--model", "abc", branch="main")
    directory = tmp_path / "models--some--model/snapshots/abc"
    (directory / "config.json").write_text(json.dumps(said))
    for name in (str(directory), "some/model"):
        for random_weights in (False, True):
            config = LanguageModelConfig(model=name, random_weights=random_weights)
            found = model_preflight.faults_of(config, {"HF_HUB_CACHE": str(tmp_path)})
            assert [entry[: len(f"language_model.model is {name}, {fault}")] for entry in found] == (
                [f"language_model.model is {name}, {fault}"] if fault else []
            )


def test_no_kind_that_is_refused_by_its_name_is_a_causal_language_model_to_transformers() -> None:
    from transformers.models.auto import modeling_auto as known

    causal = set(known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert (model_kinds.ENCODERS | model_kinds.ENCODER_DECODERS).isdisjoint(causal)
    assert causal >= model_kinds.ENCODERS_UNLESS_DECODER


def test_a_model_in_the_cache_without_weights_is_refused_where_none_can_be_downloaded(tmp_path: Path) -> None:
    put_in_cache(tmp_path, "models--some--model", "abc", branch="main")
    (tmp_path / "models--some--model/snapshots/abc/pytorch_model.bin").unlink()
    online = {"HF_HUB_CACHE": str(tmp_path)}
    assert model_preflight.faults_of(model("some/model"), online) == []
    (fault,) = model_preflight.faults_of(model("some/model"), online | {"HF_HUB_OFFLINE": "1"})
    assert "holds neither model.safetensors nor pytorch_model.bin: it is not a saved model" in fault


def test_a_mistyped_path_is_not_taken_for_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mymodels/llama").mkdir(parents=True)
    variables = {"HF_HUB_CACHE": str(tmp_path / "cache")}
    said = "and the local cache of the hub has no such name"
    (fault,) = model_preflight.faults_of(model("mymodels/lama"), variables)
    assert fault == (
        f"language_model.model is mymodels/lama, but there is nothing at {tmp_path}/mymodels/lama, {said}; did you mean "
        "`mymodels/llama`? If it is a name on the hub, run `hf download mymodels/lama` first"
    )
    (fault,) = model_preflight.tokenizer_faults(TokenizerConfig(name="mymodels/x"), variables)
    assert fault.startswith(f"tokenizer.name is mymodels/x, but there is nothing at {tmp_path}/mymodels/x, {said}; give a path that is")
    assert model_preflight.faults_of(model("other/lama"), variables) == model_preflight.faults_of(model("lama"), variables) == []
    put_in_cache(tmp_path / "cache", "models--mymodels--lama", "abc", branch="main")
    assert model_preflight.faults_of(model("mymodels/lama"), variables) == []
