"""What is damaged in one run costs that run, and no command over all of them."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_project import ToyProject
from waiting import wait_until

from pipeline.config.errors import UserError
from slurm.execution import terminal, worker
from slurm.record import activity, holder, run_directory
from slurm.record.holder import Holder
from slurm.record.run_directory import RunDirectory


@pytest.fixture
def project(tmp_path: Path) -> ToyProject:
    return ToyProject(tmp_path)


def finished_run(project: ToyProject, name: str, **values: object) -> RunDirectory:
    done = project.crosscoder("submit", "--executor", "debug", project.config(name, **values))
    assert done.returncode == 0, done.stderr
    return RunDirectory(project.only_run(name))


def listed(project: ToyProject) -> "tuple[dict[str, Any], subprocess.CompletedProcess[str]]":
    """The rows of `crosscoder jobs`, by name, and the command."""
    done = project.crosscoder("jobs", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)}, done


def test_damaged_job_records_hide_no_other_run(project: ToyProject) -> None:
    first, whole = finished_run(project, "broken"), finished_run(project, "whole")
    broken = [first, *(RunDirectory(first.path.with_name(f"{first.id[:-4]}dup{number}")) for number in range(4))]
    for run, content in zip(broken, [b"", b'{"stage": "toy"', b"[1, 2]", b"{}", b"\xff\xfe\x00"], strict=True):
        if run != first:
            shutil.copytree(first.path, run.path)
        (run.path / "job.json").unlink()
        (run.path / "job.json").write_bytes(content)
    rows, done = listed(project)
    assert list(rows) == ["whole"]
    assert [done.stderr.count(f"crosscoder: left out: {run.path / 'job.json'}") for run in broken] == [1] * 5
    assert done.stderr.count("the file is damaged") == 5
    again = project.crosscoder("submit", "--executor", "debug", "whole.yaml", "broken.yaml")
    assert again.returncode == 0, again.stderr
    for run in broken:
        shown = project.crosscoder("show", str(run.path))
        assert (shown.returncode, shown.stderr.count("\n"), "Traceback" in shown.stderr) == (1, 1, False)
    assert project.crosscoder("show", whole.reference).returncode == 0


def test_a_damaged_result_reads_as_failed_for_that_reason_and_the_run_can_be_taken_up(project: ToyProject) -> None:
    run = finished_run(project, "toy")
    (run.path / "result.json").write_bytes(b"\0" * 100)
    (run.path / "progress.json").write_bytes(b"\0" * 100)
    rows, _ = listed(project)
    assert rows["toy"]["state"] == "failed"
    assert f"{run.path / 'result.json'} is not valid JSON" in rows["toy"]["reason"]
    done = project.crosscoder("submit", "--resume", run.reference)
    assert done.returncode == 0, done.stderr
    assert run.state() == "finished"


def test_a_damaged_configuration_stops_its_own_run_and_no_other(project: ToyProject) -> None:
    config = project.config("toy", output="data/made", steps=100, step_seconds=0.1)
    done = project.crosscoder("submit", "--executor", "local", config)
    run = RunDirectory(project.only_run())
    try:
        wait_until(lambda: run.progress(), "the first step")
        (run.path / "config.yaml").write_bytes(b"\xff: [")
        assert finished_run(project, "other", output="data/other").state() == "finished"
        assert set(listed(project)[0]) == {"toy", "other"}
    finally:
        project.crosscoder("cancel", "--yes", run.reference)
    wait_until(lambda: run.state() == "stopped", "the stop")
    resumed = project.crosscoder("submit", "--resume", run.reference)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: "config.yaml" in str((run.result() or {}).get("error")), "the refusal")
    assert "Traceback" not in resumed.stderr


def test_a_line_after_one_that_a_full_disk_cut_short_is_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    run_directory.append_line(path, {"event": "start"})
    with open(path, "ab") as file:
        file.write(b'{"event": "en')
    run_directory.append_line(path, {"event": "start", "restart": 1})
    assert run_directory.read_lines(path) == [{"event": "start"}, {"event": "start", "restart": 1}]


# -- killed while it freezes ------------------------------------------------------------------------------------------


def test_a_submission_killed_at_any_moment_leaves_nothing_that_a_later_command_chokes_on(project: ToyProject) -> None:
    """Killed later and later, from the interpreter's start to the queued job; then everything is listed, shown and run."""
    config = project.config(output="data/made")
    command = [sys.executable, "-P", "-m", "slurm", "submit", "--executor", "local", config]
    began = time.monotonic()
    first = subprocess.run(command, cwd=project.root, env=project.environment(), capture_output=True, check=True, timeout=60)
    seconds = time.monotonic() - began
    assert first.returncode == 0
    for share in range(12):
        process = subprocess.Popen(
            [*command, "--again"], cwd=project.root, env=project.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds * (0.3 + share / 14))
        process.send_signal(signal.SIGKILL)
        process.wait()
    runs = run_directory.list_runs(project.runs)
    assert runs
    wait_until(lambda: not any(activity.is_busy(run, 0) for run in runs), "the jobs that were started")
    assert {row["state"] for row in json.loads(project.crosscoder("jobs", "--json").stdout)} <= {"finished", "new", "failed"}
    for run in runs:
        assert project.crosscoder("show", run.reference).returncode == 0
    last = project.crosscoder("submit", "--executor", "debug", config, "--again")
    assert last.returncode == 0, last.stderr


# -- locks, clocks and disks that are not as they should be -----------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_file_system_has_no_locks_submissions_go_on_and_one_process_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_lock(_file: Any, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    entered = []
    with activity.one_submission_at_a_time(tmp_path), activity.one_submission_at_a_time(tmp_path):
        entered.append(1)
    held: list[str] = []

    def work(job: str) -> None:
        with contextlib.suppress(UserError), Holder(tmp_path, job=job, restart=0):
            held.append(job)
            time.sleep(0.5)

    threads = [threading.Thread(target=work, args=(str(job),)) for job in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(held)) == (1, 1)


def leave_lock(directory: Path, **changes: object) -> Path:
    path = directory / "lock.json"
    path.write_text(json.dumps(Holder(directory, job="7", restart=0).lock | {"host": "elsewhere"} | changes))
    return path


def test_a_lock_touched_in_the_future_holds_a_run_no_longer_than_one_touched_long_ago(tmp_path: Path) -> None:
    path = leave_lock(tmp_path)
    assert holder.looks_held(path)
    for hours in (-5, 5):  # the clock of the file server, or this one's, was put right since
        moment = time.time() + hours * 3600
        os.utime(path, (moment, moment))
        assert not holder.looks_held(path)


def test_a_look_at_a_lock_that_a_kill_left_empty_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock.json"
    path.touch()
    os.utime(path, (1.0, 1.0))
    clock = SimpleNamespace(monotonic=itertools.count().__next__, time=time.time, sleep=pytest.fail)
    monkeypatch.setattr(holder, "time", clock)
    assert not holder.looks_held(path)


def test_a_disk_too_full_for_the_lock_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise UserError("no space left on device")

    monkeypatch.setattr(holder.records, "write_json", full)
    with pytest.raises(UserError, match="no space"), Holder(tmp_path, job="7", restart=0):
        pass
    assert not (tmp_path / "lock.json").exists()


@pytest.mark.parametrize("fails", ["read_json", "utime"])
def test_a_file_system_that_fails_for_a_moment_does_not_end_the_watch_over_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    monkeypatch.setattr(holder, "BEAT_SECONDS", 0.05)
    owner: Any = holder.records if fails == "read_json" else holder.os
    whole: Callable[..., Any] = getattr(owner, fails)
    failures = []

    def failing(*arguments: Any, **named: Any) -> Any:
        if len(failures) < 3 and threading.current_thread().name == "lock":
            failures.append(1)
            raise OSError(errno.EIO, "Input/output error")
        return whole(*arguments, **named)

    monkeypatch.setattr(owner, fails, failing)
    with Holder(tmp_path, job="7", restart=0) as mine:
        wait_until(lambda: len(failures) == 3, "the failures")
        before = mine.path.stat().st_mtime_ns
        wait_until(lambda: mine.path.stat().st_mtime_ns > before, "a beat after them")


def test_a_full_disk_under_the_log_or_a_thread_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "tensorboard/events")

    with terminal.logged_to(Path("/dev/full")), worker.threads_say_what_can_be_mended():
        print("a line")
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        print("another")
    said = capsys.readouterr()
    assert said.out == "a line\nanother\n"
    sentence = "no space left on device; free some space and start the same command again, what is finished is kept"
    assert said.err == f"crosscoder: tensorboard/events: {sentence}\n"


def test_the_heartbeat_goes_on_when_the_clock_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import run as run_module

    clocks = {"time": 1e9, "monotonic": 100.0}
    monkeypatch.setattr(run_module.time, "time", lambda: clocks["time"])
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clocks["monotonic"])
    run = run_module.Run(tmp_path)
    run.report("train", 1, 10, unit="steps")
    clocks.update(time=1e9 - 7200, monotonic=103.0)
    run.report("train", 4, 10, unit="steps")
    beat = json.loads((tmp_path / "progress.json").read_text())
    assert (beat["step"], beat["rate"], beat["seconds_left"]) == (4, 1.0, 6.0)


def test_a_run_directory_deleted_under_a_listing_is_left_out(tmp_path: Path) -> None:
    run = run_directory.create(tmp_path, "toy", "a")
    (run.path / "job.json").write_text("{}")
    found = RunDirectory(run.path)
    shutil.rmtree(run.path)
    with pytest.raises(UserError, match=r"job\.json does not exist"):
        found.check_record()
