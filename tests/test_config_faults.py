"""A wrong configuration is answered with a sentence of this project's own, never with a library's."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load, yaml_file
from pipeline.config.errors import UserError
from pipeline.config.site_file import Site

DEMO = Path(__file__).parent.parent / "configs/demo/train.yaml"


def fault(change: str) -> str:
    values: dict[str, Any] = yaml_file.read(DEMO)
    load.set_value(values, change, where="t.yaml")
    with pytest.raises(UserError) as raised:
        load.from_values(values, where="t.yaml", site=Site())
    return str(raised.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("activations.kind=dsk", 'activations.kind is "dsk", expected disk or stream; did you mean `disk`?'),
        ("activations.kind=[a]", 'activations.kind is ["a"], expected disk or stream'),
        ("activations={path: x}", "activations.kind is missing; give one of disk or stream"),
        ("activations=disk", 'activations is "disk", expected a group of settings, for example {kind: disk}; kinds are disk, stream'),
        ("activations.pth=x", "activations.pth is not a setting of the kind disk; did you mean `path`?"),
        ("activations.path=true", "activations.path is true, expected a path"),
        (
            "crosscoder.activation_function.kind=relu",
            "crosscoder.activation_function.k is not a setting of the kind relu; known here: kind",
        ),
        (
            "crosscoder.normalization=3",
            "crosscoder.normalization is 3, expected a group of settings: center, scale",
        ),
        ("crosscoder.num_features=1.5", "crosscoder.num_features is 1.5, expected a whole number"),
        ("crosscoder.num_features=-1", "crosscoder.num_features is -1, expected 1 or more"),
        ("optimizer.learning_rate=high", 'optimizer.learning_rate is "high", expected a number'),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate is -1, expected more than 0"),
        ("optimizer.schedule.decay_fraction=2", "optimizer.schedule.decay_fraction is 2, expected 1 or less"),
        ("optimizer.beta1=1", "optimizer.beta1 is 1, expected less than 1"),
        (
            "optimizer.schedule.decay=cosin",
            'optimizer.schedule.decay is "cosin", expected constant, linear or cosine; did you mean `cosine`?',
        ),
        (
            "optimizer.schedule={warmup_fraction: 0.9, decay: linear}",
            "optimizer.schedule: warmup_fraction and decay_fraction add up to more than 1; make one of them smaller",
        ),
        ("crosscoder.activation_function.k=2000", "crosscoder: activation_function.k is 2000, expected less than num_features, 1024"),
        ("compile=yes", 'compile is "yes", expected true or false'),
        ("resources.partition=true", "resources.partition is true, expected text (true, false and null are text in quotes)"),
        ("resources.timeout_min=1:00:00", 'resources.timeout_min is "1:00:00", expected a whole number'),
        ("name=" + "x" * 70, f'name is "{"x" * 56}...: a name is 1 to 64 letters'),
        ("seed=null", "seed is null, expected a whole number"),
        ("partitio=x", "partitio is not a setting; did you mean `resources.partition`?"),
        ("epoch=1", "epoch is not a setting; did you mean `epochs`?"),
        ("learning_rate=1e-3", "learning_rate is not a setting; did you mean `optimizer.learning_rate`?"),
        ("xyzzy=1", "xyzzy is not a setting; known here: activations, batch_positions"),
        ("epochs=null", "give either num_tokens or epochs"),
    ],
)
def test_a_fault_says_what_was_found_what_is_expected_and_the_nearest_word(change: str, sentence: str) -> None:
    said = fault(change)
    assert said.startswith(f"t.yaml: {sentence}")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("layers", ["3", "[]", "[a, a]", "[true]"])
def test_a_wrong_list_is_named_at_its_entry_without_the_kind_of_its_group(layers: str) -> None:
    said = fault(f"activations={{kind: stream, tokens: a, language_model: {{model: demo}}, layers: {layers}}}")
    assert said in {
        "t.yaml: activations.layers is 3, expected a list, for example [a, b]",
        "t.yaml: activations.layers is [], expected 1 or more entries",
        't.yaml: activations.layers is ["a", "a"]: an entry stands twice; name each once',
        "t.yaml: activations.layers[0] is true, expected text (true, false and null are text in quotes)",
    }


EVALUATE = DEMO.with_name("evaluate.yaml")


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("train/w", "{runs}/train/w"),
        ("train/w/20261123-091530-k3f9", "{runs}/train/w/20261123-091530-k3f9"),
        ("{runs}/train/w", "{runs}/train/w"),
        ("{data}", "{data}"),
        ("train/here", "{here}/train/here"),
        ("w", "{here}/w"),
        ("k3f9", "{runs}/k3f9"),
        ("1042", "{runs}/1042"),
        ("1042_2", "{runs}/1042_2"),
        ("104_200", "{runs}/104_200"),
        ("1042/tasks/2", "{runs}/1042/tasks/2"),
        ("sweep/w/k3f9/tasks/2", "{runs}/sweep/w/k3f9/tasks/2"),
        ("other/tasks/here/deep", "{here}/other/tasks/here/deep"),
        ("elsewhere/w", "{here}/elsewhere/w"),
    ],
)
def test_a_run_is_named_by_stage_and_name_or_by_its_path(given: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train/here").mkdir(parents=True)
    site = Site(data=tmp_path / "D", runs=tmp_path / "R")
    config = load.load(EVALUATE, [f"crosscoder={given}"], site)
    assert config.inputs()["crosscoder"] == Path(path.format(runs=site.runs, data=site.data, here=tmp_path))


def test_a_path_that_names_no_run_is_never_looked_for_among_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load.load(EVALUATE, ["tokens=tokenize/x"], Site()).inputs()["tokens"] == tmp_path / "tokenize/x"


def test_keys_are_named_as_they_are_typed(tmp_path: Path) -> None:
    from slurm.submission.sweep import read_sweep

    (tmp_path / "s.yaml").write_text(f"name: s\nbase: {DEMO}\nlits: [{{seed: 1}}]\n")
    with pytest.raises(UserError, match=r"s\.yaml: lits is not a setting; did you mean `list`\?"):
        read_sweep(tmp_path / "s.yaml", [], Site())
    (tmp_path / "s.yaml").write_text(f"name: s\nbase: {DEMO}\ngrid: {{activations.kind: [dsk]}}\n")
    with pytest.raises(UserError, match=r'task 0 \(activations.kind=dsk\): activations.kind is "dsk", expected disk or stream'):
        read_sweep(tmp_path / "s.yaml", [], Site())


@pytest.mark.parametrize("key", [key for key in yaml_file.read(DEMO) if key != "held_out"])  # null is a value of that one
@pytest.mark.parametrize("wrong", ["{a: 1}", "[{b: 1}]", "null", "[x]", "-3.5", "true"])
def test_no_words_of_the_library_reach_anybody(key: str, wrong: str) -> None:
    said = fault(f"{key}={wrong}")
    assert said.startswith("t.yaml: ")
    for words in ("nput should", "nput tag", "discriminator", "alid dictionary", "nstance of", "ydantic"):
        assert words not in said
