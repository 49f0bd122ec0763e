"""Files that are whole or not there, records as commit marks, and identity by content."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xxhash

from pipeline import records
from pipeline.config.errors import UserError


def make_set(directory: Path, contents: dict[str, bytes]) -> dict[str, Any]:
    shards = {}
    for stem, content in contents.items():
        with records.atomic_file(directory / f"{stem}.bin") as file:
            file.write(content)
        shards[stem] = records.commit_shard(
            directory, stem, "toy-shard/1", [f"{stem}.bin"], {"length": len(content)}, {"source": f"/from/{stem}"}
        )
    return records.write_manifest(directory, "toy-set/1", shards, {})


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"

    def fail_after(written: bytes) -> None:
        with records.atomic_file(path) as file:
            file.write(written)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_after(b"half")
    assert list(tmp_path.iterdir()) == []
    with records.atomic_file(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError):
        fail_after(b"new")
    assert path.read_bytes() == b"old"


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    program = (
        "import os, sys, signal; from pathlib import Path; from pipeline import records\n"
        "with records.atomic_file(Path(sys.argv[1])) as f:\n    f.write(b'new'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.glob(".x.bin.*.tmp"))) == 1
    records.remove_leftovers(tmp_path, "x")
    assert list(tmp_path.iterdir()) == []  # no record, so the data file is a leftover too


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(UserError, match=r"x\.bin could not be written: no space left on device; free some space"),
        records.atomic_file(path) as file,
    ):
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_data_id_is_of_the_content_not_of_names_order_or_provenance(tmp_path: Path) -> None:
    one = make_set(tmp_path / "one", {"a": b"first", "b": b"second"})
    two = make_set(tmp_path / "two", {"y": b"second", "x": b"first"})
    other = make_set(tmp_path / "other", {"a": b"first", "b": b"secone"})
    assert one["data_id"] == two["data_id"] != other["data_id"]


def test_the_hash_is_xxh3_of_the_bytes(tmp_path: Path) -> None:
    content = os.urandom(3 * records.CHUNK_BYTES + 17)
    (tmp_path / "x").write_bytes(content)
    assert records.hash_file(tmp_path / "x") == xxhash.xxh3_128_hexdigest(content)


def test_a_truncated_shard_is_named_when_read(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": b"first", "b": b"second"})
    os.truncate(tmp_path / "b.bin", 3)
    with pytest.raises(UserError, match=r"b\.bin holds 3 bytes, its record says 6 bytes: the shard is damaged; delete .*b\.json"):
        records.read_data_set(tmp_path, "toy-set/1", "toy-shard/1")
    (tmp_path / "b.bin").unlink()
    with pytest.raises(UserError, match=r"b\.bin is missing"):
        records.read_data_set(tmp_path, "toy-set/1", "toy-shard/1")


def test_verify_names_each_damaged_file_and_nothing_else(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": b"first", "b": b"second", "c": b"third"})
    assert records.verify(tmp_path) == []
    (tmp_path / "b.bin").write_bytes(b"secoNd")
    damages = records.verify(tmp_path)
    assert len(damages) == 1
    assert "b.bin does not have the bytes that were written" in damages[0]
    (tmp_path / "c.json").write_text("{")
    assert len(records.verify(tmp_path)) == 2


def test_a_changed_record_is_noticed(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": b"first"})
    record = records.read_json(tmp_path / "a.json")
    records.write_json(tmp_path / "a.json", records.with_checksum({**record, "length": 6}))
    with pytest.raises(UserError, match="a record was changed or replaced"):
        records.read_data_set(tmp_path, "toy-set/1", "toy-shard/1")
    assert "another data id" in records.verify(tmp_path)[0]


@pytest.mark.parametrize("name", ["a.json", "manifest.json"])
def test_no_damaged_byte_of_a_record_or_manifest_goes_unnoticed(tmp_path: Path, name: str) -> None:
    made = make_set(tmp_path, {"a": b"first"})
    path = tmp_path / name
    whole = path.read_bytes()
    provenance = whole.find(b'"provenance"'), whole.find(b'"checksum"')
    for place in range(len(whole)):
        if 0 <= provenance[0] <= place < provenance[1] or whole[place : place + 1].isspace():
            continue
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(UserError, match=rf"{name} (does not say what was written|is not valid JSON|is of format)"):
            records.read_data_set(tmp_path, "toy-set/1", "toy-shard/1")
    path.write_bytes(whole)
    assert records.read_data_set(tmp_path, "toy-set/1", "toy-shard/1")[0] == made


def test_a_claim_by_another_recipe_names_the_innermost_setting_that_differs(tmp_path: Path) -> None:
    records.claim(tmp_path / "set", {"stage": "cache", "settings": {"model": {"dtype": "float32", "seed": 1}, "width": 3}})
    with pytest.raises(UserError, match=r'settings\.model\.dtype was "float32", now it is "float16"; choose another output'):
        records.claim(tmp_path / "set", {"stage": "cache", "settings": {"model": {"dtype": "float16", "seed": 1}, "width": 3}})


def test_an_unfinished_or_foreign_set_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; run the stage that makes it"):
        records.read_manifest(tmp_path / "none")
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="not a finished data set"):
        records.read_manifest(tmp_path / "a")
    make_set(tmp_path / "b", {"a": b"first"})
    with pytest.raises(UserError, match="is of format 'toy-set/1', expected 'token-set/1'"):
        records.read_manifest(tmp_path / "b", "token-set/1")


def test_two_recipes_never_mix_in_one_directory(tmp_path: Path) -> None:
    records.claim(tmp_path / "x", {"stage": "toy", "settings": {"seed": 0}})
    records.claim(tmp_path / "x", {"stage": "toy", "settings": {"seed": 0}})
    with pytest.raises(UserError, match=r"made with other settings: settings\.seed was 0, now it is 1; choose another output"):
        records.claim(tmp_path / "x", {"stage": "toy", "settings": {"seed": 1}})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="was not made by this pipeline"):
        records.claim(tmp_path / "foreign", {"stage": "toy"})


def test_measured_inputs_are_what_the_first_to_claim_a_directory_found(tmp_path: Path) -> None:
    recipe = {"stage": "toy", "settings": {"seed": 0}, "inputs": {"tokens": "a"}}
    assert records.claim(tmp_path / "x", recipe, measured={"norms": [1.5, 2.0]}) == {"norms": [1.5, 2.0]}
    assert records.claim(tmp_path / "x", recipe, measured={"norms": [1.6, 2.0]}) == {"norms": [1.5, 2.0]}
    assert records.read_recipe(tmp_path / "x")["inputs"] == {"tokens": "a", "norms": [1.5, 2.0]}
    for other in ({}, {"limits": [1.5]}):
        with pytest.raises(UserError, match=r"made with other settings: inputs\.(norms|limits) was"):
            records.claim(tmp_path / "x", recipe, measured=other)


def test_every_changed_bit_of_a_recipe_is_named_and_one_of_version_0_1_is_read(tmp_path: Path) -> None:
    recipe = {"stage": "toy", "settings": {"seed": 0}, "inputs": {}}
    records.claim(tmp_path, recipe)
    make_set(tmp_path, {"a": b"first"})
    path = tmp_path / "recipe.json"
    written = path.read_bytes()
    assert (records.read_recipe(tmp_path), records.verify(tmp_path)) == (recipe, [])
    for place in range(len(written)):
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        assert written[place : place + 1].isspace() or [damage.startswith(f"{path} ") for damage in records.verify(tmp_path)] == [True]
    path.write_bytes(written.replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(UserError, match=r"recipe\.json .*damaged; restore it, or delete the directory to make it anew"):
        records.claim(tmp_path, recipe)
    records.write_json(path, recipe)
    records.claim(tmp_path, recipe)
    assert records.verify(tmp_path) == []
