"""Files in a directory that others may write to: no link is followed, nothing foreign is overwritten, and two people can share one."""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from other_user import as_user, needs_root

from pipeline import records
from pipeline.config import load
from pipeline.config.errors import UserError, sentence_of
from pipeline.config.site_file import Site
from pipeline.run import Run
from slurm.execution import waves
from slurm.execution.submission_environment import detached
from slurm.execution.terminal import logged_to
from slurm.record import backlog, holder, output_writer, run_directory, run_reference, snapshot
from slurm.record.activity import SUBMISSION_LOCK, one_submission_at_a_time
from slurm.record.holder import Holder
from slurm.record.output_writer import only_writer
from slurm.record.record_view import as_text
from slurm.record.run_directory import RunDirectory, append_line
from slurm.submission.freezing import Freezer

# -- links and foreign files ------------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user's that a link of somebody else's leads to."""
    path = tmp_path / "victim"
    path.write_text("mine\n")
    return path


def append_metrics(place: Path) -> None:
    Run(place).log_metrics({"step": 1})


def print_to_log(place: Path) -> None:
    with logged_to(place / "terminal.log"):
        print("hello")


def print_detached(place: Path) -> None:
    with detached(place / "controller.out"):
        pass


def hold_output(place: Path) -> None:
    with only_writer([place / "tokens"], RunDirectory(place / "run"), "7"):
        pass


def lock_submissions(place: Path) -> None:
    with one_submission_at_a_time(place):
        pass


@pytest.mark.parametrize(
    ("name", "act"),
    [
        (SUBMISSION_LOCK, lock_submissions),
        (".tokens.writer", hold_output),
        ("attempts.jsonl", lambda place: append_line(place / "attempts.jsonl", {"event": "start"})),
        ("metrics.jsonl", append_metrics),
        ("terminal.log", print_to_log),
        ("controller.out", print_detached),
    ],
)
def test_what_is_opened_to_stay_follows_no_link(tmp_path: Path, victim: Path, name: str, act: Callable[[Path], None]) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / name).symlink_to(victim)
    with pytest.raises(UserError, match=rf"{name} is a link, expected a .* that this program made; remove it"):
        act(tmp_path / "place")
    assert victim.read_text() == "mine\n"
    (tmp_path / "place" / name).unlink()
    (tmp_path / "place" / name).symlink_to(tmp_path / "not-there")
    with pytest.raises(UserError, match="is a link"):
        act(tmp_path / "place")
    assert not (tmp_path / "not-there").exists()


def test_a_temporary_file_follows_no_link_that_was_put_in_its_place(tmp_path: Path, victim: Path) -> None:
    temporary = tmp_path / f".x.json.{records.socket.gethostname()}.{os.getpid()}.tmp"
    temporary.symlink_to(victim)
    records.write_json(tmp_path / "x.json", {"a": 1})
    assert victim.read_text() == "mine\n"
    assert not (tmp_path / "x.json").is_symlink()
    assert records.read_json(tmp_path / "x.json") == {"a": 1}


def test_a_lock_that_is_a_link_is_replaced_and_what_it_leads_to_stays(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "HALF_MADE_SECONDS", 0.05)
    monkeypatch.setattr(holder, "BEAT_SECONDS", 0.02)
    (tmp_path / "lock.json").symlink_to(victim)
    before = victim.stat().st_mtime_ns
    with Holder(tmp_path, job="7", restart=0) as mine:
        assert holder.read_lock(mine.path) == mine.lock
        assert not mine.path.is_symlink()
    assert (victim.read_text(), victim.stat().st_mtime_ns) == ("mine\n", before)


def test_a_file_that_only_has_the_name_of_a_lock_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".tokens.writer").write_text("a novel\n")
    with pytest.raises(UserError, match=r"\.tokens\.writer is not a lock that this program made; move it away"):
        hold_output(tmp_path)
    assert (tmp_path / ".tokens.writer").read_text() == "a novel\n"


# -- two people -------------------------------------------------------------------------------------------------------

ANA, BEN, GROUP = 54_321, 54_322, 54_320


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody may enter: pytest's own may be closed."""
    with tempfile.TemporaryDirectory(prefix="shared-root-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def shared(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of runs of a group, as the guide says to make one."""
    root = place / "runs"
    root.mkdir()
    os.chown(root, ANA, GROUP)
    root.chmod(0o2775)
    code = place / "clone"
    (code / "pipeline").mkdir(parents=True)
    (code / "pipeline/run.py").write_text("one\n")
    monkeypatch.setattr(snapshot, "source_root", lambda: code)
    submit(place / "of-root")  # imports all that the others, who may not read this interpreter's files, need
    return root


def submit(runs: Path, code_of: RunDirectory | None = None) -> Path:
    """A run of count, frozen as a submission does it."""
    site = Site(runs=runs)
    config = load.from_values({"stage": "count", "name": "demo", "tokens": str(runs / "tokens")}, where="x", site=site)
    with one_submission_at_a_time(runs):
        run = Freezer(site, executor="run").freeze(config, where="x", pending=dict.fromkeys(config.inputs(), runs), code_of=code_of)
    return run.path


def of(user: int, function: Callable[[], Any], *, umask: int = 0o002) -> Any:
    """What the function gives to one of the two, both in the group; an error in one sentence."""

    def said() -> Any:
        try:
            return function()
        except OSError as error:
            return sentence_of(error) or repr(error)
        except UserError as error:
            return str(error)

    return as_user(user, said, groups=[GROUP], umask=umask)


@needs_root
def test_two_people_of_a_group_share_a_root_of_runs(shared: Path) -> None:
    first = of(ANA, lambda: submit(shared))
    run = RunDirectory(first)
    assert of(BEN, lambda: [found.path for found in run_directory.list_runs(shared)]) == [first]
    assert "count/demo" in of(BEN, lambda: as_text(run, []))
    of(BEN, lambda: snapshot.check(first))
    second, third = of(BEN, lambda: submit(shared)), of(BEN, lambda: submit(shared, run))
    assert first.stat().st_uid == ANA
    assert {path.stat().st_uid for path in (second, third)} == {BEN}
    assert of(ANA, lambda: run_reference.find("count/demo", shared).run.path) in (second, third)
    assert of(ANA, lambda: submit(shared)).exists()


@needs_root
def test_an_output_that_the_other_writes_is_said_and_a_lock_that_he_left_is_taken(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_writer, "PATIENCE_SECONDS", 0.1)
    lock = shared / ".tokens.writer"
    lock.write_text('{"run": "/runs/count/demo/anas", "host": "n1", "pid": 4711, "job": "7"}')
    os.chown(lock, ANA, GROUP)  # as it is made under umask 022: only ana may write to it
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        assert "is being written by /runs/count/demo/anas (process 4711 on n1, job 7)" in of(BEN, lambda: hold_output(shared))
    assert of(BEN, lambda: hold_output(shared)) is None
    assert not lock.exists()


@needs_root
def test_a_backlog_of_two_is_queued_by_each_ones_own_jobs(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(of(ANA, lambda: submit(shared)))
    of(ANA, lambda: backlog.set_tasks(run, [0], "no room"))
    queued: list[RunDirectory] = []
    monkeypatch.setattr(waves.executor, "launch", lambda run, tasks: queued.append(run) or [])

    def queue() -> list[str]:
        waves._queue_each(shared, set())
        return [run.reference for run in queued]

    assert of(BEN, queue) == []
    assert of(ANA, queue) == [run.reference]


@needs_root
def test_without_a_group_the_one_who_comes_second_is_told_how_to_share(shared: Path) -> None:
    of(ANA, lambda: submit(shared), umask=0o022)
    told = of(BEN, lambda: submit(shared))
    assert "permission denied, it is of uid 54321; people share a directory through a group (chgrp -R GROUP DIR;" in told
    assert "umask 002 in the shell of each), else choose a place of your own" in told
    assert "\n" not in told


@needs_root
def test_what_is_closed_to_the_other_is_left_out_or_said_and_never_a_traceback(shared: Path) -> None:
    closed = RunDirectory(of(ANA, lambda: submit(shared)))
    (closed.path / "job.json").chmod(0o600)
    assert of(BEN, lambda: run_directory.list_runs(shared)) == []
    assert "job.json: permission denied, it is of uid 54321" in of(BEN, closed.job)
    assert "setup.json: permission denied, it is of uid 54321" in of(BEN, lambda: records.read_json(closed.path / "setup.json"))
