"""Uploading an export: what reaches the hub, told by a stand-in for its client, and what a person reads where it can't."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from exported_crosscoders import write_run
from huggingface_hub.errors import LocalTokenNotFoundError

from pipeline.exchange import export_crosscoder


class Commit(NamedTuple):
    repo_url: str


class Hub:
    """Takes what is uploaded, in the order of the calls."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, list[tuple[str, dict[str, Any]]]()
        self.files: dict[str, bytes] = {}

    def create_repo(self, repository: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repository": repository, **options}))
        if self.error is not None:
            raise self.error

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Commit:
        self.calls.append(("upload_folder", {"repository": repo_id, "message": commit_message}))
        self.files = {str(path.relative_to(folder_path)): path.read_bytes() for path in folder_path.rglob("*") if path.is_file()}
        return Commit(f"https://huggingface.co/{repo_id}")


def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, *words: str) -> Path:
    """Runs the program as `crosscoder export` does; gives the directory of the files."""
    run, output = write_run(tmp_path / "run", "relu"), tmp_path / "out"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(sys, "argv", ["export", str(run), str(output), "--to", "sae_lens", *words])
    export_crosscoder.main()
    return output


@pytest.mark.parametrize("private", [True, False])
def test_the_hub_gets_the_files_in_one_commit(
    private: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub()
    output = exported(tmp_path, monkeypatch, hub, "--push-to-hub", "ana/diff", *(["--private"] if private else []))
    assert hub.calls == [
        ("create_repo", {"repository": "ana/diff", "private": private, "exist_ok": True}),
        ("upload_folder", {"repository": "ana/diff", "message": "step 7 of 2 layers and 40 features"}),
    ]
    assert hub.files == {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert set(hub.files) == {"README.md", "export.json", "crosscoder/cfg.json", "crosscoder/sae_weights.safetensors"}
    assert 'SAE.from_pretrained("ana/diff", "crosscoder")' in hub.files["README.md"].decode()
    assert capsys.readouterr().out.splitlines()[-1] == "https://huggingface.co/ana/diff"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            LocalTokenNotFoundError("no token"),
            "crosscoder: nobody is logged in to the hub here; run `hf auth login`, then `hf upload ana/diff ",
        ),
        (RuntimeError("403 Forbidden\nmore"), "crosscoder: ana/diff could not be uploaded (403 Forbidden); the files are in "),
    ],
)
def test_an_upload_that_fails_leaves_the_files_and_says_how_to_go_on(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        exported(tmp_path, monkeypatch, Hub(error), "--push-to-hub", "ana/diff")
    assert message in capsys.readouterr().err
    assert (tmp_path / "out/README.md").exists()


def test_nothing_is_uploaded_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(RuntimeError("asked"))
    exported(tmp_path, monkeypatch, hub)
    assert hub.calls == []
