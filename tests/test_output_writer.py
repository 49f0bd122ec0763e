"""Two runs never write one data set at once; the tasks of one run do."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toy_project import ToyProject
from waiting import at_step, wait_until

from pipeline.config.errors import UserError
from slurm.record import output_writer
from slurm.record.output_writer import only_writer
from slurm.record.run_directory import RunDirectory


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_writer, "PATIENCE_SECONDS", 0.3)


def test_a_second_run_is_refused_with_the_name_of_the_first_and_the_tasks_of_one_run_are_not(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "runs/cache/a/1"), RunDirectory(tmp_path / "runs/cache/a/2")
    output = tmp_path / "data" / "set"
    with only_writer([output], first, "7_0"), only_writer([output], first, "7_1"):
        with (
            pytest.raises(UserError, match=f"is being written by {first.path}.*process {os.getpid()} on .*job 7_0.*one run at a time"),
            only_writer([output], second, "8"),
        ):
            pass
        with only_writer([output.with_name("other")], second, "8"):
            pass
    with only_writer([output], second, "8"):
        assert json.loads((tmp_path / "data" / ".set.writer").read_text())["run"] == str(second.path)
    assert list((tmp_path / "data").iterdir()) == []


def test_the_last_task_of_a_run_lets_go_not_the_first(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "a"), RunDirectory(tmp_path / "b")
    output = tmp_path / "set"
    early, late = only_writer([output], first, "7_0"), only_writer([output], first, "7_1")
    early.__enter__()
    late.__enter__()
    early.__exit__(None, None, None)
    with pytest.raises(UserError, match="one run at a time"), only_writer([output], second, "8"):
        pass
    late.__exit__(None, None, None)
    with only_writer([output], second, "8"):
        pass


def test_of_two_runs_started_at_once_one_is_refused_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    project = ToyProject(tmp_path)
    config = project.config(output="data/made", steps=200, step_seconds=0.1)
    command = [sys.executable, "-P", "-m", "slurm", "run", config]
    started = [
        subprocess.Popen(command, cwd=project.root, env=project.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        wait_until(lambda: sum(process.poll() is not None for process in started) == 1, "the refusal")
        (refused,) = [process for process in started if process.poll() is not None]
        (works,) = [process for process in started if process.poll() is None]
        said = refused.communicate()[1]
        assert refused.returncode == 1
        assert "data/made" in said
        assert "writes the same output" in said or f"(process {works.pid} on " in said
        wait_until(lambda: any(at_step(RunDirectory(path), 1) for path in (project.runs / "toy/toy").iterdir()), "the first's first step")
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate()
    done = project.crosscoder("run", project.config(output="data/made", steps=1))
    assert done.returncode == 0, done.stderr
