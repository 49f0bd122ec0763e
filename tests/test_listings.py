"""Every listing has `--json`: one value, with the keys that scripts may rely on; and a text that ends without a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
from toy_project import ToyProject
from waiting import wait_until

from slurm.cluster.daemons import PrivateCluster
from slurm.record.run_directory import RunDirectory

JOB_KEYS = {
    *("job", "name", "state", "run", "stage", "task", "num_tasks", "slurm_state", "reason", "node", "partition", "gpus", "elapsed_s"),
    *("limit_s", "phase", "step", "total", "unit", "percent", "stopped_at", "rate", "starts", "ends", "warning", "submitted", "ended"),
}
NODE_KEYS = {"node", "type", "memory_gb", "total", "used", "free", "state", "partitions", "note", "in_slurm"}
SHOW_KEYS = {"run", "directory", "state", "tasks", "config", "inputs", "code", "environment", "job"}
TASK_KEYS = {"task", "state", "queue", "job", "progress", "attempts", "result"}
FINDING_KEYS = {"subject", "fact", "meaning", "is_concern"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> ToyProject:
    project = ToyProject(tmp_path_factory.mktemp("toy"))
    for steps in ("2", "3"):
        done = project.crosscoder("run", project.config(), f"steps={steps}")
        assert done.returncode == 0, done.stderr
    return project


def value(project: ToyProject, *arguments: str, **variables: str) -> Any:
    done = project.crosscoder(*arguments, "--json", **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_jobs_of_runs_without_slurm(project: ToyProject) -> None:
    rows = value(project, "jobs")
    assert [set(row) for row in rows] == [JOB_KEYS] * 2
    assert [(row["state"], row["step"], row["percent"]) for row in rows] == [("finished", 3, 100.0), ("finished", 2, 100.0)]
    assert value(project, "jobs", "toy/toy", "--all") == rows
    assert value(project, "jobs", rows[0]["run"]) == rows[:1]
    assert value(project, "jobs", "nothing-of-that-name") == []
    told = project.crosscoder("jobs", "nothing-of-that-name")
    assert told.stdout == "no job and no run is called nothing-of-that-name; `crosscoder jobs --all` lists all there are\n"


def test_show_compare_and_verify(project: ToyProject) -> None:
    shown = value(project, "show", "toy/toy")
    assert set(shown) == SHOW_KEYS
    assert [set(task) for task in shown["tasks"]] == [TASK_KEYS]
    first, second = sorted((project.runs / "toy/toy").iterdir(), key=lambda path: RunDirectory(path).submitted)
    compared = value(project, "compare", first.name, second.name)
    assert set(compared) == {"first", "second", "differences"}
    assert set(compared["differences"]) == {"config", "code", "environment", "inputs", "results", "speed"}
    assert {row["name"]: (row["first"], row["second"]) for row in compared["differences"]["config"]} == {"steps": (2, 3)}
    verified = value(project, "verify", "runs/toy/toy")
    assert verified == {"checked": [f"run {second}"], "damages": []}


def test_results_of_a_sweep(project: ToyProject) -> None:
    (project.root / "sweep.yaml").write_text("name: s\nbase: toy.yaml\ngrid: {steps: [1, 2], fail_at: [null, 0]}\nmetric: score\n")
    assert project.crosscoder("sweep", "sweep.yaml", "--executor", "local").returncode == 0
    (run,) = [RunDirectory(path) for path in (project.runs / "sweep/s").iterdir()]
    wait_until(lambda: run.states() == {"finished": 2, "failed": 2}, "the sweep's end")
    rows = value(project, "results", "sweep/s")
    assert [(row["task"], row["state"], row["steps"], row.get("score")) for row in rows] == [
        *((2, "finished", 2, 20.0), (0, "finished", 1, 10.0)),
        *((1, "failed", 1, None), (3, "failed", 2, None)),
    ]
    text = project.crosscoder("results", "sweep/s", COLUMNS="80").stdout.splitlines()
    assert text[0] == f"{run.reference}: 4 tasks, 2 finished, 2 failed; best score first (higher is better)"
    assert text[2].split() == ["TASK", "steps", "fail_at", "score", "STATE"]
    assert [line.split()[0] for line in text[3:7]] == ["2", "0", "1", "3"]
    assert text[5].endswith("failed: the toy fails at step 0, as it was told")
    again = project.crosscoder("rerun", "sweep/s")
    assert "is a sweep, which can't be run again as it was: `crosscoder sweep` with its file makes a new one" in again.stderr
    one = project.crosscoder("submit", str(run.path / "tasks/0/config.yaml"), "--executor", "local", "--dry-run")
    assert one.returncode == 0, one.stderr


def test_one_task_of_a_sweep_is_shown_alone(project: ToyProject) -> None:
    (run,) = [RunDirectory(path) for path in (project.runs / "sweep/s").iterdir()]
    for reference in (f"sweep/s/{run.id[-4:]}/tasks/2", f"runs/sweep/s/{run.id}/tasks/2", f"{run.path}/tasks/2/"):
        shown = project.crosscoder("show", reference)
        assert shown.returncode == 0, shown.stderr
        lines = shown.stdout.splitlines()
        assert lines[0].startswith(f"{run.reference} task 2 (job ")
        assert "): finished in " in lines[0]
        assert ["score", "20"] in [line.split() for line in lines]
        varied = lines.index("of what the sweep varies")
        assert [line.split() for line in lines[varied + 1 : varied + 3]] == [["steps", "2"], ["fail_at", "null"]]
        assert any(line.startswith("attempts") for line in lines)
    alone = value(project, "show", f"sweep/s/{run.id}/tasks/1")
    assert [task["task"] for task in alone["tasks"]] == [1]
    assert (alone["config"]["steps"], alone["config"]["fail_at"]) == (1, 0)
    assert "at step 0" in project.crosscoder("logs", f"sweep/s/{run.id}/tasks/1").stdout
    assert "has tasks 0 to 3, not 9" in project.crosscoder("show", f"sweep/s/{run.id}/tasks/9").stderr
    refused = project.crosscoder("results", f"runs/sweep/s/{run.id}/tasks/1").stderr
    assert f"{run.reference}/tasks/1 is one task; results takes a whole run: name {run.reference}" in refused


def test_two_tasks_of_a_sweep_are_compared_by_every_form_of_their_names(project: ToyProject) -> None:
    (run,) = [RunDirectory(path) for path in (project.runs / "sweep/s").iterdir()]
    job = run.job()["jobs"][0]["id"]
    names = (f"{job}_", "sweep/s/tasks/", f"{run.path}/tasks/")
    pairs = [(f"{name}0", f"{name}2") for name in names]
    for first, second in pairs:
        differences = value(project, "compare", first, second)
        assert (differences["first"], differences["second"]) == (f"{run.path}/tasks/0", f"{run.path}/tasks/2")
        assert differences["differences"]["config"] == [{"name": "steps", "first": 1, "second": 2}]
        assert {row["name"] for row in differences["differences"]["results"]} == {"steps", "score"}
    text = project.crosscoder("compare", *pairs[0]).stdout
    assert text.startswith(f"{run.reference}/tasks/0 -> {run.reference}/tasks/2\n")
    same = project.crosscoder("compare", pairs[0][0], pairs[1][0])
    assert (same.returncode, "both name" in same.stderr) == (1, True)


def test_what_takes_a_whole_run_says_so_of_a_task(project: ToyProject) -> None:
    (run,) = [RunDirectory(path) for path in (project.runs / "sweep/s").iterdir()]
    task = f"{run.job()['jobs'][0]['id']}_2"
    commands = {
        "verify": ["verify", task],
        "results": ["results", task],
        "--after": ["submit", project.config(), "--executor", "local", "--after", task],
    }
    for what, command in commands.items():
        refused = project.crosscoder(*command)
        said = f"crosscoder: {run.reference}/tasks/2 is one task; {what} takes a whole run: name {run.reference}\n"
        assert (refused.returncode, refused.stderr) == (1, said)
    again = project.crosscoder("rerun", task)
    assert f"`crosscoder submit {run.path}/tasks/2/config.yaml` makes a run of its own of it" in again.stderr
    one = project.crosscoder("cancel", "--yes", task)
    assert f"{run.reference}/tasks/2 is one task, and one process works on all of them: name {run.reference}" in one.stderr
    assert [row["task"] for row in value(project, "jobs", task)] == [2]
    assert [row["task"] for row in value(project, "jobs", f"sweep/s/{run.id[-4:]}/tasks/3")] == [3]


@pytest.mark.slurm
def test_listings_of_a_cluster(project: ToyProject, cluster: PrivateCluster) -> None:
    here = {"SLURM_CONF": str(cluster.configuration)}
    assert {frozenset(row) for row in value(project, "accelerators", **here)} == {frozenset(NODE_KEYS)}
    assert {frozenset(row) for row in value(project, "doctor", **here)} == {frozenset(FINDING_KEYS)}
    done = project.crosscoder("submit", project.config("queued", steps=500, step_seconds=0.1), **here)
    assert done.returncode == 0, done.stderr
    (row,) = value(project, "jobs", "queued", **here)
    assert set(row) == JOB_KEYS
    assert row["state"] in ("waiting", "running")
    (task,) = value(project, "show", "toy/queued", **here)["tasks"]
    assert task["queue"]["state"] in ("waiting", "running")
    cluster.command("scancel", "--me")


@pytest.mark.parametrize("columns", ["40", "80", "200", ""])
def test_texts_are_printed_in_any_width_and_without_trailing_blanks(project: ToyProject, columns: str) -> None:
    variables = {"COLUMNS": columns} if columns else {}
    for arguments in (["jobs"], ["show", "toy/toy"]):
        done = project.crosscoder(*arguments, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        assert all(line == line.rstrip() for line in done.stdout.splitlines())
        assert Path(project.root).name in done.stdout or "finished" in done.stdout
