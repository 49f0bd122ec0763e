"""What a stage would not use, or would use to do its work twice, is refused wherever resources are read or changed."""

import json
from pathlib import Path

import pytest
from toy_project import ToyProject

from pipeline.config import load
from pipeline.config.errors import UserError
from pipeline.config.resources import Resources
from pipeline.config.site_file import Site
from slurm.changing import change
from slurm.changing.job_control import Target
from slurm.record import run_directory
from slurm.record.run_directory import RunDirectory
from slurm.submission.sweep import read_sweep

DEMO = Path(__file__).parents[1] / "configs/demo"
ALONE = "each would do all of the work; use 1"
REFUSED = {
    ("gpus", 2): "works on 1 alone; use 1",
    ("nodes", 2): f"is one process: {ALONE}",
    ("tasks_per_node", 2): f"is one process: {ALONE}",
    ("array_tasks", 2): f"can't be divided: {ALONE}",
}
DIVISIBLE = ("tokenize", "cache")


@pytest.mark.parametrize("stage", list(load.STAGES))
@pytest.mark.parametrize(("field", "count"), [*REFUSED, ("gpus", 1)])
def test_a_stage_refuses_what_it_would_not_use_and_takes_the_rest(stage: str, field: str, count: int) -> None:
    change = f"resources.{field}={count}"
    if (field, count) not in REFUSED or (field == "array_tasks" and stage in DIVISIBLE):
        assert getattr(load.load(DEMO / f"{stage}.yaml", [change], Site()).resources, field) == count
        return
    with pytest.raises(UserError, match=rf"{stage}\.yaml: resources\.{field} is {count}, but {stage} {REFUSED[field, count]}$"):
        load.load(DEMO / f"{stage}.yaml", [change], Site())


def test_every_field_of_resources_that_multiplies_work_is_judged() -> None:
    """A new one must be added to what a stage says that it uses."""
    counts = {name for name, field in Resources.model_fields.items() if field.annotation is int}
    assert counts - {"cpus", "timeout_min"} == {field for field, _ in REFUSED}


def test_a_sweep_refuses_them_for_its_tasks(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(f"name: s\nbase: {DEMO}/train.yaml\nchanges: {{resources.gpus: 2}}\ngrid: {{seed: [0, 1]}}\n")
    with pytest.raises(UserError, match=r"resources\.gpus is 2, but train works on 1 alone"):
        read_sweep(path, [], Site())


def frozen(runs: Path, stage: str, num_tasks: int = 1, base: str = "train") -> RunDirectory:
    run = run_directory.create(runs, stage, "demo")
    jobs = [{"id": "7", "tasks": list(range(num_tasks)), "array": num_tasks > 1}]
    job = {"id": run.id, "stage": stage, "name": "demo", "executor": "slurm", "submitted": 0.0, "num_tasks": num_tasks, "after": []}
    job |= {"jobs": jobs, "resources": Resources(array_tasks=num_tasks).resolved()}
    run.write_job(job)
    for task in range(num_tasks if stage == "sweep" else 0):
        run.task_directory(task).mkdir(parents=True)
        RunDirectory(run.task_directory(task)).write_job(job | {"stage": base, "num_tasks": 1})
    return run


def test_a_change_of_what_is_queued_refuses_them_too(tmp_path: Path) -> None:
    for run in (frozen(tmp_path, "train"), frozen(tmp_path, "sweep", num_tasks=3)):
        asked = Resources(array_tasks=run.num_tasks, gpus=2)
        with pytest.raises(UserError, match=r"resources\.gpus is 2, but train works on 1 alone"):
            change._check_used(run, asked)
        change._check_used(run, asked.model_copy(update={"gpus": 1}))


def test_a_setting_is_not_changed_for_other_tasks_than_those_named(tmp_path: Path) -> None:
    run, request = frozen(tmp_path, "tokenize", num_tasks=3), change.parse(["text_field=body"])
    change._check_is_for_all(Target(["7_0", "7_1", "7_2"], run), request, "7_[0-2]")
    with pytest.raises(UserError, match=r"7_1 is a part of tokenize/demo/.*: change text_field of the whole run"):
        change._check_is_for_all(Target(["7_1"], run), request, "7_1")
    sweep = frozen(tmp_path, "sweep", num_tasks=3)
    with pytest.raises(UserError, match=r"is a sweep, which can't be frozen again; cancel it and submit its file with the change"):
        change._check_is_for_all(Target(["7_0", "7_1", "7_2"], sweep, is_whole=True), request, "sweep/demo")


@pytest.mark.parametrize("command", [["run"], ["submit", "--executor", "local"], ["submit", "--executor", "local", "--dry-run"]])
def test_every_way_to_start_a_stage_refuses_them(command: list[str], tmp_path: Path) -> None:
    project = ToyProject(tmp_path)
    toy = project.root / "pipeline/config/toy.py"
    toy.write_text(toy.read_text().replace("IS_DISTRIBUTED: ClassVar[bool] = True", ""))
    done = project.crosscoder(*command, project.config(), "resources.tasks_per_node=2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"crosscoder: toy.yaml: resources.tasks_per_node is 2, but toy is one process: {ALONE}\n"
    assert json.loads(project.crosscoder("jobs", "--json").stdout) == []
