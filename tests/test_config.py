"""Configuration files: YAML that means what it looks like, typed values, and errors that name the field."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import shipped
import yaml
from pydantic import Field

from pipeline.config import load, yaml_file
from pipeline.config.activation_source import Harvest
from pipeline.config.errors import UserError
from pipeline.config.schema import OPERATIONAL, Config, Count, DataPath, build
from pipeline.config.site_file import Site, load_site
from pipeline.config.stage import StageConfig


class Adam(Config):
    kind: Literal["adam"] = "adam"
    learning_rate: float = 1e-3


class Momentum(Config):
    kind: Literal["momentum"] = "momentum"
    momentum: float = 0.9


class ToyConfig(StageConfig):
    MOST_GPUS: ClassVar[int] = 2
    stage: Literal["toy"] = "toy"
    optimizer: Annotated[Adam | Momentum, Field(discriminator="kind")] = Adam()
    num_tokens: Count = 10
    output: Annotated[DataPath, Field(json_schema_extra=OPERATIONAL)] = Path("out")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e9", 1e9),
        ("24:00:00", "24:00:00"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("010", 10),
        ("1_000_000", 1_000_000),
        ("-1_000.5", -1000.5),
        ("1042_2", "1042_2"),
        ("1042_200", "1042_200"),
        ("1_0", "1_0"),
        ("1__000", "1__000"),
        ("0_100", "0_100"),
        ("0o17", 15),
        ("0b1", "0b1"),
        (".5e3", 500.0),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("2024-01-01", "2024-01-01"),
        ("", None),
        ("null", None),
        ("-5", -5),
        (".inf", float("inf")),
        ("1.2.3", "1.2.3"),
        ("0x1f", 31),
        ("=", "="),
    ],
)
def test_a_scalar_means_what_it_looks_like(text: str, value: object) -> None:
    found = yaml_file.parse(f"key: {text}", "a.yaml")["key"]
    assert found == value
    assert isinstance(found, bool) == isinstance(value, bool)
    assert isinstance(found, type(value))


def test_written_yaml_reads_back_equal_here_and_in_a_yaml_1_1_reader() -> None:
    value = {
        "a": "3e-4",
        "b": "no",
        "c": "24:00:00",
        "d": 3e-4,
        "e": None,
        "f": "010",
        "g": [1, {"h": "1_0"}],
        "i": "",
        "j": 1e-12,
        "k": "x: y",
    }
    assert yaml_file.parse(yaml_file.write(value), "x") == value
    assert yaml.safe_load(yaml_file.write(value)) == value


LIKE_NUMBERS = [
    "1042_2",
    "104_200",
    "1_000",
    "12e4567",
    "1e3",
    ".5e3",
    "0o17",
    "0x1f",
    "010",
    "+5",
    "1.50",
    "7",
    "24:00:00",
    "2024-01-01",
    "no",
]


class Texts(Config):
    name: str
    path: DataPath
    maybe: str | None = None
    several: list[DataPath] = []


@pytest.mark.parametrize("text", LIKE_NUMBERS)
def test_a_setting_that_is_text_or_a_path_is_what_was_written(text: str) -> None:
    values = yaml_file.parse(f"name: {text}\npath: {text}\nmaybe: {text}\nseveral: [{text}]", "t.yaml")
    for read in (values, yaml_file.parse(yaml_file.write(values), "t.yaml")):
        assert build(Texts, read, "t.yaml") == Texts(name=text, path=Path(text), maybe=text, several=[Path(text)])
    changed: dict[str, object] = {"path": "p"}
    load.set_value(changed, f"name={text}", where="t.yaml")
    assert build(Texts, changed, "t.yaml").name == text


def test_a_number_with_misplaced_underscores_is_refused_rather_than_read_as_another() -> None:
    with pytest.raises(UserError, match=r't\.yaml: num_tokens is "600_00", expected a whole number'):
        build(ToyConfig, yaml_file.parse("name: x\nnum_tokens: 600_00", "t.yaml"), "t.yaml")


def test_a_repeated_key_is_an_error_that_names_the_line() -> None:
    with pytest.raises(UserError, match=r"a\.yaml line 2, column 1: .*'seed' stands twice"):
        yaml_file.parse("seed: 1\nseed: 2", "a.yaml")


def test_a_file_that_is_not_yaml_is_named_with_the_place() -> None:
    with pytest.raises(UserError, match=r"a\.yaml line 2"):
        yaml_file.parse("a: [1,\nb: }", "a.yaml")


def test_an_unknown_key_names_the_nearest_also_in_nested_groups() -> None:
    with pytest.raises(UserError, match=r"t\.yaml: num_token is not a setting; did you mean `num_tokens`\?"):
        build(ToyConfig, {"name": "x", "num_token": 3}, "t.yaml")
    with pytest.raises(UserError, match=r"t\.yaml: optimizer\.momentun is not a setting of the kind momentum; did you mean `momentum`\?"):
        build(ToyConfig, {"name": "x", "optimizer": {"kind": "momentum", "momentun": 3}}, "t.yaml")


@pytest.mark.parametrize("value", ["10", 1.5, True, -1, None, [1]])
def test_a_value_of_another_type_is_refused_not_converted(value: object) -> None:
    with pytest.raises(UserError, match=r"t\.yaml: num_tokens is "):
        build(ToyConfig, {"name": "x", "num_tokens": value}, "t.yaml")


def test_a_whole_float_counts_as_a_count() -> None:
    config = build(ToyConfig, {"name": "x", "num_tokens": 1e9}, "t.yaml")
    assert config.num_tokens == 1_000_000_000
    assert isinstance(config.num_tokens, int)


def test_every_fault_of_a_file_is_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        build(ToyConfig, {"num_tokens": "x", "sed": 1}, "t.yaml")
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 65, "a/b"])
def test_a_name_that_would_not_do_as_a_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="name is "):
        build(ToyConfig, {"name": name}, "t.yaml")


def test_identity_leaves_out_what_does_not_change_the_bytes() -> None:
    one = build(ToyConfig, {"name": "x", "output": "a", "resources": {"gpus": 1}}, "t")
    two = build(ToyConfig, {"name": "y", "output": "b"}, "t")
    assert (
        one.identity()
        == two.identity()
        == {"stage": "toy", "seed": 0, "optimizer": {"kind": "adam", "learning_rate": 0.001}, "num_tokens": 10}
    )
    assert build(ToyConfig, {"name": "x", "optimizer": {"learning_rate": 1.0, "kind": "adam"}}, "t").identity() != one.identity()


@pytest.fixture
def toy_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load.STAGES, "toy", load.Stage(f"{__name__}:ToyConfig", "nowhere"))


@pytest.mark.usefixtures("toy_stage")
def test_changes_placeholders_and_site_defaults_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text("stage: toy\nname: x\noutput: '{ssd}/sets/a'\nresources: {gpus: 2}\n")
    site = Site(ssd=tmp_path / "ssd", resources={"partition": "gpu", "gpus": 1})
    config = load.load(tmp_path / "toy.yaml", ["optimizer.learning_rate=3e-4", "optimizer.kind=adam", "num_tokens=1e3"], site)
    assert isinstance(config, ToyConfig)
    assert config.output == tmp_path / "ssd/sets/a"
    assert config.resources.partition == "gpu"
    assert config.resources.gpus == 2
    assert config.optimizer == Adam(learning_rate=3e-4)
    assert config.num_tokens == 1000


@pytest.mark.usefixtures("toy_stage")
def test_a_resolved_configuration_loads_to_the_same(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text("stage: toy\nname: x\noutput: rel/a\noptimizer: {kind: momentum}\n")
    config = load.load(tmp_path / "toy.yaml", [], Site())
    (tmp_path / "again.yaml").write_text(yaml_file.write(config.resolved()))
    assert load.load(tmp_path / "again.yaml", [], Site()) == config
    assert isinstance(config, ToyConfig)
    assert config.output.is_absolute()


@pytest.mark.usefixtures("toy_stage")
def test_faults_of_stage_change_and_placeholder_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text("stage: tran\nname: x\n")
    with pytest.raises(UserError, match=r"stage is 'tran'; did you mean `train`"):
        load.load(path, [], Site())
    path.write_text("stage: toy\nname: x\noutput: '{disk}/a'\n")
    with pytest.raises(UserError, match=r"placeholder that is not one of \{data\}, \{ssd\}, \{runs\}"):
        load.load(path, [], Site())
    path.write_text("stage: toy\nname: x\n")
    with pytest.raises(UserError, match="not of the form key=value"):
        load.load(path, ["num_tokens"], Site())
    with pytest.raises(UserError, match="`num_tokens` is a value, not a group"):
        load.load(path, ["num_tokens=3", "num_tokens.x=3"], Site())
    with pytest.raises(UserError, match="does not exist"):
        load.load(tmp_path / "none.yaml", [], Site())


def test_the_site_file_is_found_through_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site.yaml").write_text(f"ssd: {tmp_path}/fast\nresources: {{partition: gpu}}\n")
    monkeypatch.setenv("CROSSCODER_SITE", str(tmp_path / "site.yaml"))
    assert load_site().ssd == tmp_path / "fast"
    monkeypatch.setenv("CROSSCODER_SITE", str(tmp_path / "missing.yaml"))
    with pytest.raises(UserError, match="does not exist"):
        load_site()


@pytest.mark.parametrize(
    "path", [p for p in shipped.files("configs/*/*.yaml") if p.parent.name != "sweeps"], ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_every_shipped_configuration_loads(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    (tmp_path / "models/answers").mkdir(parents=True)  # what python -m pipeline.demo.answering_model makes
    config = load.load(path, [], Site(data=tmp_path))
    assert text.startswith(f"# crosscoder submit configs/{path.parent.name}/{path.name}"), "a YAML opens with its command"
    assert config.stage == ("train" if path.parent.name in ("variants", "groups") else path.stem.split("-")[0])


def test_beginning_of_text_is_auto_true_or_false_and_at_auto_leaves_identities_as_they_were() -> None:
    def harvest(**changes: object) -> Harvest:
        values = {"tokens": "t", "language_model": {"model": "demo"}, "layers": ["a"], **changes}
        return build(Harvest, values, "cache.yaml")

    assert "beginning_of_text" not in harvest().identity()
    assert harvest(beginning_of_text=False).identity()["beginning_of_text"] is False
    for wrong in ("yes", 1, None):
        with pytest.raises(UserError, match=r"cache\.yaml: beginning_of_text is .*, expected auto, true or false"):
            harvest(beginning_of_text=wrong)
