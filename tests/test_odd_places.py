"""Paths as people have them: with spaces, quotes and letters of any language, and reached through links."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_project import ToyProject
from waiting import finished, wait_until

from pipeline.config.errors import UserError
from slurm.cluster.daemons import PrivateCluster
from slurm.execution import frozen_code, slurm_job
from slurm.record.run_directory import RunDirectory

ODD = "Žofie's проект (1) & $HOME"


@pytest.fixture
def project(tmp_path: Path) -> ToyProject:
    """A checkout in an odd place, whose runs lie in another, named through a link."""
    (tmp_path / "big disk" / "běhy").mkdir(parents=True)
    root = tmp_path / ODD
    root.mkdir()
    project = ToyProject(root)
    project.runs = tmp_path / "run link"
    project.runs.symlink_to(tmp_path / "big disk" / "běhy")
    (root / "site.yaml").write_text(json.dumps({"runs": str(project.runs), "data": str(tmp_path / "dáta set")}), encoding="utf-8")
    return project


def chain_works(project: ToyProject, executor: str, **variables: str) -> None:
    """Two stages, the second of what the first made, from submission to every way to look at them."""
    # A terminal that knows no such letters must not end a command.
    variables |= {"CROSSCODER_SITE": "site.yaml", "PYTHONIOENCODING": "ascii"}
    configs = [project.config("first", output="'{data}/ä b'"), project.config("second", data="'{data}/ä b'", output="'{data}/c d'")]
    done = project.crosscoder("submit", *configs, "--executor", executor, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [RunDirectory(project.only_run(name)) for name in ("first", "second")]
    wait_until(lambda: all(finished(run) for run in runs), "the chain")
    assert runs[1].inputs()["data"]["data_id"]
    for command in (
        ["jobs"],
        ["show", str(runs[0].path)],
        ["show", "toy/first"],
        ["logs", "toy/first"],
        ["compare", "toy/first", "toy/second"],
    ):
        shown = project.crosscoder(*command, **variables)
        assert shown.returncode == 0, (command, shown.stderr)
    verified = project.crosscoder("verify", str(runs[1].path.resolve()), **variables)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    again = project.crosscoder("submit", *configs, "--executor", executor, **variables)
    assert again.stdout.count("skipped") == 2, again.stdout + again.stderr


@pytest.mark.parametrize("executor", ["debug", "local"])
def test_a_chain_runs_in_an_odd_place(project: ToyProject, executor: str) -> None:
    chain_works(project, executor)


@pytest.fixture
def quiet_cluster(cluster: PrivateCluster) -> Iterator[PrivateCluster]:
    yield cluster
    cluster.command("scancel", "--me")


@pytest.mark.slurm
def test_a_chain_runs_in_an_odd_place_through_slurm(project: ToyProject, quiet_cluster: PrivateCluster) -> None:
    chain_works(project, "slurm", SLURM_CONF=str(quiet_cluster.configuration))


def test_one_output_under_two_names_is_one_output(project: ToyProject, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(tmp_path / "dáta set")
    (tmp_path / "dáta set").mkdir()
    variables = {"CROSSCODER_SITE": "site.yaml"}
    first = project.config("first", output=f"'{tmp_path}/alias/made'", steps=100, step_seconds=0.2)
    assert project.crosscoder("submit", first, "--executor", "local", **variables).returncode == 0
    run = RunDirectory(project.only_run("first"))
    wait_until(lambda: run.progress(), "the first step")
    second = project.crosscoder("submit", project.config("second", output="'{data}/made'"), "--executor", "local", **variables)
    project.crosscoder("cancel", "--yes", run.reference, **variables)
    assert (second.returncode, "writes the same output" in second.stderr) == (1, True)
    wait_until(lambda: run.state() == "stopped", "the stop")


def test_a_place_whose_name_slurm_or_python_would_take_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a : in its path, where PYTHONPATH would end it"):
        frozen_code.frozen_variables(RunDirectory(tmp_path / "a:b/train/demo/1"))
    with pytest.raises(UserError, match="has a % in its path, which Slurm and submitit replace by job numbers"):
        slurm_job.check_path(RunDirectory(tmp_path / "100%a/train/demo/1"))
