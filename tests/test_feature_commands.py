"""`crosscoder features`: which store is shown, what of it, and that nothing in it reaches the terminal as a command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.testing
from feature_pieces import write_store

from pipeline import records
from pipeline.config.errors import UserError
from slurm.commands.command_line import build_app
from slurm.record import run_directory
from slurm.record.run_directory import RunDirectory
from slurm.watching import feature_view
from slurm.watching.feature_store import FeatureStore, find_store


def make(runs: Path, stage: str, *, status: str = "finished", submitted: float = 0.0) -> RunDirectory:
    run = run_directory.create(runs, stage, "demo")
    job = {"id": run.id, "stage": stage, "name": "demo", "executor": "debug", "submitted": submitted, "num_tasks": 1, "after": []}
    run.write_job(job | {"jobs": []})
    records.write_json(run.path / "result.json", {"status": status, "started": 0.0, "ended": 1.0, "result": {}})
    return run


def features_of(runs: Path, crosscoder: Path, *, tokens: list[str] | None = None, submitted: float = 1.0, status: str = "finished") -> Path:
    run = make(runs, "features", submitted=submitted, status=status)
    records.write_json(run.path / "inputs.json", {"crosscoder": {"path": str(crosscoder)}})
    return write_store(run.path / "features", tokens)


def shown(runs: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    site = runs.parent / "site.yaml"
    site.write_text(f"runs: {runs}\n")
    monkeypatch.setenv("CROSSCODER_SITE", str(site))
    result = typer.testing.CliRunner().invoke(build_app(), ["features", *words])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_a_run_of_train_stands_for_the_newest_store_made_of_it_or_of_a_checkpoint_of_it(tmp_path: Path) -> None:
    trained, other = make(tmp_path, "train"), make(tmp_path, "train")
    with pytest.raises(UserError, match=rf"no finished run of features has read {trained.reference}; submit one"):
        find_store(trained.reference, tmp_path)
    first = features_of(tmp_path, trained.path, submitted=1.0)
    second = features_of(tmp_path, trained.path / "checkpoints/0007", submitted=2.0)
    features_of(tmp_path, other.path, submitted=3.0)
    unfinished = features_of(tmp_path, trained.path, submitted=4.0, status="failed")
    assert find_store(trained.reference, tmp_path).directory == second
    assert find_store(str(first.parent), tmp_path).directory == first
    with pytest.raises(UserError, match="is failed: it has no feature store yet"):
        find_store(str(unfinished.parent), tmp_path)


def test_a_feature_shows_its_layers_tokens_neighbors_and_contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features_of(tmp_path / "runs", make(tmp_path / "runs", "train").path)
    lines = shown(tmp_path / "runs", monkeypatch, "train/demo", "1").splitlines()
    assert lines[0] == "feature 1: fires on 50 % of 8 positions (dense); activation 1 on average, 2 at most"
    assert re.fullmatch(r"h\.0 +1\.200 +0\.600 +0\.750 +0\.500  up1", lines[2])
    assert lines[4:7] == ["suppresses in h.0: down1", "cosine between the layers' decoders: 0.50", "neighbors (cosine): 2 (0.12)"]
    assert lines[8:10] == ["strongest firings", "   2.000  3:5         a·b«·one»⏎"]
    assert lines[11] == "sample, group 1 of 1 from the weakest"
    dead = shown(tmp_path / "runs", monkeypatch, "train/demo", "2")
    assert dead.startswith("feature 2: fires on 0 % of 8 positions (dead)")
    with pytest.raises(UserError, match="there are features 0 to 2"):
        shown(tmp_path / "runs", monkeypatch, "train/demo", "3")


def test_the_table_is_sorted_and_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    features_of(runs, make(runs, "train").path)

    def order(*words: str) -> list[int]:
        return [row["feature"] for row in json.loads(shown(runs, monkeypatch, "train/demo", "--json", *words))]

    assert order() == [1, 0, 2]
    assert order("--sort", "layer-share") == [2, 1, 0]
    assert order("--search", "ONE") == [1]
    assert order("--search", "up") == [1, 0, 2]
    assert order("--most", "2") == [1, 0]
    table = shown(runs, monkeypatch, "train/demo", "--most", "1")
    assert "3 of 3 features over 8 positions; the first 1 of 3 are shown" in table
    with pytest.raises(UserError, match="--sort is 'size'; features can be sorted by feature, density"):
        order("--sort", "size")


def test_every_line_of_jsonl_is_an_example_with_an_activation_for_each_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    features_of(runs, make(runs, "train").path)
    examples = [json.loads(line) for line in shown(runs, monkeypatch, "train/demo", "--jsonl").splitlines()]
    assert [(row["feature"], row["quantile"]) for row in examples] == [(0, None), (0, 0), (1, None), (1, 0)]
    assert examples[2]["tokens"] == ["a b", " one", "\n"]
    assert examples[2]["activations"] == [0.0, 2.0, 0.5]


def test_the_stronger_a_feature_is_at_a_token_the_darker_is_its_background(tmp_path: Path) -> None:
    store = FeatureStore.open(write_store(tmp_path / "features"))
    line = feature_view.feature_lines(store, store.features([1])[0], store.contexts(1), None)[9]
    assert not isinstance(line, str)
    styles = {line.plain[span.start : span.end]: str(span.style) for span in line.spans}
    assert styles == {"«·one»": "black on rgb(255,80,20)", "⏎": "black on rgb(255,204,174)"}


def test_no_token_tells_the_terminal_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, bad = tmp_path / "runs", "\x1b]0;owned\x07\x1b[2J\r\x9b1m\u202e"
    features_of(runs, make(runs, "train").path, tokens=[bad, bad, bad])
    for words in (["0"], ["0", "1"], [], ["--json"], ["--jsonl"], ["1", "--json"]):
        for variables in ({}, {"FORCE_COLOR": "1"}):
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            text = re.sub(r"\x1b\[[0-9;]*m", "", shown(runs, monkeypatch, "train/demo", *words))
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text), words


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    directory = write_store(tmp_path / "features")
    (directory / "contexts.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"contexts\.parquet holds 4 bytes, its record says"):
        FeatureStore.open(directory)


def test_the_reader_needs_no_torch_and_pyarrow_only_when_a_store_is_read() -> None:
    imports = "import slurm.__main__, slurm.watching.feature_store, slurm.commands.feature_commands, sys"
    program = f"{imports}; print(sorted({{'torch', 'pyarrow', 'numpy', 'rich.console'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"
