"""`crosscoder export` and `import`: which run is meant, what is printed, and that torch is loaded in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer.testing
from exported_crosscoders import write_run

from pipeline import records
from pipeline.config.activation_source import StreamedActivations
from pipeline.config.errors import UserError
from pipeline.config.import_crosscoder import ImportConfig
from pipeline.config.stage import StageConfig
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.exchange.export_crosscoder import LAYOUTS
from pipeline.stages.import_crosscoder import READERS
from pipeline.tokens import write_token_set
from slurm.commands.command_line import build_app
from slurm.commands.exchange_commands import Layout, Origin
from slurm.record import run_directory
from slurm.record.run_directory import RunDirectory
from slurm.submission.freezing import Freezer


def make(runs: Path, stage: str, **job: object) -> RunDirectory:
    run = run_directory.create(runs, stage, "demo")
    known = {"id": run.id, "stage": stage, "name": "demo", "executor": "debug", "submitted": 1.0, "num_tasks": 1, "after": [], "jobs": []}
    run.write_job(known | job)
    records.write_json(run.path / "result.json", {"status": "finished", "started": 0.0, "ended": 1.0, "result": {}})
    return run


def exported(runs: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> typer.testing.Result:
    return called(runs, monkeypatch, "export", *words)


def called(runs: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> typer.testing.Result:
    site = runs.parent / "site.yaml"
    site.write_text(f"runs: {runs}\n")
    monkeypatch.setenv("CROSSCODER_SITE", str(site))
    return typer.testing.CliRunner().invoke(build_app(), list(words))


def test_a_run_or_a_checkpoint_is_exported_with_the_results_of_its_newest_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    run = make(runs, "train")
    write_run(run.path, "relu")
    for submitted, l0 in ((2.0, 31.4), (1.0, 99.9)):
        evaluation = make(runs, "evaluate", submitted=submitted)
        records.write_json(evaluation.path / "inputs.json", {"crosscoder": {"path": str(run.path)}})
        sparsity = {"l0": l0, "dead_eval": 0, "dense": 0}
        metrics = {
            "inputs": {"crosscoder": load_crosscoder(run.path).identity},
            "layers": [],
            "held_out": {"positions": 9, "outliers": 0},
            "sparsity": sparsity,
            "clean_cross_entropy": 2.0,
        }
        records.write_json(evaluation.path / "metrics.json", metrics | {"reconstruction": [], "replaced": []})
    done = exported(runs, monkeypatch, "train/demo", str(tmp_path / "a"), "--to", "dictionary_learning", "--license", "mit")
    assert done.stdout == f"step 7 of 2 layers and 40 features: {tmp_path / 'a'}\n"
    card = (tmp_path / "a/README.md").read_text(encoding="utf-8")
    assert "L0 31.40" in card
    assert "license: mit" in card
    done = exported(runs, monkeypatch, str(run.path / "checkpoints/00000007"), str(tmp_path / "b"), "--to", "safetensors")
    assert done.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["README.md", "crosscoder.safetensors", "export.json"]


def test_what_can_t_be_exported_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    write_run(make(runs, "train").path, "dense")
    make(runs, "evaluate")
    done = exported(runs, monkeypatch, "train/demo", str(tmp_path / "out"), "--to", "dictionary_learning")
    assert done.exit_code == 1
    assert "crosscoder: this crosscoder has a dense path of rank 2" in done.output
    found = exported(runs, monkeypatch, "evaluate/demo", str(tmp_path / "out"), "--to", "safetensors").exception
    assert isinstance(found, UserError)
    assert "is a run of evaluate, which leaves no crosscoder; name a run of train" in str(found)
    done = exported(runs, monkeypatch, "train/demo", str(tmp_path / "out"), "--to", "safetensors", "--private")
    assert (done.exit_code, done.exception is not None) == (2, True)
    found = exported(runs, monkeypatch, "train/demo", str(tmp_path / "out"), "--to", "safetensors", "--push-to-hub", "diff").exception
    assert "--push-to-hub is 'diff', expected a repository on the hub: user or organization, a slash and a name" in str(found)
    assert not (tmp_path / "out").exists()


def test_an_import_is_a_run_whose_settings_the_options_and_changes_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[tuple[str, StageConfig]] = []
    monkeypatch.setattr(Freezer, "plan", lambda self, parsed, **options: planned.extend(parsed) or [])
    tokens = write_token_set(tmp_path / "tokens", {"a-000": [[1, 2]]}, vocab_size=300, end_of_text_id=0, tokenizer_hash="")
    (tmp_path / "files").mkdir()
    words = [
        str(tmp_path / "files"),
        "--from",
        "ckkissane",
        "--name",
        "diff",
        "--language-model",
        "demo",
        "--tokens",
        str(tokens.directory),
    ]
    words += ["--layer", "transformer.h.1", "--layer", "transformer.h.2", "activation_scale=[0.5, 2.0]", "activations.context_tokens=128"]
    result = called(tmp_path / "runs", monkeypatch, "import", *words)
    assert result.exception is None
    ((_, config),) = planned
    assert isinstance(config, ImportConfig)
    assert isinstance(config.activations, StreamedActivations)
    assert (config.name, config.layout, config.path) == ("diff", "ckkissane", tmp_path / "files")
    assert config.activations.layers == ["transformer.h.1", "transformer.h.2"]
    assert (config.activation_scale, config.activations.context_tokens) == ([0.5, 2.0], 128)
    assert config.activations.contexts_per_generation == 64


def test_the_command_offers_every_layout() -> None:
    assert sorted(Layout) == sorted(LAYOUTS)
    assert sorted(Origin) == sorted(READERS)


def test_the_command_loads_no_torch() -> None:
    program = (
        "import slurm.__main__, slurm.commands.exchange_commands, sys; print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"
