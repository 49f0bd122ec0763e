"""`crosscoder clean` deletes what no run needs, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from toy_project import ToyProject

from slurm.record.known_hashes import KnownHashes
from slurm.submission import cleaning


def files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_frozen_files_go_with_the_last_run_that_has_them(tmp_path: Path) -> None:
    project = ToyProject(tmp_path)
    assert project.crosscoder("submit", project.config("one"), "--executor", "debug").returncode == 0
    kept = files(project.runs / ".code")
    (project.root / "notes.txt").write_text("of the second run alone")
    assert project.crosscoder("submit", project.config("two"), "--executor", "debug").returncode == 0
    shutil.rmtree(project.runs / "toy/two")
    said = project.crosscoder("clean", "--dry-run").stdout
    (row, *more) = json.loads(project.crosscoder("clean", "--dry-run", "--json").stdout)
    texts = {Path(entry["path"]).read_text() for entry in (row, *more)}
    assert "of the second run alone" in texts
    sizes = sum(entry["bytes"] for entry in (row, *more))
    assert said == f"would delete {1 + len(more)} files that no run under {project.runs} needs, {sizes} bytes\n"
    assert project.crosscoder("clean").stdout == said.replace("would delete", "deleted")
    assert files(project.runs / ".code") == kept
    assert project.crosscoder("clean").stdout == f"deleted 0 files that no run under {project.runs} needs, 0 bytes\n"
    assert project.crosscoder("verify", "toy/one").stdout.startswith("whole: ")
    shutil.rmtree(project.runs / "toy")
    project.crosscoder("clean")
    assert list((project.runs / ".code").iterdir()) == []


def test_hashes_of_files_that_are_gone_go_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.record.known_hashes.SMALLEST_BYTES", 1)
    monkeypatch.setattr("slurm.record.known_hashes.SETTLED_SECONDS", -1.0)
    hashes = KnownHashes(tmp_path)
    for name in ("here", "gone"):
        (tmp_path / name).write_bytes(b"weights")
        hashes.hash_file(tmp_path / name)
    assert cleaning.leftovers(tmp_path) == []
    (tmp_path / "gone").unlink()
    (leftover,) = cleaning.leftovers(tmp_path)
    assert json.loads(leftover.path.read_text())["path"] == str(tmp_path / "gone")
    cleaning.delete([leftover])
    assert (len(list((tmp_path / ".hashes").iterdir())), cleaning.leftovers(tmp_path)) == (1, [])
