import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import PATIENCE_SECONDS

from pipeline.config.errors import UserError
from slurm.record import holder
from slurm.record.holder import Holder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(holder, "STALE_SECONDS", 0.6)


def fake_clock(monkeypatch: pytest.MonkeyPatch, when_asleep: Callable[[], object]) -> list[float]:
    """A clock, in seconds, that goes on while somebody sleeps, and not while the machine is busy with other things."""
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        when_asleep()

    monkeypatch.setattr(holder, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep, time=time.time))
    return clock


def leave_lock(directory: Path, **changes: object) -> Path:
    """A lock as another holder wrote it: this process's own, changed."""
    lock = Holder(directory, job="7", restart=0).lock | {"token": "other"} | changes
    (directory / "lock.json").write_text(json.dumps(lock))
    return directory / "lock.json"


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_holder_is_refused_while_the_first_works_and_let_in_after(tmp_path: Path) -> None:
    with Holder(tmp_path, job="7", restart=0):
        with (
            pytest.raises(UserError, match=rf"being worked on by process {os.getpid()} on .* \(job 7\): one at a time"),
            Holder(tmp_path, job="8", restart=0),
        ):
            pass
        assert holder.looks_held(tmp_path / "lock.json")
    assert not (tmp_path / "lock.json").exists()
    with Holder(tmp_path, job="8", restart=0):
        pass


def test_the_lock_of_an_ended_process_is_taken_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave_lock(tmp_path, pid=ended_pid())
    assert not holder.looks_held(path)
    clock = fake_clock(monkeypatch, lambda: None)
    with Holder(tmp_path, job="8", restart=0) as mine:
        assert json.loads(path.read_text()) == mine.lock
    assert clock == [0.0]


def test_a_pid_that_another_process_got_since_counts_as_ended(tmp_path: Path) -> None:
    leave_lock(tmp_path, process_started=1)
    with Holder(tmp_path, job="8", restart=0):
        pass


def test_another_hosts_lock_is_taken_over_only_if_nobody_touches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave_lock(tmp_path, host="elsewhere")
    clock = fake_clock(monkeypatch, lambda: os.utime(path, (clock[0], clock[0])))
    with pytest.raises(UserError, match="on elsewhere"), Holder(tmp_path, job="8", restart=0):
        pass
    clock = fake_clock(monkeypatch, lambda: None)
    with Holder(tmp_path, job="8", restart=0):
        assert clock[0] >= holder.STALE_SECONDS


def test_a_lock_that_a_kill_left_empty_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder, "HALF_MADE_SECONDS", 0.2)
    (tmp_path / "lock.json").write_text("")
    with Holder(tmp_path, job="8", restart=0):
        pass


PROGRAM = """
import sys, time
from pathlib import Path
from slurm.record import holder
holder.BEAT_SECONDS = 0.1
with holder.Holder(Path(sys.argv[1]), job="7", restart=int(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def start_holder(directory: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM, str(directory), "0"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_later_attempt_of_the_same_job_takes_over_and_the_earlier_one_ends_without_saving(tmp_path: Path) -> None:
    first = start_holder(tmp_path)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with Holder(tmp_path, job="7", restart=1):
            assert first.wait(PATIENCE_SECONDS) == holder.LOST_EXIT_CODE
        assert "took it over; this process ends without saving" in first.communicate()[1]
    finally:
        first.kill()
        first.communicate()


def test_an_earlier_attempt_does_not_take_over_from_a_later_one(tmp_path: Path) -> None:
    leave_lock(tmp_path, restart=2)
    with pytest.raises(UserError, match="one at a time"), Holder(tmp_path, job="7", restart=1):
        pass


def test_a_holder_whose_run_directory_was_deleted_ends(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        (tmp_path / "lock.json").unlink()
        assert process.wait(PATIENCE_SECONDS) == holder.LOST_EXIT_CODE
        assert "its lock was deleted" in process.communicate()[1]
    finally:
        process.kill()
        process.communicate()
