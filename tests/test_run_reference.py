"""A run, or one task of it, is found by every form of its name, by every command alike."""

from pathlib import Path

import pytest

from pipeline.config.errors import UserError
from slurm.record import run_directory
from slurm.record.run_directory import RunDirectory
from slurm.record.run_reference import Named, find

ARRAY = [{"id": "1042", "tasks": [0, 1, 2, 3], "array": True}, {"id": "1050", "tasks": [3, 1], "array": True}]


def make(runs: Path, stage: str, *, num_tasks: int, jobs: list[dict[str, object]] | None = None) -> RunDirectory:
    run = run_directory.create(runs, stage, "demo")
    job = {"id": run.id, "stage": stage, "name": "demo", "executor": "slurm", "submitted": 0.0, "num_tasks": num_tasks, "after": []}
    run.write_job(job | {"jobs": jobs or []})
    for task in range(num_tasks if num_tasks > 1 or stage == "sweep" else 0):
        directory = run.path / "tasks" / str(task)
        directory.mkdir(parents=True)
        if stage == "sweep":
            RunDirectory(directory).write_job(job | {"stage": "train", "num_tasks": 1, "jobs": []})
    return run


@pytest.mark.parametrize("stage", ["sweep", "tokenize"])
def test_every_form_of_a_tasks_name_finds_it(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path / "runs", stage, num_tasks=4, jobs=ARRAY)
    whole = [str(run.path), f"{stage}/demo", run.reference, run.id, run.id[-4:], "1042", "1050", f"runs/{run.reference}"]
    monkeypatch.chdir(tmp_path)
    for name in whole:
        assert find(name, tmp_path / "runs") == Named(run)
        assert find(f"{name}/tasks/3", tmp_path / "runs") == find(f"{name}/tasks/3/", tmp_path / "runs") == Named(run, 3)
    assert [find(name, tmp_path / "runs").task for name in ("1042_0", "1042_3", "1050_0", "1050_1")] == [0, 3, 3, 1]
    monkeypatch.chdir(run.path / "tasks/2")
    assert [find(name, tmp_path / "runs").task for name in (".", "../3", "../..")] == [2, 3, None]
    monkeypatch.chdir(run.path)
    assert find("tasks/2", tmp_path / "runs") == Named(run, 2)
    assert find(Named(run, 2).reference, tmp_path / "runs") == Named(run, 2)


def test_a_task_that_there_is_not_is_said_to_be_missing(tmp_path: Path) -> None:
    run = make(tmp_path, "sweep", num_tasks=4, jobs=ARRAY)
    for name in ("sweep/demo/tasks/4", f"{run.path}/tasks/4"):
        with pytest.raises(UserError, match=rf"{run.reference} has tasks 0 to 3, not 4"):
            find(name, tmp_path)
    with pytest.raises(UserError, match=rf"job 1050, of {run.reference}, has 2 tasks, 1050_0 to 1050_1, not 2"):
        find("1050_2", tmp_path)
    with pytest.raises(UserError, match=r"no run under .* was submitted as job 7"):
        find("7_1", tmp_path)


def test_the_one_task_of_a_run_is_the_run(tmp_path: Path) -> None:
    run = make(tmp_path, "train", num_tasks=1, jobs=[{"id": "7", "tasks": [0], "array": False}])
    assert [find(name, tmp_path) for name in ("7", "7_0", "train/demo/tasks/0")] == [Named(run)] * 3
    with pytest.raises(UserError, match="has one task, 0, not 1"):
        find("train/demo/tasks/1", tmp_path)


def test_what_takes_a_whole_run_refuses_a_task_in_one_sentence(tmp_path: Path) -> None:
    run = make(tmp_path, "sweep", num_tasks=4, jobs=ARRAY)
    assert find("1042", tmp_path).whole("verify") == run
    with pytest.raises(UserError, match=rf"^{run.reference}/tasks/2 is one task; verify takes a whole run: name {run.reference}$"):
        find("1042_2", tmp_path).whole("verify")


def test_a_tasks_own_directory_is_called_as_commands_take_it(tmp_path: Path) -> None:
    run = make(tmp_path, "sweep", num_tasks=4)
    assert run.record_of_task(2).reference == f"{run.reference}/tasks/2"
