import os
import subprocess
from pathlib import Path

import pytest

from pipeline.config.errors import UserError
from slurm.record import snapshot


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name, text in {"pipeline/run.py": "one\n", "slurm/x.py": "two\n", ".gitignore": "data/\n*.log\n", "tool.sh": "#!/bin/sh\n"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "tool.sh").chmod(0o755)
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "first")
    return root


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True).stdout


def frozen_files(run: Path) -> set[str]:
    return {str(path.relative_to(run / "code")) for path in (run / "code").rglob("*") if path.is_file()}


def test_the_tree_is_frozen_as_it_is_with_edits_and_untracked_files_but_not_ignored_or_large_ones(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "LARGE_BYTES", 100)
    (checkout / "pipeline/run.py").write_text("edited\n")
    (checkout / "new.py").write_text("new\n")
    (checkout / "a.log").write_text("log\n")
    (checkout / "big.bin").write_bytes(bytes(101))
    (checkout / "slurm/x.py").unlink()
    record = snapshot.freeze(checkout, tmp_path / "run", tmp_path / "store")
    assert frozen_files(tmp_path / "run") == {"pipeline/run.py", "new.py", ".gitignore", "tool.sh"}
    assert (tmp_path / "run/code/pipeline/run.py").read_text() == "edited\n"
    assert os.access(tmp_path / "run/code/tool.sh", os.X_OK)
    assert record["left_out"] == {"big.bin": "101 bytes"}
    assert record["commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert record["edited"] is True
    assert "+edited" in (tmp_path / "run/code.diff").read_text()


def test_a_clean_checkout_is_not_called_edited(checkout: Path, tmp_path: Path) -> None:
    assert snapshot.freeze(checkout, tmp_path / "run", tmp_path / "store")["edited"] is False


def test_without_git_the_packages_are_frozen(checkout: Path, tmp_path: Path) -> None:
    subprocess.run(["rm", "-rf", str(checkout / ".git")], check=True)
    (checkout / "pipeline/__pycache__").mkdir()
    (checkout / "pipeline/__pycache__/run.pyc").write_bytes(b"x")
    record = snapshot.freeze(checkout, tmp_path / "run", tmp_path / "store")
    assert frozen_files(tmp_path / "run") == {"pipeline/run.py", "slurm/x.py"}
    assert record["commit"] is None


def test_a_checkout_without_a_commit_can_be_frozen(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    (root / "pipeline").mkdir(parents=True)
    (root / "pipeline/run.py").write_text("one\n")
    git(tmp_path / "checkout", "init", "-q")
    assert snapshot.freeze(root, tmp_path / "run", tmp_path / "store")["files"].keys() == {"pipeline/run.py"}


def test_an_edit_after_the_freeze_changes_nothing_in_it(checkout: Path, tmp_path: Path) -> None:
    record = snapshot.freeze(checkout, tmp_path / "run", tmp_path / "store")
    (checkout / "pipeline/run.py").write_text("later\n")
    snapshot.check(tmp_path / "run")
    assert (tmp_path / "run/code/pipeline/run.py").read_text() == "one\n"
    again = snapshot.freeze(checkout, tmp_path / "second", tmp_path / "store")
    assert again["hash"] != record["hash"]
    assert (tmp_path / "run/code/slurm/x.py").samefile(tmp_path / "second/code/slurm/x.py")


def test_changed_missing_and_added_files_are_each_named(checkout: Path, tmp_path: Path) -> None:
    snapshot.freeze(checkout, tmp_path / "run", tmp_path / "store")
    code = tmp_path / "run/code"
    (code / "slurm/x.py").unlink()
    (code / "pipeline/run.py").unlink()
    (code / "pipeline/run.py").write_text("other\n")
    (code / "pipeline/added.py").write_text("")
    with pytest.raises(UserError, match="not the code that was frozen") as caught:
        snapshot.check(tmp_path / "run")
    for phrase in ("slurm/x.py is missing", "pipeline/run.py was changed", "pipeline/added.py was added"):
        assert phrase in str(caught.value)


def test_a_store_that_lost_bytes_is_not_used(checkout: Path, tmp_path: Path) -> None:
    snapshot.freeze(checkout, tmp_path / "run", tmp_path / "store")
    for kept in (tmp_path / "store").rglob("*"):
        if kept.is_file():
            kept.unlink()
            kept.write_bytes(b"")
    snapshot.freeze(checkout, tmp_path / "second", tmp_path / "store")
    snapshot.check(tmp_path / "second")


def test_code_is_frozen_again_only_if_it_is_whole(checkout: Path, tmp_path: Path) -> None:
    record = snapshot.freeze(checkout, tmp_path / "run", tmp_path / "store")
    assert snapshot.freeze_again(tmp_path / "run", tmp_path / "second", tmp_path / "store")["hash"] == record["hash"]
    snapshot.check(tmp_path / "second")
    (tmp_path / "run/code/slurm/x.py").unlink()
    with pytest.raises(UserError, match=r"slurm/x.py is missing"):
        snapshot.freeze_again(tmp_path / "run", tmp_path / "third", tmp_path / "store")
