"""A chain given in any order is put into the one in which each stage finds what it reads."""

from pathlib import Path

import pytest

from pipeline.config.stage import StageConfig
from slurm.submission.chain_order import in_order

RUNS = Path("/runs")
READS = {
    "tokenize": ["/text"],
    "cache": ["/data/tokens/train"],
    "train": ["/data/activations"],
    "evaluate": ["/runs/train/demo", "/data/tokens/validation"],
}
MAKES = {"tokenize": ["/data/tokens/train", "/data/tokens/validation"], "cache": ["/data/activations"]}


class AnyStage(StageConfig):
    """A stage that reads and makes what the tables above say."""

    def inputs(self) -> dict[str, Path]:
        return {path: Path(path) for path in READS.get(self.stage, [])}

    def outputs(self) -> dict[str, Path]:
        return {path: Path(path) for path in MAKES.get(self.stage, [])}


def order(*stages: str) -> tuple[list[str], list[str]]:
    given = [(f"{stage}.yaml", AnyStage(stage=stage.rstrip("12"), name="demo")) for stage in stages]
    ordered, moved = in_order(given, RUNS)
    return [where.removesuffix(".yaml") for where, _ in ordered], moved


@pytest.mark.parametrize("given", [["evaluate", "train", "cache", "tokenize"], ["train", "evaluate", "tokenize", "cache"]])
def test_what_makes_comes_before_what_reads(given: list[str]) -> None:
    assert order(*given)[0] == ["tokenize", "cache", "train", "evaluate"]


def test_an_order_that_holds_stays_and_nothing_is_said() -> None:
    for given in (["tokenize", "cache", "train", "evaluate"], ["cache", "other1", "train", "other2"], ["train1", "evaluate", "train2"]):
        assert order(*given) == (given, [])


def test_what_moved_is_said_with_its_reason() -> None:
    assert order("other1", "evaluate", "train", "other2") == (
        ["other1", "train", "evaluate", "other2"],
        ["evaluate.yaml goes after train.yaml, which makes what it reads"],
    )
