import csv
import json
import re
from pathlib import Path

import pytest
import shipped
from toy_project import ToyProject
from waiting import wait_until

from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.record.run_directory import RunDirectory
from slurm.submission import sweep, sweep_results
from slurm.submission.sweep import SweepConfig


def config(**values: object) -> SweepConfig:
    return SweepConfig.model_validate({"name": "s", "base": "base.yaml", **values})


def test_a_grid_is_every_combination_in_order() -> None:
    members = sweep.combinations(config(grid={"a": [1, 2], "b.c": ["x", "y", "z"]}), "s.yaml")
    assert members == [{"a": a, "b.c": c} for a in (1, 2) for c in ("x", "y", "z")]


def test_zipped_lists_go_together_and_combine_with_grid_and_list() -> None:
    members = sweep.combinations(config(zip={"a": [1, 2], "b": [3, 4]}, grid={"seed": [0, 1]}, list=[{"k": 5}, {"k": 6}]), "s.yaml")
    assert members == [{"k": k, "a": a, "b": b, "seed": seed} for k in (5, 6) for a, b in ((1, 3), (2, 4)) for seed in (0, 1)]


def test_zipped_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(UserError, match=r"s.yaml: the lists under zip differ in length: a 2, b 1"):
        sweep.combinations(config(zip={"a": [1, 2], "b": [3]}), "s.yaml")


@pytest.mark.parametrize("values", [{}, {"grid": {"a": []}}])
def test_a_sweep_over_nothing_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match="nothing is varied"):
        sweep.combinations(config(**values), "s.yaml")


@pytest.fixture
def project(tmp_path: Path) -> ToyProject:
    project = ToyProject(tmp_path)
    project.config("base", steps=1)
    return project


def write_sweep(project: ToyProject, text: str) -> str:
    (project.root / "sweep.yaml").write_text(text)
    return "sweep.yaml"


def test_a_sweep_can_be_worked_on_here_and_a_task_that_fails_keeps_none_from_its_turn(project: ToyProject) -> None:
    file = write_sweep(project, "name: s\nbase: base.yaml\ngrid: {fail_at: [0, null, 0, null]}\n")
    done = project.crosscoder("sweep", file, "--executor", "debug")
    run = RunDirectory(project.only_run("s", "sweep"))
    assert (done.returncode, done.stdout.startswith(f"run {run.path}\n")) == (1, True), done.stderr
    assert [run.task_state(task) for task in range(4)] == ["failed", "finished"] * 2
    refused = project.crosscoder("sweep", file, "--executor", "debug", "--json")
    assert refused.returncode == 2
    assert len(list(run.path.parent.iterdir())) == 1


def test_a_sweep_runs_each_configuration_in_a_directory_of_its_own_and_lists_the_best_first(project: ToyProject) -> None:
    file = write_sweep(project, "name: s\nbase: base.yaml\ngrid: {steps: [2, 9, 4], fail_at: [null, 1]}\nmetric: score\nmax_parallel: 3\n")
    done = project.crosscoder("sweep", file, "--executor", "local")
    assert done.returncode == 0, done.stderr
    (path,) = re.findall(r"^run (.*)$", done.stdout, re.M)
    run = RunDirectory(Path(path))
    wait_until(lambda: sum(run.states().get(state, 0) for state in ("finished", "failed")) == 6, "the tasks")
    assert [run.record_of_task(task).config_values()["steps"] for task in range(6)] == [2, 2, 9, 9, 4, 4]
    assert (run.result(0) or {})["result"]["task"] == 0
    rows = sweep_results.gather(run)
    assert [row["task"] for row in rows[:3]] == [2, 4, 0]
    assert [row["state"] for row in rows] == ["finished"] * 3 + ["failed"] * 3
    shown = project.crosscoder("results", "sweep/s")
    assert shown.returncode == 0, shown.stderr
    with open(run.path / "results.csv") as file_object:
        assert [row["score"] for row in csv.DictReader(file_object)] == ["90.0", "40.0", "20.0", "", "", ""]
    assert (run.path / "results.png").read_bytes().startswith(b"\x89PNG")
    changed = run.path / "tasks/1/config.yaml"
    changed.write_text(changed.read_text().replace("fail_at: 1", "fail_at: null"))
    project.crosscoder("submit", "--resume", run.reference)
    wait_until(lambda: "was changed after it was frozen" in str((run.result(1) or {}).get("error")), "the refusal")


def test_a_fault_in_one_task_is_named_with_its_changes_and_nothing_is_frozen(project: ToyProject) -> None:
    for text, sentence in (
        ("grid: {stepz: [1]}", "task 0 (stepz=1): stepz is not a setting; did you mean `steps`?"),
        ("grid: {resources.cpus: [1, 2]}", "stage and resources can't be varied in a sweep"),
        ("grid: {seed: [1, 2]}\nchanges: {output: data/x}", "several tasks would write"),
        ("grad: {seed: [1, 2]}", "grad is not a setting; did you mean `grid`?"),
    ):
        done = project.crosscoder("sweep", write_sweep(project, f"name: s\nbase: base.yaml\n{text}\n"), "--executor", "local")
        assert done.returncode == 1
        assert sentence in done.stderr
    assert not (project.runs / "sweep").exists()


def test_a_dry_run_makes_the_same_checks_lists_the_tasks_and_leaves_nothing(project: ToyProject) -> None:
    file = write_sweep(project, "name: s\nbase: base.yaml\ngrid: {steps: [2, 9]}\nmax_parallel: 1\n")
    done = project.crosscoder("sweep", file, "name=other", "--executor", "local", "--dry-run")
    assert done.stdout.splitlines() == [
        "task 0: steps=2",
        "task 1: steps=9",
        f"sweep/other: 2 tasks, 1 at once, executor local, 60 minutes, 1 core, no GPU each; writes {project.runs}/sweep/other",
        "",
        "sweep/other is the first run of this name",
    ]
    assert list(project.runs.glob("sweep/*/*")) == []
    as_json = project.crosscoder("sweep", file, "--executor", "local", "--dry-run", "--json")
    assert [(row["name"], row["tasks"]) for row in json.loads(as_json.stdout)] == [("s", 2)]
    for dry_run in ([], ["--dry-run"]):
        done = project.crosscoder("sweep", file, "data=data/none", "--executor", "local", *dry_run)
        assert done.returncode == 1
        assert done.stderr == (
            f"crosscoder: sweep.yaml: data is {project.root}/data/none, which does not exist; run what makes it first: a sweep can't be "
            "part of a chain\n"
        )
    assert list(project.runs.glob("sweep/*/*")) == []


def test_what_makes_a_missing_input_of_a_sweep_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    path = Path("configs/sweeps/demo-decoder-norm.yaml")
    site = Site(ssd=tmp_path)
    with pytest.raises(UserError) as refused:
        sweep.check_inputs_are_there(sweep.read_sweep(path, [], site), path, tmp_path / "runs")
    assert str(refused.value) == (
        f"{path}: activations.path is {tmp_path}/activations/demo, which does not exist; run `crosscoder submit "
        "configs/demo/cache.yaml` first: a sweep can't be part of a chain"
    )
    (tmp_path / "e.yaml").write_text(f"name: e\nbase: {Path('configs/demo/evaluate.yaml').absolute()}\ngrid: {{seed: [1, 2]}}\n")
    (tmp_path / "runs/train/demo").mkdir(parents=True)
    site = Site(runs=tmp_path / "runs")
    with pytest.raises(UserError, match=r"no run of that name has finished; run `crosscoder submit configs/demo/train.yaml`"):
        sweep.check_inputs_are_there(sweep.read_sweep(tmp_path / "e.yaml", [], site), tmp_path / "e.yaml", site.runs)


def test_tasks_that_have_not_ended_show_their_last_metrics(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "sweep/s/20261123-000000-aaaa")
    for task in range(2):
        (run.path / "tasks" / str(task)).mkdir(parents=True)
    run.write_job({"stage": "sweep", "num_tasks": 2, "jobs": []})
    (run.path / "config.yaml").write_text("metric: loss\nmaximize: false\nmembers: [{a: 1}, {a: 2}]\n")
    (run.path / "tasks/1/metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n{"st')
    rows = sweep_results.gather(run)
    assert rows == [{"task": 1, "state": "new", "a": 2, "step": 2, "loss": 2.5}, {"task": 0, "state": "new", "a": 1}]


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ("metric: explaned_variance", "metric: explaned_variance is not a result of train; did you mean `explained_variance`?"),
        ("metric: l0\ncolumns: [seed, ded_features]", "columns: ded_features is not a result of train; did you mean `dead_features`?"),
        ("metric: seed", "metric: seed is not a result of train; "),
    ],
)
def test_a_metric_or_column_that_no_task_will_have_is_refused_with_the_nearest_name(tmp_path: Path, wish: str, sentence: str) -> None:
    base = Path(__file__).parent.parent / "configs/demo/train.yaml"
    (tmp_path / "s.yaml").write_text(f"name: s\nbase: {base}\ngrid: {{seed: [1, 2]}}\n{wish}\n")
    with pytest.raises(UserError) as refused:
        sweep.read_sweep(tmp_path / "s.yaml", [], Site())
    assert str(refused.value).startswith(f"{tmp_path}/s.yaml: {sentence}")


def test_a_sweep_may_be_renamed_and_its_tasks_keep_their_name(tmp_path: Path) -> None:
    base = Path(__file__).parent.parent / "configs/demo/train.yaml"
    (tmp_path / "s.yaml").write_text(f"name: s\nbase: {base}\ngrid: {{seed: [1, 2]}}\n")
    read = sweep.read_sweep(tmp_path / "s.yaml", ["name=pushed", "batch_positions=7"], Site())
    assert read.config.name == "pushed"
    assert [(config.name, config.resolved()["batch_positions"]) for config in read.stage_configs] == [("demo", 7)] * 2


def test_a_stages_configuration_is_no_sweep() -> None:
    path = Path(__file__).parent.parent / "configs/demo/train.yaml"
    with pytest.raises(UserError) as refused:
        sweep.read_sweep(path, [], Site())
    assert str(refused.value) == f"{path} is a stage's configuration (train), not a sweep; use `crosscoder submit {path}`"


def test_every_shipped_sweep_reads() -> None:
    for path in shipped.files("configs/sweeps/*.yaml"):
        assert path.read_text().startswith(f"# crosscoder sweep configs/sweeps/{path.name}")
        assert len(sweep.read_sweep(path, [], Site()).members) > 1


def test_the_base_itself_may_be_varied(tmp_path: Path) -> None:
    variants = [shipped.ROOT / f"configs/variants/{name}.yaml" for name in ("v1", "ref")]
    (tmp_path / "s.yaml").write_text(f"name: s\ngrid:\n  base: [{variants[0]}, {variants[1]}]\n  seed: [1, 2]\n")
    read = sweep.read_sweep(tmp_path / "s.yaml", [], Site())
    assert [(stage.name, stage.seed) for stage in read.stage_configs] == [("v1", 1), ("v1", 2), ("ref", 1), ("ref", 2)]
    (tmp_path / "s.yaml").write_text("name: s\ngrid: {seed: [1, 2]}\n")
    with pytest.raises(UserError, match="base is missing; name the configuration that is varied, or one a task"):
        sweep.read_sweep(tmp_path / "s.yaml", [], Site())
