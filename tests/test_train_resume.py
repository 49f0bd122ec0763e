"""A training run that is killed and started again ends as one that never was."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.crosscoder.training_log import TIME_FIELDS

SCRIPT = Path(__file__).parent / "killed_training.py"


class Trained(NamedTuple):
    """A run without interruption and one with several, and what their processes said."""

    variant: str
    whole: Path
    interrupted: Path
    output: str


@pytest.fixture(scope="module", params=["relu", "batch_topk"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp(request.param)
    first, second = random.Random(request.param).sample(range(1, 12), 2)
    # The SIGKILL after step 7 of a start comes after rows that the next start draws again.
    ends = [("kill", first), ("term", second), ("kill-saving", 2), ("kill", 7)]
    command = [sys.executable, "-W", "error", str(SCRIPT), str(directory), request.param, *(str(word) for end in ends for word in end)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return Trained(request.param, directory / "whole", directory / "interrupted", done.stdout + done.stderr)


def final_checkpoint(directory: Path) -> dict[str, bytes]:
    path = max((directory / "checkpoints").iterdir())
    assert path.name == "00000034"
    return {file.name: file.read_bytes() for file in path.iterdir()}


def rows_without_times(directory: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in rows]


def test_an_interrupted_run_ends_with_the_bytes_of_one_that_was_not(trained: Trained) -> None:
    ends = [line.split()[-1] for line in trained.output.splitlines() if line.startswith("interrupted ")]
    assert ends == ["killed", "0", "killed", "killed", "0"], trained.output
    assert trained.output.count("stopped\n") == 1
    assert "resuming at step" in trained.output
    assert final_checkpoint(trained.interrupted) == final_checkpoint(trained.whole)


def test_an_interrupted_run_has_the_same_snapshots(trained: Trained) -> None:
    def snapshots(directory: Path) -> dict[str, bytes]:
        files = (directory / "history").rglob("*.safetensors")
        return {str(file.relative_to(directory)): file.read_bytes() for file in files}

    assert len(snapshots(trained.whole)) == 2 * 7
    assert snapshots(trained.interrupted) == snapshots(trained.whole)


def test_an_interrupted_run_has_the_same_rows_of_metrics(trained: Trained) -> None:
    rows = rows_without_times(trained.whole)
    assert rows_without_times(trained.interrupted) == rows
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24, 28, 32, 34]
    if trained.variant == "batch_topk":
        assert any(row["loss_auxk"] > 0 for row in rows), "the run must have dead features, or their state is not tested"


def test_killed_writers_leave_nothing_behind(trained: Trained) -> None:
    assert not list((trained.interrupted / "checkpoints").glob(".*"))
    assert not list((trained.interrupted / "history").glob(".*"))


def test_curves_of_an_interrupted_run_have_every_point_once(trained: Trained) -> None:
    events = EventAccumulator(str(trained.interrupted / "tensorboard"))
    events.Reload()
    rows = rows_without_times(trained.whole)
    found = events.Scalars("1_loss/total")
    assert [event.step for event in found] == [row["step"] for row in rows]
    assert [event.value for event in found] == pytest.approx([row["loss"] for row in rows])
    assert "2_reconstruction/explained_variance/block.1" in events.Tags()["scalars"]
    assert "5_gradients/encoder_gradient_norm_histogram/block.1" in events.Tags()["histograms"]
