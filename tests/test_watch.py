"""The live view and the listing on a real Slurm, while it works and after it has forgotten."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from toy_project import ToyProject
from waiting import wait_until

from pipeline.config.site_file import Site
from slurm.client import slurm_queries
from slurm.cluster import layout
from slurm.cluster.daemons import PrivateCluster
from slurm.record.run_directory import RunDirectory
from slurm.watching import job_listing, watch


def submit(project: ToyProject, cluster: PrivateCluster, *arguments: str) -> RunDirectory:
    done = project.crosscoder("submit", project.config(step_seconds=0.1, steps=1000), *arguments, SLURM_CONF=str(cluster.configuration))
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^run (.*)$", done.stdout, re.M)
    assert found
    return RunDirectory(Path(found[1]))


def wait_for_progress(run: RunDirectory) -> None:
    """Until the run's first task has made a step and printed its first line."""
    wait_until(lambda: run.progress() and any("hello from" in path.read_text() for path in run.log_files()), "the first step")


@pytest.mark.slurm
def test_a_look_costs_one_squeue_however_many_jobs_there_are(
    tmp_path: Path, cluster: PrivateCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = ToyProject(tmp_path / "toy")
    run = submit(project, cluster, "resources.array_tasks=6")
    cluster.command("sbatch", "-H", "--array=0-199", "-o", "/dev/null", "--wrap", "true")
    wait_for_progress(run)
    calls = tmp_path / "calls"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("squeue", "sinfo", "scontrol", "sacct"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} >> {calls}\nexec {shutil.which(name)} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "200")
    waits: list[float] = []
    watch.watch(Site(runs=project.runs), run.reference, interval_s=7.0, looks=3, sleep=waits.append)
    assert calls.read_text().split() == ["squeue"] * 3
    assert waits == [7.0, 7.0]
    shown = capsys.readouterr().out
    assert "running" in shown
    assert f"{run.path}/tasks/" in shown  # the log's name
    assert "hello from" in shown
    cluster.command("scancel", "--me")


@pytest.mark.slurm
def test_a_queue_that_does_not_answer_is_said_and_asked_again(
    tmp_path: Path, cluster: PrivateCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.config.errors import UserError

    answers = iter([[], UserError("squeue exited 1: no controller"), []])

    def answer() -> list[object]:
        value = next(answers)
        if isinstance(value, UserError):
            raise value
        return value

    monkeypatch.setattr(slurm_queries, "my_jobs", answer)
    watch.watch(Site(runs=tmp_path), None, interval_s=1.0, looks=3, sleep=lambda _: None)
    assert capsys.readouterr().out.count("squeue exited 1: no controller") <= 1
    assert next(answers, "asked three times") == "asked three times"


@pytest.mark.slurm
@pytest.mark.slurm_accounting
def test_accounting_tells_how_a_job_ended_that_the_queue_has_forgotten(
    tmp_path: Path, start_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(start_cluster)
    cluster: PrivateCluster = start_cluster(layout.pretended(accounting=True))
    monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))
    project = ToyProject(tmp_path)
    run = submit(project, cluster)
    job = str(run.job_of_task(0))
    wait_for_progress(run)
    cluster.command("scontrol", "requeue", job)  # a first run, that accounting keeps beside the second
    wait_until(lambda: [line["restart"] for line in run.attempts() if line["event"] == "start"] == [0, 1], "the second attempt")
    os.kill(run.attempts()[-1]["pid"], signal.SIGKILL)  # no word, no result
    wait_until(lambda: slurm_queries.my_jobs()[0].state != "RUNNING", "the job's end")
    assert slurm_queries.has_accounting(slurm_queries.configuration())
    wait_until(lambda: slurm_queries.finished_jobs([job])[:1] and slurm_queries.finished_jobs([job])[0].is_final, "accounting's word of it")
    cluster.stop()
    cluster.start(layout.pretended(accounting=True), fresh=True)
    assert slurm_queries.my_jobs() == []
    (row,) = job_listing.gather(Site(runs=project.runs)).rows()
    assert (row.job, row.state, row.reason) == (job, "failed", "exit code 9")
    (unexplained,) = job_listing.gather(Site(runs=project.runs), ask_accounting=False).rows()
    assert unexplained.state == "lost"
