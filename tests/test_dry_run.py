"""What `--dry-run` shows, and that it leaves nothing."""

import json
from pathlib import Path

import pytest
from toy_project import ToyProject
from waiting import wait_until

from slurm.record.run_directory import RunDirectory


@pytest.fixture
def project(tmp_path: Path) -> ToyProject:
    return ToyProject(tmp_path)


def test_a_dry_rerun_says_what_would_differ_and_leaves_nothing(project: ToyProject) -> None:
    assert project.crosscoder("run", project.config(steps=2)).returncode == 0
    before = sorted(project.runs.glob("toy/toy/*"))
    done = project.crosscoder("rerun", "toy/toy", "steps=5", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"toy/toy differs from toy/toy/{before[0].name} in:\n  config: steps: 2 -> 5\n" in done.stdout
    assert sorted(project.runs.glob("toy/toy/*")) == before


def test_a_dry_run_says_what_differs_from_the_last_run_and_leaves_nothing(project: ToyProject) -> None:
    project.crosscoder("run", project.config())
    before = set(project.runs.glob("toy/*/*"))
    done = project.crosscoder("submit", project.config(), "steps=9", "--executor", "local", "--dry-run")
    assert "\n  config: steps: 3 -> 9\n" in done.stdout
    assert set(project.runs.glob("toy/*/*")) == before


def test_a_dry_run_of_a_chain_begins_with_a_line_for_each_stage(project: ToyProject) -> None:
    first = project.config("first", output="data/first", resources="{array_tasks: 4, max_parallel: 2, gpus: 1, mem_gb: 3}")
    second = project.config("second", data="data/first")
    done = project.crosscoder("submit", first, second, "--executor", "local", "--dry-run")
    assert done.stdout.splitlines() == [
        f"toy/first: 4 tasks, 2 at once, executor local, 60 minutes, 1 core, 3 GB, 1 GPU each; writes {project.root}/data/first",
        f"toy/second: 1 task, executor local, 60 minutes, 1 core, no GPU; waits for toy/first; writes {project.runs}/toy/second",
        "",
        "toy/first is the first run of this name",
        "",
        "toy/second is the first run of this name",
    ]


def test_a_dry_run_as_json_is_json_alone(project: ToyProject) -> None:
    project.crosscoder("run", project.config("first", output="data/first"))
    first, second = project.config("first", output="data/first"), project.config("second", data="data/first")
    done = project.crosscoder("submit", first, second, "steps=3", "--executor", "local", "--dry-run", "--json")
    skipped, queued = json.loads(done.stdout)
    assert "made by the same settings" in skipped["skipped"]
    assert (queued["stage"], queued["name"], queued["tasks"], queued["sbatch"]) == ("toy", "second", 1, None)
    assert queued["resources"]["timeout_min"] == 60
    assert not (project.runs / "toy/second").exists() or not list((project.runs / "toy/second").iterdir())


def content(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".submission.lock"}


def test_a_dry_resumption_says_what_would_go_on_and_changes_nothing(project: ToyProject) -> None:
    config = project.config(fail_at=1, resources="{array_tasks: 3, mem_gb: 2}")
    assert project.crosscoder("submit", config, "--executor", "debug").returncode == 1
    run, before = project.only_run(), content(project.runs)
    done = project.crosscoder("submit", "--resume", "toy/toy", "--dry-run")
    assert done.returncode == 0, done.stderr
    asked = "3 tasks, executor debug, 60 minutes, 1 core, 2 GB, no GPU each"
    assert done.stdout == (
        f"toy/toy/{run.name}: tasks 0-2 of 3 would go on: {asked}\n  task 0 failed before: the toy fails at step 1, as it was told\n"
    )
    (row,) = json.loads(project.crosscoder("submit", "--resume", f"{run}/tasks/1", "--dry-run", "--json").stdout)
    assert (row["run"], row["tasks"], row["num_tasks"], row["resources"]["mem_gb"]) == (str(run), [1], 3, 2)
    assert content(project.runs) == before
    for given in (["--after", "toy/toy"], ["--partition", "x"], [config], ["seed=1"], ["--executor", "local"], ["--again"]):
        refused = project.crosscoder("submit", "--resume", "toy/toy", "--dry-run", *given, COLUMNS="400")
        assert (refused.returncode, "give it without" in " ".join(refused.stderr.split())) == (2, True), given
    assert content(project.runs) == before


def test_a_run_that_will_not_finish_is_not_waited_for(project: ToyProject) -> None:
    assert project.crosscoder("run", project.config("bad", fail_at=1)).returncode == 1
    assert project.crosscoder("submit", project.config("failed", fail_at=1), "--executor", "local").returncode == 0
    wait_until(lambda: RunDirectory(project.only_run("failed")).state() == "failed", "the failure")
    said = {"bad": "is of executor run: what is of executor local can't wait for it", "failed": "did not finish and is not queued"}
    for name, sentence in said.items():
        refused = project.crosscoder("submit", project.config(), "--executor", "local", "--after", f"toy/{name}")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert sentence in refused.stderr
    assert not (project.runs / "toy/toy").exists()


def test_a_dry_resumption_refuses_what_the_real_one_would(project: ToyProject) -> None:
    assert project.crosscoder("run", project.config()).returncode == 0
    for options in ([], ["--dry-run"]):
        refused = project.crosscoder("submit", "--resume", "toy/toy", *options)
        assert (refused.returncode, "has finished; `crosscoder rerun" in refused.stderr) == (1, True)
