"""Where `max_tokens` allows more than there is, the log, the result and the submission say so."""

import io
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_gpt2, tiny_token_set

from pipeline.config import load
from pipeline.config.site_file import Site
from pipeline.config.stage import StageConfig
from pipeline.run import Run
from pipeline.stages import cache_activations, evaluate_crosscoder, train_crosscoder
from pipeline.tokens import TokenSet
from slurm.submission import input_preflight

PROGRAMS: dict[str, Any] = {"cache": cache_activations, "train": train_crosscoder, "evaluate": evaluate_crosscoder}


class Place:
    """A token set, a model that reads it, and a crosscoder trained on it, streamed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        tiny_token_set(root / "tokens")
        model = {"model": str(tiny_gpt2(root / "model")), "device": "cpu"}
        self.reading: dict[str, Any] = {"tokens": str(root / "tokens"), "language_model": model, "context_tokens": 32}
        self.num_ids = sum(len(shard.ids) for shard in TokenSet.open(root / "tokens").shards)

    def config(self, stage: str, max_tokens: int | None) -> StageConfig:
        harvest = {**self.reading, "max_tokens": max_tokens, "layers": ["transformer.h.0", "transformer.h.1"]}
        values: dict[str, Any] = {
            "cache": {**harvest, "output": str(self.root / f"activations-{max_tokens}")},
            "train": {
                "activations": {"kind": "stream", **harvest},
                "crosscoder": {"num_features": 32, "activation_function": {"kind": "batch_topk", "k": 4}},
                "loss": {},
                "num_tokens": 200,
                "batch_positions": 100,
                "device": "cpu",
            },
            "evaluate": {
                **self.reading,
                "training_tokens": self.reading["tokens"],
                "max_tokens": max_tokens,
                "crosscoder": str(self.root / "train"),
            },
        }[stage]
        return load.from_values({"stage": stage, "name": "x", **values}, where=f"{stage}.yaml", site=Site())

    def run(self, stage: str, max_tokens: int | None) -> tuple[str, dict[str, Any]]:
        """What the stage prints, and its result."""
        output = io.StringIO()
        directory = self.root / (stage if max_tokens is None else f"{stage}-{max_tokens}")
        result = PROGRAMS[stage].run(self.config(stage, max_tokens), Run(directory, stage=stage, output=output))
        return output.getvalue(), result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("limit"))
    place.run("train", None)
    return place


@pytest.mark.parametrize("stage", list(PROGRAMS))
def test_a_stage_that_takes_less_than_max_tokens_says_so_in_its_log_and_result(place: Place, stage: str) -> None:
    log, result = place.run(stage, 1_000_000)
    there = 1_000_000 - result["short_of_max_tokens"]
    unit = "tokens" if stage == "evaluate" else "positions"
    assert f"max_tokens is 1,000,000, but {place.root}/tokens has {there:,} {unit}: all of them are taken\n" in log
    assert there == place.num_ids if stage == "evaluate" else 0.9 * place.num_ids < there < place.num_ids


def test_what_baselines_are_fitted_on_is_not_there_to_be_measured(place: Place) -> None:
    config = place.config("evaluate", 1_000_000).model_copy(update={"training_tokens": None})
    output = io.StringIO()
    result = PROGRAMS["evaluate"].run(config, Run(place.root / "part", stage="evaluate", output=output))
    there = 1_000_000 - result["short_of_max_tokens"]
    assert there == place.num_ids - place.num_ids // 4
    assert f"{place.root}/tokens, less what baselines are fitted on, has {there:,} tokens: all of them are taken\n" in output.getvalue()


@pytest.mark.parametrize("stage", list(PROGRAMS))
def test_a_stage_that_has_enough_says_nothing(place: Place, stage: str) -> None:
    log, result = place.run(stage, 150)
    assert "max_tokens" not in log
    assert "short_of_max_tokens" not in result


def test_training_says_that_a_batch_takes_all_there_is(place: Place) -> None:
    config = place.config("train", 150)
    for batch_positions, is_said in ((151, True), (150, False)):
        output = io.StringIO()
        run = Run(place.root / f"batches-of-{batch_positions}", stage="train", output=output)
        PROGRAMS["train"].run(config.model_copy(update={"batch_positions": batch_positions}), run)
        sentence = "batch_positions is 151, but there are 150 positions: every step takes all of them\n"
        assert (sentence in output.getvalue()) == is_said


def test_a_submission_says_it_where_the_token_set_is_there_already(place: Place) -> None:
    parsed = [(f"{stage}.yaml", place.config(stage, 1_000_000)) for stage in PROGRAMS]
    said = input_preflight.notices(parsed)
    assert [line.partition(":")[0] for line in said] == ["cache.yaml", "train.yaml", "evaluate.yaml"]
    assert all(f"max_tokens is 1,000,000, but {place.root}/tokens has about " in line for line in said[:2])
    assert said[2].endswith(f"has about {place.num_ids:,} tokens: all of them are taken")
    assert input_preflight.notices(parsed, [place.root / "tokens"]) == []  # another set will be there
    assert input_preflight.notices([(where, place.config(where[:-5], 150)) for where, _ in parsed]) == []
