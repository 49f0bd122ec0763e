"""What is refused on the login node, before anything is queued: shapes that don't fit and disks that are too small."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import tiny_architectures
from tiny_models import tiny_gpt2, tiny_token_set

from pipeline import records
from pipeline.config import load
from pipeline.config.cache_activations import CacheConfig
from pipeline.config.errors import UserError
from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.site_file import Site
from pipeline.config.stage import StageConfig
from pipeline.language_model import LanguageModel
from pipeline.tokens import write_token_set
from slurm.submission import input_preflight

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    """A token set and a model of 3 blocks of width 16 that reads 64 tokens of a vocabulary of 300."""
    tiny_token_set(tmp_path / "tokens")
    return {"tokens": str(tmp_path / "tokens"), "language_model": {"model": str(tiny_gpt2(tmp_path / "model"))}, "context_tokens": 32}


def cache(inputs: dict[str, Any], **changes: object) -> StageConfig:
    values = {
        "stage": "cache",
        "name": "x",
        "output": "/nowhere/acts",
        "layers": ["transformer.h.0", "transformer.h.2"],
        **inputs,
        **changes,
    }
    return load.from_values(values, where="cache.yaml", site=Site())


def test_what_fits_is_let_through(inputs: dict[str, Any], tmp_path: Path) -> None:
    input_preflight.check([("cache.yaml", cache(inputs))], tmp_path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"layers": ["transformer.h.0", "transformer.h.3"]},
            "layers[1] is transformer.h.3, but {model} has blocks 0 to 2; use a smaller number",
        ),
        ({"context_tokens": 65}, "context_tokens is 65, but {model} reads at most 64 tokens; use a smaller number"),
    ],
)
def test_what_the_model_cannot_do_is_said_with_the_file(
    inputs: dict[str, Any], tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    with pytest.raises(UserError) as error:
        input_preflight.check([("cache.yaml", cache(inputs, **changes))], tmp_path)
    assert str(error.value) == "cache.yaml: " + fault.format(model=inputs["language_model"]["model"])


@pytest.mark.parametrize(
    ("chat", "changes", "faults"),
    [
        ({}, {}, []),
        (
            {},
            {"layers": ["base/transformer.h.0", "chat/transformer.h.3"]},
            ["layers[1] is chat/transformer.h.3, but {chat} has blocks 0 to 2"],
        ),
        ({"d_model": 32}, {}, ["language_models have width 16 (base), 32 (chat), but sites of a crosscoder have one width"]),
        ({"vocab_size": 310}, {}, ["language_models have numbers of embeddings 300 (base), 310 (chat), but all read the same ids"]),
    ],
)
def test_of_several_models_each_is_looked_at_and_all_together(
    inputs: dict[str, Any], tmp_path: Path, chat: dict[str, int], changes: dict[str, Any], faults: list[str]
) -> None:
    models = {"base": inputs.pop("language_model"), "chat": {"model": str(tiny_gpt2(tmp_path / "chat", **chat))}}
    settings = {"language_models": models, "layers": ["base/transformer.h.0", "chat/transformer.h.2"], **changes}
    found = input_preflight.faults_of(cache(inputs, **settings), tmp_path)
    assert len(found) == len(faults)
    for sentence, fault in zip(found, faults, strict=True):
        assert sentence.startswith(fault.format(chat=models["chat"]["model"]))


def test_a_model_that_cannot_be_loaded_is_named_by_its_setting(inputs: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    models = {"base": inputs.pop("language_model"), "chat": {"model": str(tmp_path / "chat")}}
    settings = {"language_models": models, "layers": ["base/transformer.h.0", "chat/transformer.h.2"]}
    (fault,) = input_preflight.faults_of(cache(inputs, **settings), tmp_path)
    assert fault == f"language_models.chat.model is {tmp_path / 'chat'}, a directory without a config.json"


def test_the_disk_that_a_cache_needs_is_positions_times_layers_times_width_times_bytes(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cache(inputs)
    assert isinstance(config, CacheConfig)
    tokens = records.read_manifest(tmp_path / "tokens")
    ids = tokens["tokens"] + tokens["documents"]
    positions = input_preflight.cached_positions(config, tokens)
    assert positions == ids - -(-ids // 32)
    needed = positions * (2 * 16 * 4 + 4 + 2 + 2) + input_preflight.SPARE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed))
    assert input_preflight.faults_of(config, tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed - 1))
    (fault,) = input_preflight.faults_of(config, tmp_path)
    assert f"{positions:,} positions of 2 layers of width 16 in float32" in fault
    assert "activations.kind=stream" in fault


def test_with_beginning_of_text_every_id_is_a_position(inputs: dict[str, Any], tmp_path: Path) -> None:
    facts = {"beginning_of_text_id": 5, "adds_beginning_of_text": True}
    tokens = records.read_manifest(tmp_path / "tokens") | facts
    ids = tokens["tokens"] + tokens["documents"]
    for changes, wanted in (({}, ids), ({"drop_positions": []}, ids), ({"drop_positions": [0, 1]}, ids - -(-ids // 31))):
        config = cache(inputs, **changes)
        assert isinstance(config, CacheConfig)
        assert input_preflight.cached_positions(config, tokens) == wanted


def test_beginning_of_text_that_nobody_knows_is_refused_before_the_job(inputs: dict[str, Any], tmp_path: Path) -> None:
    (fault,) = input_preflight.faults_of(cache(inputs, beginning_of_text=True), tmp_path)
    assert "names no such token: it was made before that was recorded; set it to auto or false" in fault
    run = tmp_path / "run"
    trained = {"layers": ["transformer.h.0"], "tokenizer_hash": "", "beginning_of_text_id": 5}
    records.write_json(run / "checkpoints/00000010/crosscoder.json", trained)
    values = {"stage": "evaluate", "name": "x", "crosscoder": str(run), **inputs}
    assert input_preflight.faults_of(load.from_values(values, where="evaluate.yaml", site=Site()), tmp_path) == []
    config = load.from_values(values | {"beginning_of_text": False}, where="evaluate.yaml", site=Site())
    (fault,) = input_preflight.faults_of(config, tmp_path)
    assert fault == "beginning_of_text is false, but contexts of the training begin so; set it to auto"


def test_an_excluded_id_that_the_model_does_not_have_is_refused_before_the_job(inputs: dict[str, Any], tmp_path: Path) -> None:
    assert input_preflight.faults_of(cache(inputs, exclude_token_ids=[0, 299]), tmp_path) == []
    (fault,) = input_preflight.faults_of(cache(inputs, exclude_token_ids=[0, 300]), tmp_path)
    assert fault.startswith("exclude_token_ids names 300, but ")
    assert fault.endswith("has the ids 0 to 299; correct it or leave it out")


def test_a_vocabulary_beyond_the_embeddings_is_let_through_if_no_id_is(inputs: dict[str, Any], tmp_path: Path) -> None:
    write_token_set(tmp_path / "fits", {"a": [[1, 299]]}, vocab_size=400, end_of_text_id=0)
    write_token_set(tmp_path / "beyond", {"a": [[1], [300]]}, vocab_size=400, end_of_text_id=0)
    write_token_set(tmp_path / "end", {"a": [[1]]}, vocab_size=400, end_of_text_id=350, facts={"end_of_text": "END"})
    found = {}
    for name in ("fits", "beyond", "end"):
        found[name] = input_preflight.faults_of(cache(inputs | {"tokens": str(tmp_path / name)}), tmp_path)
    assert found["fits"] == []
    assert "tokens holds id 300, but" in found["beyond"][0]
    assert "tokens has id 350 (END) as its end of text, but" in found["end"][0]
    assert "tokenizer.end_of_text" in found["end"][0]


def test_a_cache_that_takes_some_positions_needs_only_theirs(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = cache(inputs, max_tokens=100)
    assert isinstance(config, CacheConfig)
    assert input_preflight.cached_positions(config, records.read_manifest(tmp_path / "tokens")) == 100


def test_checkpoints_have_to_fit_on_the_disk_of_runs(inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    activations = {"kind": "stream", "layers": ["transformer.h.0"], **inputs}
    crosscoder = {"num_features": 1000, "activation_function": {"kind": "relu"}}
    loss: dict[str, Any] = {}
    values = {"stage": "train", "name": "x", "activations": activations, "crosscoder": crosscoder, "loss": loss, "epochs": 1}
    config = load.from_values(values, where="train.yaml", site=Site())
    needed = 3 * 12 * (2 * 16 * 1000 + 1000 + 16) + input_preflight.SPARE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed))
    assert input_preflight.faults_of(config, tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed - 1))
    (fault,) = input_preflight.faults_of(config, tmp_path)
    assert "3 checkpoints of 1,000 features, 1 layers of width 16" in fault
    history = {"kind": "every_tokens", "tokens": 300}
    longer = values | {"epochs": None, "num_tokens": 1000, "checkpoints": {"history": history}}
    config = load.from_values(longer, where="train.yaml", site=Site())
    # Snapshots at 300, 600, 900 and 1,000 tokens hold the weights alone.
    snapshots = 4 * 4 * (2 * 16 * 1000 + 1000 + 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed + snapshots))
    assert input_preflight.faults_of(config, tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed + snapshots - 1))
    (fault,) = input_preflight.faults_of(config, tmp_path)
    assert "3 checkpoints and 4 snapshots of 1,000 features, 1 layers of width 16" in fault


def test_a_crosscoder_of_another_model_or_tokenizer_is_not_evaluated(inputs: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    records.write_json(run / "checkpoints/00000010/crosscoder.json", {"layers": ["transformer.h.7"], "tokenizer_hash": "0123456789abcdef"})
    config = load.from_values({"stage": "evaluate", "name": "x", "crosscoder": str(run), **inputs}, where="evaluate.yaml", site=Site())
    layer, tokenizer = input_preflight.faults_of(config, tmp_path)
    assert layer.startswith("crosscoder reads transformer.h.7, but")
    assert "by 0123456789ab; tokenize the held-out text with the same tokenizer" in tokenizer


def test_what_is_not_there_yet_is_left_to_the_stage(inputs: dict[str, Any], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "tokens")
    input_preflight.check([("cache.yaml", cache(inputs | {"language_model": {"model": "gpt2"}}, context_tokens=60_000))], tmp_path)


def test_what_an_earlier_run_of_the_chain_will_replace_is_not_looked_at(inputs: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "runs/train/x/20261123-091530-k3f9"
    records.write_json(run / "checkpoints/00000010/crosscoder.json", {"layers": ["transformer.h.7"], "tokenizer_hash": ""})
    values = {"stage": "evaluate", "name": "x", "crosscoder": str(tmp_path / "runs/train/x"), **inputs}
    evaluate = load.from_values(values, where="evaluate.yaml", site=Site())
    assert input_preflight.faults_of(evaluate, tmp_path / "runs")
    assert input_preflight.faults_of(evaluate, tmp_path / "runs", [tmp_path / "runs/train/x"]) == []


def test_a_data_set_of_another_kind_is_refused_with_both_names(inputs: dict[str, Any], tmp_path: Path) -> None:
    values = {
        "stage": "train",
        "name": "x",
        "activations": {"kind": "disk", "path": inputs["tokens"]},
        "crosscoder": {"num_features": 8, "activation_function": {"kind": "relu"}},
        "loss": {},
        "epochs": 1,
    }
    config = load.from_values(values, where="train.yaml", site=Site())
    with pytest.raises(UserError, match="is of format 'token-set/1', expected 'activation-set'"):
        input_preflight.check([("train.yaml", config)], tmp_path)


@pytest.mark.parametrize("kind", ["MPT", "CodeGen", "RWKV", "XGLM", "OPT (350M's form)", "BLOOM", "Mamba", "Gemma 3 (text and pictures)"])
def test_the_login_node_takes_the_same_limits_from_a_config_as_the_job(tmp_path: Path, kind: str) -> None:
    config = LanguageModelConfig(model=str(tiny_architectures.save(kind, tmp_path)), device="cpu")
    seen, loaded = input_preflight.model_shape(config), LanguageModel.load(config)
    assert (seen.num_blocks, seen.d_model, seen.max_context) == (len(loaded.block_names), loaded.d_model, loaded.max_context)
