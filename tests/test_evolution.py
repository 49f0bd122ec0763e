"""`crosscoder evolution`: what snapshots keep of each feature, and what the command makes of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.testing
from torch import Tensor
from toy_activations import MemorySource, random_activations, train_config

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.crosscoder import checkpoint_files
from pipeline.crosscoder.trainer import Trainer
from pipeline.run import Run
from slurm.commands.command_line import build_app
from slurm.record import run_directory
from slurm.record.run_directory import RunDirectory
from slurm.watching import evolution
from slurm.watching.feature_history import Snapshot, find_history, read

HISTORY = {"every_tokens": None, "every_minutes": None, "history": {"kind": "every_tokens", "tokens": 320}}


def trainer(directory: Path, variant: str = "relu", **changes: Any) -> Trainer:
    return Trainer(train_config(variant, **changes), MemorySource(random_activations(300)), Run(directory), torch.device("cpu"))


def snapshot(step: int, firings: list[int], means: list[float], norms: list[list[float]], **facts: Any) -> Snapshot:
    known = {"dead_window_tokens": 50, "layers": ["h.0", "h.1"], "measured_on": "the step's batch"}
    known |= {"norm_ratio_by_layer": [0.5, None], "best_scalar_by_layer": [1.0, None], "explained_variance_by_layer": [0.8, None]}
    counts = np.array(firings)
    return Snapshot(step, 100 * step, 100, known | facts, counts, counts * np.array(means), np.array([0, 60, 0, 60]), np.array(norms))


@pytest.mark.parametrize(("variant", "micro"), [("relu", 10), ("batch_topk", None)])
def test_a_snapshot_holds_the_sums_over_the_steps_since_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, micro: int | None
) -> None:
    course = trainer(tmp_path, variant, checkpoints=HISTORY, micro_batch_positions=micro)
    seen: list[Tensor] = []
    step = course.train_step

    def watched(raw_BLD: Tensor) -> None:
        with torch.no_grad():
            seen.append(course.state.crosscoder.encode_as_trained(course.state.normalizer.normalize(raw_BLD)).double())
        step(raw_BLD)

    monkeypatch.setattr(course, "train_step", watched)
    course.train()
    snapshots = [read(path) for path in checkpoint_files.all_in(tmp_path / "history")]
    assert [now.step for now in snapshots] == [11, 22, 32, 34]
    first = 0
    for now in snapshots:
        features_NF = torch.cat(seen[first : now.step])
        assert now.window_tokens == len(features_NF)
        assert now.firings_F.tolist() == (features_NF > 0).sum(0).tolist()
        # Sums of a batch in float32, 24 bits each; the products in the passes may round in another order.
        np.testing.assert_allclose(now.activation_sum_F, features_NF.sum(0).numpy(), rtol=1e-5, atol=1e-4)
        first = now.step
    assert sum(now.window_tokens for now in snapshots) == 1000


def test_without_held_out_positions_the_shrinkage_is_that_of_the_steps_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    course = trainer(tmp_path, checkpoints=HISTORY)
    batches: list[Tensor] = []
    step = course.train_step
    monkeypatch.setattr(course, "train_step", lambda raw_BLD: (batches.append(raw_BLD), step(raw_BLD)))
    course.train()
    last = read(checkpoint_files.all_in(tmp_path / "history")[-1])
    crosscoder, normalizer = course.state.crosscoder, course.state.normalizer
    with torch.no_grad():
        x_NLD = normalizer.denormalize(crosscoder.decode(crosscoder.encode(normalizer.normalize(batches[-1])))).double()
    ratio_L = x_NLD.square().sum((0, 2)).sqrt() / batches[-1].double().square().sum((0, 2)).sqrt()
    assert last.facts["norm_ratio_by_layer"] == pytest.approx(ratio_L.tolist(), rel=1e-6)
    assert (last.facts["measured_on"], last.facts["measured_positions"]) == ("the step's batch", len(batches[-1]))
    assert last.decoder_norms_FL == pytest.approx(crosscoder.W_dec_FLD.norm(dim=-1).detach().numpy())


def test_a_history_asked_for_after_a_resume_begins_its_window_there(tmp_path: Path) -> None:
    trainer(tmp_path, checkpoints={"every_tokens": 500, "every_minutes": None}).train()
    first, last = checkpoint_files.all_in(tmp_path / "checkpoints")
    shutil.rmtree(last)
    assert checkpoint_files.read_part(first, "training").facts["tokens"] == 524
    trainer(tmp_path, checkpoints=HISTORY).train()
    # Ends of windows: 664, 964 and 1000 tokens.
    assert [read(path).window_tokens for path in checkpoint_files.all_in(tmp_path / "history")] == [140, 300, 36]


def test_what_died_revived_rose_and_fell_by_hand() -> None:
    # Feature 0 always fires; 1 never does; 2 stops and comes back; 3 fires for the first time in the third window.
    course = evolution.course(
        [
            snapshot(1, [10, 0, 5, 0], [1.0, 0.0, 2.0, 0.0], [[1, 1], [1, 0], [0, 2], [3, 0]]),
            snapshot(2, [8, 0, 0, 0], [1.2, 0.0, 0.0, 0.0], [[1, 1.1], [1, 0], [0, 1], [3.6, 0]]),
            snapshot(3, [8, 0, 4, 1], [1.0, 0.0, 3.0, 1.0], [[1, 1.1], [1, 0], [0, 1], [3.6, 0]]),
        ]
    )
    assert [(row["silent"], row["died"], row["revived"], row["dead"]) for row in course] == [(2, None, None, 2), (3, 1, 0, 2), (1, 0, 1, 2)]
    moves = ("firing_in_both", "activation_rose", "activation_fell", "activation_ratio_median")
    assert [course[1][name] for name in moves] == pytest.approx([1, 1, 0, 1.2])
    assert [course[2][name] for name in moves] == pytest.approx([1, 0, 1, 1 / 1.2])
    # Norms summed over layers: 2 to 2.1, 1 to 1, 2 to 1, 3 to 3.6.
    assert [course[1][name] for name in ("norm_rose", "norm_fell", "norm_ratio_median")] == pytest.approx([1, 1, 1.025])
    assert course[0]["mean_activation_median"] == pytest.approx(1.5)
    assert course[0]["norm_ratio_by_layer"] == [0.5, None]


def of_train(runs: Path, stage: str = "train", history: str = "none") -> RunDirectory:
    run = run_directory.create(runs, stage, "demo")
    job = {"id": run.id, "stage": stage, "name": "demo", "executor": "debug", "submitted": 0.0, "num_tasks": 1, "after": []}
    run.write_job(job | {"jobs": []})
    (run.path / "config.yaml").write_text(f"stage: {stage}\ncheckpoints: {{history: {{kind: {history}}}}}\n")
    return run


def shown(runs: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    (runs.parent / "site.yaml").write_text(f"runs: {runs}\n")
    monkeypatch.setenv("CROSSCODER_SITE", str(runs.parent / "site.yaml"))
    result = typer.testing.CliRunner().invoke(build_app(), ["evolution", *words])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_the_command_shows_a_trained_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    run = of_train(runs, history="every_tokens")
    with pytest.raises(UserError, match="has no snapshot yet"):
        find_history("train/demo", runs)
    trainer(run.path, checkpoints=HISTORY).train()
    lines = shown(runs, monkeypatch, "train/demo").splitlines()
    assert lines[0].startswith(f"{run.reference}: 4 snapshots of 16 features; dead at the last one: ")
    assert lines[3].split()[:3] == ["11", "332", "332"]
    rows = json.loads(shown(runs, monkeypatch, "train/demo", "--json"))
    assert [row["step"] for row in rows] == [11, 22, 32, 34]
    of_two = json.loads(shown(runs, monkeypatch, "train/demo", "3", "5", "--json"))
    last = read(checkpoint_files.all_in(run.path / "history")[-1])
    assert [row["feature"] for row in of_two] == [3] * 4 + [5] * 4
    assert of_two[3]["firings"] == last.firings_F[3]
    assert of_two[3]["decoder_norms"] == last.decoder_norms_FL[3].tolist()
    assert shown(runs, monkeypatch, "train/demo", "3").startswith("feature 3; layers: block.0, block.1")
    with pytest.raises(UserError, match="feature 16: this crosscoder has features 0 to 15"):
        shown(runs, monkeypatch, "train/demo", "16")
    with (run.path / "history/00000011/features.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"features\.safetensors holds .* bytes, its record says"):
        find_history("train/demo", runs)


def test_a_run_without_snapshots_says_how_to_keep_them(tmp_path: Path) -> None:
    of_train(tmp_path)
    with pytest.raises(UserError, match=r"keeps no snapshots; train with checkpoints\.history\.kind=log_spaced"):
        find_history("train/demo", tmp_path)
    of_train(tmp_path, stage="cache")
    with pytest.raises(UserError, match="is a run of cache; evolution shows runs of train"):
        find_history("cache/demo", tmp_path)


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    trainer(tmp_path, checkpoints=HISTORY).train()
    path = checkpoint_files.all_in(tmp_path / "history")[-1]
    program = f"from slurm.watching import evolution, feature_history as h; import sys; from pathlib import Path; p = Path({str(path)!r})\n"
    program += (
        "evolution.table('x', evolution.course([h.read(p)]), 100); print(sorted({'torch', 'pipeline.crosscoder'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert records.verify(path) == []
