"""`crosscoder generate` and `steer`: what is shown, which language model is taken, what is refused before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest
from feature_pieces import write_store
from typer.testing import CliRunner

from pipeline import records
from pipeline.config.errors import UserError
from slurm.commands.command_line import build_app
from slurm.record import run_directory
from slurm.record.run_directory import RunDirectory
from slurm.record.run_reference import Named
from slurm.submission.model_of_training import models_of
from slurm.watching.generation_view import Texts, text_lines

SETTINGS = {"breakdown": {"ngram": 4, "cross_entropy_rise": 1.5, "repeated_rise": 0.3}}


def row(kind: str, strength: float | None, text: str, breaks: str | None = None) -> dict[str, Any]:
    costs = {"kl_per_token": 0.25, "cross_entropy": 1.5, "breaks": breaks}
    return {"prompt": 0, "prompt_text": "def f", "kind": kind, "strength": strength, "text": text, **costs}


def sums(kind: str, strength: float | None, broken: int) -> dict[str, Any]:
    costs = {"kl_per_token": 0.25, "cross_entropy": 1.5, "repeated_share": 0.125}
    return {"kind": kind, "strength": strength, "texts": 3, "broken": broken, **costs}


ROWS = [row("clean", None, "(x):\n\treturn x"), row("steered", 4.0, "\x1b[31mred " * 20), row("steered", -8.0, "no", "repeats")]
TEXTS = Texts(ROWS, {"summary": [sums("clean", None, 0), sums("steered", 4.0, 1), sums("steered", -8.0, 2)], "settings": SETTINGS})


def test_texts_stand_side_by_side_where_there_is_room() -> None:
    lines = text_lines(TEXTS, 90)
    assert lines[:6] == [
        "prompt 0",
        "    def f",
        "",
        "-- the model itself" + 27 * " " + "-- steered 4",
        "   cross-entropy 1.50" + 25 * " " + "   cross-entropy 1.50, KL 0.250",
        "(x):" + 42 * " " + (11 * "red ").rstrip(),
    ]
    assert lines[6].startswith("    return x" + 34 * " " + "red")
    assert all(len(line) <= 90 for line in lines)
    assert "\x1b" not in "".join(lines)
    assert "   cross-entropy 1.50, KL 0.250, broken: repeats" in text_lines(TEXTS, None)


def test_a_row_breaks_down_where_half_of_its_texts_are_broken() -> None:
    found = [line.split() for line in text_lines(TEXTS, None) if "of 3" in line]
    assert [words[-1] for words in found] == ["3", "3", "DOWN"]
    assert found[2] == ["steered", "-8", "0.250", "1.500", "12", "%", "2", "of", "3", "BREAKS", "DOWN"]


def test_what_is_known_of_the_edited_features_is_said(place: "Place") -> None:
    run = place.written({"breakdown": SETTINGS["breakdown"], "steering": {"features": [1, 2]}}, ROWS, [sums("clean", None, 0)])
    records.write_json(run.path / "inputs.json", {"crosscoder": {"path": str(place.train.path / "checkpoints/1")}})
    words = ["generate", run.reference]
    assert "feature 1" not in CliRunner().invoke(build_app(), words).output
    store = place.make("features")
    records.write_json(store.path / "inputs.json", {"crosscoder": {"path": str(place.train.path)}})
    records.write_json(store.path / "result.json", {"status": "finished", "started": 0.0, "ended": 1.0, "result": {}})
    write_store(store.path / "features")
    output = CliRunner().invoke(build_app(), words).output
    assert output.endswith(
        "feature 1 fires on 50 % of positions, activation 1 on average and 2 at most; strongest on ·one\n"
        "feature 2 fires on 0 % of positions, activation 1 on average and 2 at most; strongest on none\n"
    )


class Place:
    """A root of runs with a run of train."""

    def __init__(self, root: Path) -> None:
        self.root, self.runs = root, root / "runs"
        (root / "site.yaml").write_text(f"runs: {self.runs}\ndata: {root}/data\n")
        self.train = self.make("train")
        records.write_json(
            self.train.path / "checkpoints/1/crosscoder.json",
            {"layers": ["transformer.h.2", "transformer.h.3"], "config": {"num_features": 8}},
        )
        self.set({"kind": "stream", "language_model": {"model": "demo", "device": "cuda"}})

    def make(self, stage: str) -> RunDirectory:
        run = run_directory.create(self.runs, stage, "x")
        job = {"id": run.id, "stage": stage, "name": "x", "executor": "debug", "submitted": 0.0, "num_tasks": 1, "after": [], "jobs": []}
        run.write_job(job)
        return run

    def written(self, settings: dict[str, Any], rows: list[dict[str, Any]], summary: list[dict[str, Any]]) -> RunDirectory:
        """A finished run of generate."""
        run = self.make("generate")
        records.write_json(run.path / "result.json", {"status": "finished", "started": 0.0, "ended": 1.0, "result": {}})
        directory = run.path / "generations"
        directory.mkdir()
        (directory / "generations.jsonl").write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
        shard = records.commit_shard(directory, "generations", "generations-shard/1", ["generations.jsonl"], {}, {})
        records.write_manifest(directory, "generations/1", {"generations": shard}, {"summary": summary, "settings": settings})
        return run

    def set(self, activations: dict[str, Any], **values: Any) -> None:
        (self.train.path / "config.yaml").write_text(json.dumps({"stage": "train", "activations": activations, **values}))

    def refusal(self, *words: str) -> str:
        result = CliRunner().invoke(build_app(), [*words])
        assert isinstance(result.exception, UserError), result.output
        assert not list(self.runs.glob("generate/*/*"))
        return str(result.exception)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("CROSSCODER_SITE", str(tmp_path / "site.yaml"))
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


def test_the_language_model_is_found_where_training_names_it(place: Place) -> None:
    named = Named(RunDirectory(place.train.path))
    assert models_of(named) == {"language_model": {"model": "demo"}}
    place.set({"kind": "disk", "path": "/gone"}, held_out={"language_model": {"model": "a", "dtype": "bfloat16"}})
    assert models_of(named) == {"language_model": {"model": "a", "dtype": "bfloat16"}}

    activations = place.root / "activations"
    place.set({"kind": "disk", "path": str(activations)})
    with pytest.raises(UserError, match=r"does not tell which language model it was trained on.*say language_model\.model=NAME"):
        models_of(named)
    activations.mkdir()
    shard = records.commit_shard(activations, "000000", "activation-shard/1", [], {}, {"language_model": "b"})
    records.write_manifest(activations, "activation-set/1", {"000000": shard}, {"dtype": "float16"})
    assert models_of(named) == {"language_model": {"model": "b", "dtype": "float16"}}
    place.set({"kind": "stream", "language_models": {"base": {"model": "a", "device": "cuda"}, "chat": {"model": "b"}}})
    assert models_of(named) == {"language_models": {"base": {"model": "a"}, "chat": {"model": "b"}}}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("generate", "train/x"), "there is no prompt"),
        (("generate", "train/x", "--prompts", "absent"), "where there is no file"),
        (("generate", "train/x", "--prompt", "f", "--layers", "transformer.h.4"), "layers names transformer.h.4, but the crosscoder is of"),
        (("generate", "train/x", "--prompt", "f", "--encode-from", "cleam"), "encode_from"),
        (("steer", "train/x", "--prompt", "f", "--strength", "1"), "steering.features is missing"),
        (("steer", "train/x", "--prompt", "f", "--feature", "8", "--strength", "1"), "names 8, but the crosscoder has features 0 to 7"),
        (("steer", "train/x", "--prompt", "f", "--feature", "one", "--strength", "1"), "--feature has 'one' in it, expected whole numbers"),
        (("steer", "train/x", "--prompt", "f", "--feature", "1"), "strengths is empty, but mode add needs one or more"),
        (("steer", "train/y", "--prompt", "f", "--feature", "1"), "no run is called 'train/y'"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_starts(words: tuple[str, ...], sentence: str, place: Place) -> None:
    assert sentence in place.refusal(*words)


def test_a_run_of_generate_is_shown_and_takes_no_settings(place: Place) -> None:
    def invoke(*words: str) -> Any:
        return CliRunner().invoke(build_app(), ["generate", "generate/x", *words])

    place.make("generate")
    assert "it has no texts yet" in str(invoke().exception)
    # Letters that Python takes for line breaks, as a model may write them.
    rows = [row("clean", None, "a\u2028b\x0b\x85c")]
    run = place.written(SETTINGS, rows, [sums("clean", None, 0)])
    words = ["generate", str(run.path)]
    assert "-- the model itself\n   cross-entropy 1.50\n" in CliRunner().invoke(build_app(), words).output
    assert json.loads(CliRunner().invoke(build_app(), [*words, "--json"]).output) == rows
    assert "has its texts already" in str(CliRunner().invoke(build_app(), [*words, "--seed", "1"]).exception)
