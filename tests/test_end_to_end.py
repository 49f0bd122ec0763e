"""The whole pipeline as a user runs it: the demo's configurations at a twentieth of their size, through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import records
from slurm.record.verification import verify

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent
STAGES = ("tokenize", "count", "cache", "train", "evaluate")
CONFIGS = [str(ROOT / f"configs/demo/{stage}.yaml") for stage in STAGES]
SMALLER = [
    "cache.max_tokens=40000",
    "cache.contexts_per_generation=64",
    "train.crosscoder.num_features=512",
    "train.batch_positions=512",
    "evaluate.max_tokens=4000",
]


class Place:
    """A directory with a site file of its own, and the command line run in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "site.yaml").write_text(f"data: {directory}/data\nssd: {directory}/ssd\nruns: {directory}/runs\n")
        self.environment = {**os.environ, "CROSSCODER_SITE": str(directory / "site.yaml"), "OMP_NUM_THREADS": "2", "COLUMNS": "100"}

    def python(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run([sys.executable, *arguments], env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def crosscoder(self, *arguments: str, code: int = 0) -> str:
        return self.python("-m", "slurm", *arguments, code=code)

    def runs(self, stage: str) -> list[Path]:
        return sorted((self.directory / "runs" / stage / "demo").iterdir())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """All five stages have run here."""
    place = Place(tmp_path_factory.mktemp("demo"))
    place.python("-m", "pipeline.demo.standard_library_text", str(place.directory / "data/text/demo"))
    output = place.crosscoder("submit", "--executor", "debug", *CONFIGS, *SMALLER)
    (place.directory / "output").write_text(output)
    return place


def test_the_demo_ends_with_a_table_and_paths_and_no_warning(place: Place) -> None:
    output = (place.directory / "output").read_text()
    assert "Warning" not in output
    assert "\r" not in output
    assert "explained" in output
    figures = [Path(line) for line in output.splitlines() if line.endswith(".png")]
    assert [figure.stem for figure in figures] == ["nats", "explained_variance", "l0_curves", "feature_density"]
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


def test_a_page_about_the_demo_tells_what_its_evaluation_found(place: Place) -> None:
    page, result = place.directory / "page.html", records.read_json(place.runs("evaluate")[0] / "result.json")["result"]
    output = place.crosscoder("report", "train/demo", "-o", str(page)).splitlines()
    assert len(output) == 3
    assert all(f"{cost:.4f} nats at {layer}" in output[1] for layer, cost in result["cross_entropy_difference_by_layer"].items())
    assert f"{result['cross_entropy_difference']:.4f}" in page.read_text()
    trained = place.runs("train")[0]
    place.crosscoder("report", "train/demo")  # in the run directory, whose seal knows nothing of it
    assert "whole: run" in place.crosscoder("verify", str(trained))
    (trained / "report.html").unlink()


def test_the_crosscoder_explains_text_that_it_has_not_seen(place: Place) -> None:
    result = records.read_json(place.runs("evaluate")[0] / "result.json")["result"]
    assert result["explained_variance"] > 0.6
    assert result["recovered_against_zero"] > 0.8
    assert 8 < result["l0"] < 64


def test_every_run_directory_is_complete(place: Place) -> None:
    for stage in STAGES:
        run = place.runs(stage)[0]
        for name in ("config.yaml", "code/pipeline/run.py", "environment.json", "inputs.json", "job.json", "progress.json", "result.json"):
            assert (run / name).exists(), (stage, name)
        assert records.read_json(run / "result.json")["status"] == "finished"
    train = place.runs("train")[0]
    rows = [json.loads(line) for line in (train / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == records.read_json(train / "result.json")["result"]["steps"]
    assert list((train / "tensorboard").iterdir())


def test_submitted_again_what_exists_is_skipped_and_said_so(place: Place) -> None:
    output = place.crosscoder("submit", "--executor", "debug", *CONFIGS[:3], *SMALLER[:2])
    assert "tokenize demo: skipped" in output
    assert "cache demo: skipped" in output


def test_a_rerun_gives_the_same_bytes(place: Place) -> None:
    place.crosscoder("rerun", str(place.runs("train")[0]), "--executor", "debug")
    first, second = (run / records.read_json(run / "result.json")["result"]["checkpoint"] for run in place.runs("train")[:2])
    weights = [path.name for path in first.glob("*.safetensors")]
    assert weights
    for name in weights:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_flipped_bit_is_named_by_verify_and_mended_as_its_sentence_says(place: Place) -> None:
    directory = place.directory / "ssd/activations/demo"
    assert "damaged" not in place.crosscoder("verify", str(directory))
    shard = sorted(directory.glob("*.safetensors"))[0]
    whole, others = shard.read_bytes(), {path: path.stat().st_mtime_ns for path in directory.glob("*.safetensors") if path != shard}
    content = bytearray(whole)
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    record = shard.with_suffix(".json")
    assert f"delete {record} and run the stage that makes it again" in place.crosscoder("verify", str(directory), code=1)
    record.unlink()
    assert "skipped" not in place.crosscoder("submit", "--executor", "debug", CONFIGS[2], *SMALLER[:2])
    assert shard.read_bytes() == whole
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert "damaged" not in place.crosscoder("verify", str(directory))


def test_whatever_a_run_of_each_stage_contains_is_checked(place: Place) -> None:
    wanted = {"train": {"metrics.jsonl", "result.json"}, "evaluate": {"metrics.json", "features.safetensors", "feature_density.png"}}
    for stage in STAGES:
        run = place.runs(stage)[0]
        names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
        names = {name for name in names if name not in ("job.json", "seal.json", "setup.json") and not name.startswith("code/")}
        assert names >= wanted.get(stage, set())
        assert verify(str(run), place.directory / "runs")[1] == []
        for name in names:
            content = (run / name).read_bytes()
            (run / name).write_bytes(bytes([content[0] ^ 1]) + content[1:] if content else b"x")
            damages = verify(str(run), place.directory / "runs")[1]
            (run / name).write_bytes(content)
            assert any(damage.startswith(f"{run / name} ") for damage in damages), (stage, name, damages)


def test_a_local_job_trains_from_the_stream(place: Place) -> None:
    values = (ROOT / "configs/demo/train.yaml").read_text()
    cache = (ROOT / "configs/demo/cache.yaml").read_text()
    harvest = "".join(
        f"  {line}\n"
        for line in cache.splitlines()
        if line.split(":")[0] in ("tokens", "language_model", "layers", "context_tokens", "seed")
    )
    stream = values.replace(
        'activations: {kind: disk, path: "{ssd}/activations/demo"}', f"activations:\n  kind: stream\n{harvest}".rstrip()
    )
    config = place.directory / "train-stream.yaml"
    config.write_text(stream.replace("name: demo", "name: stream").replace("epochs: 1", "num_tokens: 20_000"))
    changes = [
        "activations.contexts_per_generation=64",
        "activations.statistics_contexts=256",
        "held_out.language_model=null",
        "crosscoder.num_features=512",
        "batch_positions=512",
    ]
    place.crosscoder("submit", "--executor", "local", str(config), *changes)
    place.crosscoder("logs", "--follow", "train/stream")
    run = next((place.directory / "runs/train/stream").iterdir())
    result = records.read_json(run / "result.json")
    assert result["status"] == "finished", result["error"]
    assert result["result"]["tokens"] == 20_000
    assert result["result"]["explained_variance"] > 0.4
