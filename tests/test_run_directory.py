import json
import os
from pathlib import Path

import pytest

from pipeline.config.errors import UserError
from slurm.record import run_directory
from slurm.record.holder import Holder
from slurm.record.run_directory import RunDirectory
from slurm.record.run_reference import Named, find

Jobs = list[dict[str, object]]


def make(runs: Path, stage: str = "train", name: str = "demo", *, num_tasks: int = 1, jobs: Jobs | None = None) -> RunDirectory:
    run = run_directory.create(runs, stage, name)
    job = {"id": run.id, "stage": stage, "name": name, "executor": "slurm", "submitted": 0.0, "num_tasks": num_tasks, "after": []}
    run.write_job(job | {"jobs": jobs or []})
    return run


def end(run: RunDirectory, status: str, task: int = 0) -> None:
    directory = run.task_directory(task)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "result.json").write_text(json.dumps({"status": status, "error": None, "result": {}}))


def test_ids_sort_by_time() -> None:
    assert run_directory.new_id(1_000_000_000) < run_directory.new_id(1_000_000_001) < run_directory.new_id(2_000_000_000)


def test_a_run_is_found_by_path_name_reference_id_and_job(tmp_path: Path) -> None:
    first = make(tmp_path)
    second = make(tmp_path, name="other", jobs=[{"id": "1042", "tasks": [0, 1, 2], "array": True}], num_tasks=3)
    for reference in (str(first.path), "train/demo", first.reference, first.id, first.id[-8:]):
        assert find(reference, tmp_path) == Named(first)
    assert find("1042", tmp_path) == Named(second)
    with pytest.raises(UserError, match=r"no run is called '1043' under .*; runs there: train/demo, train/other"):
        find("1043", tmp_path)


def test_a_name_stands_for_its_newest_run(tmp_path: Path) -> None:
    runs = []
    for number in range(3):
        run = make(tmp_path)
        renamed = run.path.with_name(f"2026112{number}-000000-aaaa")
        os.rename(run.path, renamed)
        runs.append(RunDirectory(renamed))
    assert find("train/demo", tmp_path) == Named(runs[2])
    with pytest.raises(UserError, match="fits 3 runs"):
        find("aaaa", tmp_path)


def test_a_name_that_looks_like_a_pattern_finds_nothing(tmp_path: Path) -> None:
    make(tmp_path)
    for reference in ("*", "train/*", "train/demo/*", "../train"):
        with pytest.raises(UserError, match="no run is called"):
            find(reference, tmp_path)


def test_the_newest_finished_run_is_not_one_that_failed_or_is_half_done(tmp_path: Path) -> None:
    finished, failed, half = make(tmp_path), make(tmp_path), make(tmp_path, num_tasks=2)
    end(finished, "finished")
    end(failed, "failed")
    end(half, "finished", task=1)
    assert run_directory.newest_finished(tmp_path, "train", "demo") == finished
    end(half, "finished", task=0)
    newest = run_directory.newest_finished(tmp_path, "train", "demo")
    assert newest == max((finished, half), key=lambda run: run.id)


def test_states_come_from_the_files(tmp_path: Path) -> None:
    run = make(tmp_path, num_tasks=5, jobs=[{"id": "7", "tasks": [0, 1, 2, 3], "array": True}])
    end(run, "finished", 0)
    end(run, "stopped", 1)
    run.task_directory(2).mkdir(parents=True)
    lock = Holder(run.task_directory(2), job="7_2", restart=0).lock
    (run.task_directory(2) / "lock.json").write_text(json.dumps(lock))
    assert [run.task_state(task) for task in range(5)] == ["finished", "stopped", "running", "queued", "new"]
    assert run.states() == {"new": 1, "queued": 1, "running": 1, "stopped": 1, "finished": 1}
    assert run.state() == "running"
    (run.task_directory(2) / "lock.json").write_text(json.dumps(lock | {"process_started": 1}))
    assert run.task_state(2) == "stopped"
    assert run.state() == "stopped"


def test_the_last_submission_of_a_task_tells_its_job_id(tmp_path: Path) -> None:
    jobs: Jobs = [{"id": "7", "tasks": [0, 1, 2], "array": True}, {"id": "9", "tasks": [1], "array": False}]
    run = make(tmp_path, num_tasks=4, jobs=jobs)
    assert [run.job_of_task(task) for task in range(4)] == ["7_0", "9", "7_2", None]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    run_directory.append_line(tmp_path / "attempts.jsonl", {"event": "start"})
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write('{"event": "en')
    assert run_directory.read_lines(tmp_path / "attempts.jsonl") == [{"event": "start"}]


def test_the_end_of_an_id_names_a_run_from_four_letters_on(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert find(run.id[-4:], tmp_path) == Named(run)
    assert find(f"train/demo/{run.id[-4:]}", tmp_path) == Named(run)
    with pytest.raises(UserError, match="no run is called"):
        find(run.id[-1:], tmp_path)
