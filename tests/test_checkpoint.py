"""Checkpoints: whole or not there, damage found, and the same crosscoder back."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from toy_activations import MemorySource, random_activations, train_config

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.crosscoder import checkpoint_files
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.crosscoder.trainer import Trainer
from pipeline.run import Run

CPU = torch.device("cpu")


def trainer(directory: Path, variant: str = "batch_topk", **changes: Any) -> Trainer:
    return Trainer(train_config(variant, **changes), MemorySource(random_activations(300)), Run(directory, stage="train"), CPU)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run; read only."""
    directory = tmp_path_factory.mktemp("trained")
    trainer(directory).train()
    return directory


def copy_of(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def flip_a_bit(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)


def test_the_newest_checkpoints_are_kept(trained: Path) -> None:
    # Due after 160 tokens or the next step's end: steps 5, 11, 16, 21, 27, 32 with short batches; the end is step 34.
    assert [path.name for path in checkpoint_files.all_in(trained / "checkpoints")] == ["00000027", "00000032", "00000034"]


def test_a_loaded_crosscoder_is_the_one_that_was_trained(tmp_path: Path) -> None:
    course = trainer(tmp_path)
    course.train()
    loaded = load_crosscoder(tmp_path)
    for name, tensor in course.state.crosscoder.state_dict().items():
        assert torch.equal(loaded.crosscoder.state_dict()[name], tensor), name
    raw_BLD = random_activations(20)
    with torch.no_grad():
        acts_BLD = course.state.normalizer.normalize(raw_BLD)
        features_BF = course.state.crosscoder.encode(acts_BLD)
        decoded_BLD = course.state.normalizer.denormalize(course.state.crosscoder.decode(features_BF))
    assert torch.equal(loaded.encode(raw_BLD), features_BF)
    assert torch.equal(loaded.decode(features_BF), decoded_BLD)
    assert torch.equal(loaded.dead_F, course.state.tokens_since_fired_F >= 64)
    assert not any(p.requires_grad for p in loaded.crosscoder.parameters())


def test_as_trained_k_fire_a_position_and_at_inference_a_position_does_not_depend_on_the_batch(trained: Path) -> None:
    loaded, raw_BLD = load_crosscoder(trained), random_activations(50)
    assert (loaded.encode(raw_BLD, as_trained=True) > 0).sum().item() == 2 * 50
    whole_BF = loaded.encode(raw_BLD)
    torch.testing.assert_close(torch.cat([loaded.encode(part_BLD) for part_BLD in raw_BLD.split(7)]), whole_BF)
    assert 1.0 < (whole_BF > 0).sum().item() / 50 < 3.0


def test_run_and_checkpoint_name_the_same_crosscoder_and_another_checkpoint_another(trained: Path, tmp_path: Path) -> None:
    newest = trained / "checkpoints" / "00000034"
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(newest, elsewhere)
    assert load_crosscoder(trained).identity == load_crosscoder(newest).identity == load_crosscoder(elsewhere).identity
    assert load_crosscoder(trained / "checkpoints" / "00000032").identity != load_crosscoder(trained).identity


def test_a_checkpoint_is_a_data_set_that_verify_can_rehash(trained: Path, tmp_path: Path) -> None:
    checkpoint = copy_of(trained, tmp_path) / "checkpoints" / "00000034"
    assert records.verify(checkpoint) == []
    flip_a_bit(checkpoint / "training.safetensors")
    (damage,) = records.verify(checkpoint)
    assert "training.safetensors does not have the bytes that were written" in damage


@pytest.mark.parametrize("file", ["crosscoder.safetensors", "training.safetensors"])
def test_a_damaged_checkpoint_is_left_out_and_the_run_ends_with_the_same_bytes(
    file: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copy_of(trained, tmp_path)
    newest = directory / "checkpoints" / "00000034"
    whole = {path.name: path.read_bytes() for path in newest.iterdir()}
    flip_a_bit(newest / file)
    trainer(directory).train()
    said = capsys.readouterr().out
    assert f"checkpoint {newest} is damaged, the one before it is used" in said
    assert "resuming at step 32 of 34" in said
    assert {path.name: path.read_bytes() for path in newest.iterdir()} == whole


@pytest.mark.parametrize("file", ["crosscoder.safetensors", "crosscoder.json", "manifest.json"])
def test_a_truncated_file_is_damage_too(file: str, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = copy_of(trained, tmp_path)
    path = directory / "checkpoints" / "00000034" / file
    path.write_bytes(path.read_bytes()[:-10])
    assert load_crosscoder(directory).step == 32
    assert "00000034 is damaged" in caplog.text


def test_loading_a_damaged_checkpoint_by_name_is_refused(trained: Path, tmp_path: Path) -> None:
    checkpoint = copy_of(trained, tmp_path) / "checkpoints" / "00000034"
    flip_a_bit(checkpoint / "crosscoder.safetensors")
    with pytest.raises(UserError, match=r"crosscoder\.safetensors does not have the bytes that were written"):
        load_crosscoder(checkpoint)


@pytest.mark.parametrize(("place", "state"), [("nowhere", "does not exist"), (".", "holds no whole checkpoint")])
def test_a_place_without_a_crosscoder_is_refused(place: str, state: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{state}; name the directory of a training run"):
        load_crosscoder(tmp_path / place)


def full_disk(kind: str) -> Exception:
    if kind == "safetensors":
        return safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", ["safetensors", "system"])
def test_a_full_disk_stops_with_a_sentence_and_loses_no_checkpoint(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = safetensors.torch.save_file, []

    def save_until_full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 4:  # the second file of the second checkpoint
            raise full_disk(kind)
        save(*arguments)

    monkeypatch.setattr(safetensors.torch, "save_file", save_until_full)
    with pytest.raises(UserError, match=r"00000011 could not be written: the disk is full; free some space"):
        trainer(tmp_path).train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000005"]
    assert load_crosscoder(tmp_path).step == 5
    monkeypatch.undo()
    assert trainer(tmp_path).train()["steps"] == 34


def test_a_disk_that_fills_up_with_metrics_stops_with_a_sentence_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_metrics = Run.log_metrics

    def log_until_full(run: Run, row: dict[str, Any]) -> None:
        if row["step"] == 8:
            raise full_disk("system")
        log_metrics(run, row)

    monkeypatch.setattr(Run, "log_metrics", log_until_full)
    with pytest.raises(UserError, match=r"the disk is full; free some space .* goes on from .*00000005"):
        trainer(tmp_path).train()


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_nothing_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("00000001", "00000002"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "manifest.json").write_text("{}")
        (tmp_path / step / "weights").write_text("many")

    def die_after_the_manifest(path: Path) -> None:
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die_after_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_files.remove_old(tmp_path, keep=1)
    monkeypatch.undo()
    checkpoint_files.remove_old(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["00000002"]


def test_other_errors_while_saving_are_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(PermissionError):
        trainer(tmp_path).train()


def test_the_records_say_what_the_state_is(trained: Path) -> None:
    checkpoint = trained / "checkpoints" / "00000032"
    training = json.loads((checkpoint / "training.json").read_text())
    # 300 positions an epoch in batches of 32 are 10 steps: step 32 ends the second batch of the fourth epoch.
    assert {key: training[key] for key in ("step", "tokens", "epoch", "cursor")} == {"step": 32, "tokens": 964, "epoch": 3, "cursor": 64}
    assert json.loads((checkpoint / "manifest.json").read_text())["step"] == 32
