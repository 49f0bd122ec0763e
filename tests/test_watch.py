"""The live view and the listing on a real Slurm, while it works and after it has forgotten."""

import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_project import ToyProject
from waiting import PATIENCE_SECONDS, wait_until

from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.client import slurm_commands, slurm_queries
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
    monkeypatch.setenv("COLUMNS", "400")  # room for the log's whole path
    began = time.monotonic()
    watch.watch(Site(runs=project.runs), run.reference, interval_s=0.5, looks=3)
    assert calls.read_text().split() == ["squeue"] * 3
    assert time.monotonic() - began >= 1.0
    shown = capsys.readouterr().out
    assert "running" in shown
    assert f"{run.path}/tasks/" in shown  # the log's name
    assert re.search(r"toy count +\d", shown)
    assert re.search(r"_\[0-199\] .* 200 held", shown)
    cluster.command("scancel", "--me")


@pytest.mark.slurm
def test_a_queue_that_does_not_answer_is_said_and_asked_again(
    tmp_path: Path, cluster: PrivateCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([[], UserError("squeue exited 1: no controller"), []])

    def answer() -> list[object]:
        value = next(answers)
        if isinstance(value, UserError):
            raise value
        return value

    monkeypatch.setattr(slurm_queries, "my_jobs", answer)
    looker = watch.Looker(Site(runs=tmp_path))
    for trouble in ("", "squeue exited 1: no controller", ""):
        looker.look()
        assert looker.trouble == trouble
        shown = "\n".join(line.plain for line in watch.view(looker, None, width=100, height=30, interval_s=1.0))
        assert ("no answer since" in shown) == bool(trouble)
        assert "nothing queued" in shown  # the last table stays


def test_a_first_look_that_fails_does_not_end_the_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise UserError("squeue exited 1: no controller")

    monkeypatch.setattr(slurm_queries, "my_jobs_if_any", fail)
    looker = watch.Looker(Site(runs=tmp_path))
    looker.look()
    assert [line.plain for line in watch.view(looker, None, width=100, height=30, interval_s=1.0)][1:] == [
        "no answer, asking on: squeue exited 1: no controller"
    ]


class Terminal:
    """A pseudo-terminal with `crosscoder watch` in it."""

    def __init__(self, project: ToyProject, *arguments: str) -> None:
        self.output = b""
        pid, self.file = pty.fork()
        if pid == 0:
            os.chdir(project.root)
            os.execve(
                sys.executable,
                [sys.executable, "-P", "-m", "slurm", "watch", *arguments],
                project.environment(TERM="xterm", LINES="24", COLUMNS="80"),
            )
        self.pid = pid
        self.resize(24, 100)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read_until(self, text: bytes) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            if select.select([self.file], [], [], 0.2)[0]:
                self.output += os.read(self.file, 65536)

    def press(self, key: bytes) -> int:
        """The exit code after `key`."""
        os.write(self.file, key)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline, "the view goes on"
            if select.select([self.file], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    self.output += os.read(self.file, 65536)
        os.close(self.file)
        return os.waitstatus_to_exitcode(ended[1])


@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_the_view_follows_the_terminals_size_and_ends_with_q_and_ctrl_c(tmp_path: Path, key: bytes) -> None:
    project = ToyProject(tmp_path)
    assert project.crosscoder("run", project.config(steps=1)).returncode == 0
    terminal = Terminal(project)
    terminal.read_until(b"1 finished")
    terminal.output = b""
    terminal.resize(5, 40)
    terminal.read_until(b"lines more")
    assert terminal.press(key) == 0
    assert b"\x1b[?1049l" in terminal.output  # the screen as it was before


def test_the_view_needs_a_terminal(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="watch needs a terminal; `crosscoder jobs` prints the table once"):
        watch.watch(Site(runs=tmp_path), None, interval_s=1.0)


@pytest.mark.slurm
def test_after_the_private_cluster_was_stopped_its_jobs_are_said_to_wait_and_the_next_start_takes_them_up(
    tmp_path: Path, start_cluster: Callable[..., PrivateCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start_cluster()
    monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))
    project = ToyProject(tmp_path)
    run, held = submit(project, cluster), submit(project, cluster)
    cluster.command("scancel", str(held.job_of_task(0)))
    held.write_job({**held.job(), "changes": [{"what": {"cancelled": [held.job_of_task(0)]}}]})
    wait_for_progress(run)
    cluster.stop()
    with monkeypatch.context() as patch:
        patch.setattr(slurm_queries, "my_jobs_if_any", pytest.fail)  # squeue would try for 9 s
        rows = {row.run: row for row in job_listing.gather(Site(runs=project.runs)).rows()}
    assert (rows[run.reference].state, rows[run.reference].reason) == ("waiting", slurm_commands.CLUSTER_STOPPED)
    assert rows[held.reference].state == "cancelled"
    monkeypatch.delenv("SLURM_CONF")
    assert slurm_commands.stopped_private_cluster(cluster.directory) == cluster.directory
    cluster.start(layout.pretended())
    assert slurm_commands.stopped_private_cluster(cluster.directory) is None
    monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))
    (again,) = [row for row in job_listing.gather(Site(runs=project.runs)).rows() if row.run == run.reference]
    assert (again.state, again.reason) != ("waiting", slurm_commands.CLUSTER_STOPPED)
    cluster.command("scancel", "--me")


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
    assert (row.job, row.state) == (job, "failed")
    assert row.reason in ("exit code 9", "exit code 137")  # of srun when its process is killed: 137 from some release after 24.11 on
    (unexplained,) = job_listing.gather(Site(runs=project.runs), ask_accounting=False).rows()
    assert unexplained.state == "lost"
