"""The settings that `crosscoder config` prints: complete, in words, the same as the page in docs/."""

import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field
from typer.testing import CliRunner

from pipeline.config import reference
from pipeline.config.load import STAGES, config_class
from pipeline.config.schema import Config, PositiveCount
from slurm.commands.command_line import build_app

ROOT = Path(__file__).resolve().parent.parent


def printed(*words: str) -> str:
    result = CliRunner().invoke(build_app(), ["config", *words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_of_a_stage_is_named_with_a_meaning_or_a_group_of_its_own(stage: str):
    groups = reference.groups_of(stage)
    assert {s.name for s in groups[0].settings} == set(config_class(stage).model_fields) - {"stage"}
    places = {place.removesuffix("[]") for group in groups for place in group.places}
    for group in groups:
        for setting in group.settings:
            inner = {f"{place}.{setting.name}".removeprefix(".") for place in group.places}
            assert setting.meaning or inner & places, f"{group.heading}.{setting.name} has no docstring"


def test_a_type_is_said_in_words():
    class Inner(Config):
        kind: Literal["inner"] = "inner"

    class Other(Config):
        kind: Literal["other"] = "other"

    assert reference.words(PositiveCount) == "whole number from 1"
    assert reference.words(PositiveCount | None) == "whole number from 1, or null"
    assert reference.words(Annotated[float, Field(gt=0, lt=1)]) == "number above 0 below 1"
    assert reference.words(Literal["sum", "mean"]) == "sum or mean"
    assert reference.words(list[str]) == "list of text"
    assert reference.words(Annotated[Inner | Other, Field(discriminator="kind")]) == "a group of kind inner or other"


def test_a_setting_is_printed_with_its_values_default_and_meaning():
    text = printed("train")
    assert "  batch_positions: whole number from 1; default 4096\n      Positions in a step, those counted that are left out" in text
    assert "  k: whole number from 1; required" in text


def test_a_group_that_stands_in_several_places_is_printed_once():
    groups = [g for g in reference.groups_of("train") if "layer_mask_schedule" in g.places]
    assert len(groups) == 1
    assert {"layer_mask_schedule", "crosscoder.activation_function.k_schedule"} <= set(groups[0].places)


def test_json_holds_the_same_settings():
    values = json.loads(printed("count", "--json"))
    assert [s["name"] for s in values["count"][0]["settings"]] == [s.name for s in reference.groups_of("count")[0].settings]


def test_the_page_is_what_the_command_writes():
    assert (ROOT / "docs" / "settings.md").read_text() == printed("--markdown"), "run: crosscoder config --markdown > docs/settings.md"


def test_an_unknown_stage_gets_the_nearest_name():
    result = CliRunner().invoke(build_app(), ["config", "trian"])
    assert result.exit_code == 1
    assert "did you mean `train`" in str(result.exception)
