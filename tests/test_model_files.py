"""The files of language models and tokenizers: which decide, where they lie, and what their hashes say."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import xxhash
from model_copies import copy_of_model, put_on_hub
from tiny_models import tiny_gpt2, tiny_tokenizer

from pipeline import model_files
from pipeline.config.errors import UserError
from pipeline.config.language_model import LanguageModelConfig
from pipeline.language_model import LanguageModel
from pipeline.run import Run
from slurm.record import known_hashes
from slurm.record.known_hashes import KnownHashes

# -- language models --------------------------------------------------------------------------------------------------


def test_the_hash_of_a_model_is_the_one_that_activation_sets_and_checkpoints_carry(tmp_path: Path) -> None:
    record = model_files.language_model_record(model_files.DEMO_MODEL)
    assert record["data_id"] == "982826e172b51ae43a4ac08dd62558b7fd41895c336a9a2cf4375bcb64738635"
    copy_of_model(tmp_path, b"weights", transformers_version="5", _name_or_path="x", dtype="float32", architectures=["A"])
    meaning = json.dumps({"model_type": "gpt2", "n_layer": 2})
    expected = hashlib.sha256(f"{xxhash.xxh3_128_hexdigest(b'weights')}\n{meaning}".encode()).hexdigest()
    assert model_files.language_model_record(tmp_path)["data_id"] == expected


def test_the_record_is_of_what_the_loaded_model_says_it_is_of(tmp_path: Path) -> None:
    tiny_gpt2(tmp_path)
    model = LanguageModel.load(LanguageModelConfig(model=str(tmp_path), device="cpu"))
    record = model_files.language_model_record(tmp_path)
    assert (model.hash, model.files) == (record["data_id"], record["files"])
    drawn = LanguageModel.load(LanguageModelConfig(model=str(tmp_path), device="cpu", random_weights=True))
    assert drawn.files == model_files.language_model_record(tmp_path, random_weights=True)["files"]


def test_where_and_by_what_a_config_was_saved_does_not_matter_and_what_it_says_does(tmp_path: Path) -> None:
    record = model_files.language_model_record(copy_of_model(tmp_path))
    copy_of_model(tmp_path, transformers_version="6", _name_or_path="/elsewhere")
    assert model_files.language_model_record(tmp_path) == record
    copy_of_model(tmp_path, n_layer=3)
    assert model_files.changed_files(record, model_files.language_model_record(tmp_path)) == ["config.json was changed"]


@pytest.mark.parametrize("present", [[0, 1, 2], [1, 2], [2, 3], [3]])
def test_the_weights_are_those_that_transformers_loads(present: list[int], tmp_path: Path) -> None:
    """Each of the files in which weights may be, with weights of its own."""
    names = ["model.safetensors", "a.safetensors", "pytorch_model.bin", "a.bin"]
    weights = []
    for number, name in enumerate(names):
        saved = safetensors.torch.load_file(tiny_gpt2(tmp_path / str(number), seed=number) / "model.safetensors")
        weights.append(saved["transformer.wte.weight"])
        if number not in present:
            continue
        if name.endswith(".bin"):
            torch.save(saved, tmp_path / name)
        else:
            safetensors.torch.save_file(saved, tmp_path / name, metadata={"format": "pt"})
        if name.startswith("a."):
            index = "model.safetensors.index.json" if number == 1 else "pytorch_model.bin.index.json"
            (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(saved, name)}))
    (tmp_path / "config.json").write_bytes((tmp_path / "0/config.json").read_bytes())
    model = LanguageModel.load(LanguageModelConfig(model=str(tmp_path), device="cpu"))
    assert model.model.get_input_embeddings().weight.equal(weights[present[0]])
    assert model.files is not None
    assert [name for name in model.files if name != "config.json"] == [names[present[0]]]


def test_a_config_that_names_its_weights_is_heeded(tmp_path: Path) -> None:
    copy_of_model(tmp_path, transformers_weights="own.safetensors")
    (tmp_path / "own.safetensors").write_bytes(b"own")
    assert "own.safetensors" in model_files.language_model_record(tmp_path)["files"]


def test_a_model_that_is_not_whole_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor pytorch_model\.bin: it is not a saved model"):
        model_files.language_model_record(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "1.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks 1\.safetensors, which model\.safetensors\.index\.json names: the model is not whole"):
        model_files.language_model_record(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": [1]}}', '{"weight_map": {"x": 1}}'])
def test_a_config_or_an_index_of_another_form_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    for record in (model_files.language_model_record, model_files.tokenizer_record):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match=r"config\.json holds a list, expected a JSON object: it is not a model's"):
            record(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json has no `weight_map` that names files: it is damaged; copy it again"):
        model_files.language_model_record(tmp_path)


def test_of_weights_that_are_drawn_only_the_architecture_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"n_layer": 2}')
    record = model_files.language_model_record(tmp_path, random_weights=True)
    assert list(record["files"]) == ["config.json"]
    assert "data_id" not in record


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_every_file_that_makes_a_tokenizer_counts_and_no_other(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    before = model_files.tokenizer_record(tmp_path)
    (tmp_path / "README.md").write_text("said")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 3}))
    assert model_files.tokenizer_record(tmp_path) == before
    names = ("special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.json", "vocab.txt", "tokenizer.model", "qwen.tiktoken")
    for name in names:
        (tmp_path / name).write_text("x")
        now = model_files.tokenizer_record(tmp_path)
        assert model_files.changed_files(before, now) == [f"{name} was added"]
        assert model_files.changed_files(now, before) == [f"{name} is missing"]
        (tmp_path / name).unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert model_files.changed_files(before, model_files.tokenizer_record(tmp_path)) == ["config.json was changed"]


def test_a_tokenizer_may_be_one_file_and_a_directory_without_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text("{}")
    assert list(model_files.tokenizer_record(tmp_path / "own.json")["files"]) == ["own.json"]
    for wrong in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match=f"{wrong} holds no tokenizer.json, nor anything else that makes a tokenizer"):
            model_files.tokenizer_record(wrong)


# -- the hub's cache --------------------------------------------------------------------------------------------------


def test_a_revision_is_the_commit_that_the_cache_knows_it_as(tmp_path: Path) -> None:
    cache = {"HF_HUB_CACHE": str(tmp_path)}
    old, new = (put_on_hub(tmp_path, "meta/llama", commit) for commit in ("a" * 40, "b" * 40))
    put_on_hub(tmp_path, "meta/llama", "a" * 40, branch="v1")
    for revision, found in ((None, new), ("main", new), ("v1", old), ("a" * 40, old)):
        assert model_files.find("meta/llama", revision, cache) == (found, found.name)
    assert model_files.find("meta/llama", "v2", cache) is None
    assert model_files.find("meta/other", None, cache) is None
    assert model_files.find("/models/llama", None, cache) == (Path("/models/llama"), None)
    assert model_files.find("demo", None, cache) == (model_files.DEMO_MODEL, None)


# -- hashes that are known already ------------------------------------------------------------------------------------


def large_file(path: Path, content: bytes = b"x") -> Path:
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(known_hashes.SMALLEST_BYTES)
    return path


@pytest.fixture
def count_hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    hashed: list[Path] = []
    true_hash = known_hashes.records.hash_file
    monkeypatch.setattr(known_hashes.records, "hash_file", lambda path: [hashed.append(path), true_hash(path)][1])
    monkeypatch.setattr(known_hashes, "SETTLED_SECONDS", -1.0)
    return hashed


def test_a_file_that_stayed_as_it_is_is_hashed_once_by_all_processes(tmp_path: Path, count_hashed: list[Path]) -> None:
    weights = large_file(tmp_path / "model.safetensors")
    found = {KnownHashes(tmp_path / "runs").hash_file(weights) for _ in range(3)}
    assert len(found) == len(count_hashed) == 1


def test_a_file_that_was_touched_in_any_way_is_hashed_again(tmp_path: Path, count_hashed: list[Path]) -> None:
    weights, known = large_file(tmp_path / "model.safetensors"), KnownHashes(tmp_path / "runs")
    first, status = known.hash_file(weights), weights.stat()
    with open(weights, "r+b") as file:
        file.write(b"y")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # as rsync and cp -p leave it
    second = known.hash_file(weights)
    os.replace(large_file(tmp_path / "other", b"z"), weights)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len({first, second, known.hash_file(weights)}) == len(count_hashed) == 3


def test_a_file_that_changed_just_now_is_not_taken_as_known(
    tmp_path: Path, count_hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_hashes, "SETTLED_SECONDS", 1000.0)
    weights, known = large_file(tmp_path / "model.safetensors"), KnownHashes(tmp_path / "runs")
    assert known.hash_file(weights) == known.hash_file(weights)
    assert len(count_hashed) == 2


def test_a_memory_that_cannot_be_kept_or_read_costs_a_hashing_and_nothing_else(tmp_path: Path, count_hashed: list[Path]) -> None:
    weights, known = large_file(tmp_path / "model.safetensors"), KnownHashes(tmp_path / "runs")
    first = known.hash_file(weights)
    (entry,) = (tmp_path / "runs/.hashes").iterdir()
    for damage in ("", "[]", '{"stamp": 1'):
        entry.write_text(damage)
        assert known.hash_file(weights) == first
    (tmp_path / "file").write_text("")
    assert KnownHashes(tmp_path / "file").hash_file(weights) == first


# -- binding ----------------------------------------------------------------------------------------------------------


def test_what_a_stage_loaded_is_held_against_what_was_frozen_and_the_file_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    (tmp_path / "run/inputs.json").write_text(
        json.dumps({"tokenizer": {"name": "/t", "kind": "tokenizer", "files": {"tokenizer.json": "a"}}})
    )
    run.bind_input("tokenizer", "of what it does", {"tokenizer.json": "a"})
    with pytest.raises(UserError, match=r"input tokenizer \(/t\) is not what this run began with: tokenizer.json was changed; put back"):
        run.bind_input("tokenizer", "of what it does", {"tokenizer.json": "b"})
    with pytest.raises(UserError, match="input tokenizer is of something, but this run began with of what it d"):
        run.bind_input("tokenizer", "of something else", {"tokenizer.json": "a"})


def test_tasks_that_divide_a_run_all_read_what_the_first_of_them_bound(tmp_path: Path) -> None:
    tasks = [Run(tmp_path / f"tasks/{task}", task=task, num_tasks=3, shared=tmp_path) for task in range(3)]
    tasks[1].bind_input("language_model", "one", {"model.safetensors": "a"})
    tasks[0].bind_input("language_model", "one", {"model.safetensors": "a"})
    with pytest.raises(UserError, match=r"model\.safetensors was changed"):
        tasks[2].bind_input("language_model", "other", {"model.safetensors": "b"})
