"""What a job does about the backlog when it ends, and what a cancel does, where Slurm is a list of jobs with so much room."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import wait_until

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.changing import job_control
from slurm.changing.job_control import Target
from slurm.client import slurm_commands, slurm_queries
from slurm.client.job_output import Job
from slurm.execution import executor, requeue, waves
from slurm.execution.dependencies import not_wholly_queued
from slurm.execution.job_process import Process
from slurm.record import activity, backlog, run_directory
from slurm.record.run_directory import Json, RunDirectory

AWAY = slurm_commands.CommandFailed(
    'squeue exited 1: "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"; command: squeue', 1, ""
)
REFUSED = 'sbatch exited 1: "Batch job submission failed: Invalid account or account/partition combination specified"'


class FakeSlurm:
    """The queue, and room for so many jobs more; what it is asked and when."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.room = 0
        self.num_unanswered = 0
        self.fault = AWAY
        self.refusals: dict[RunDirectory, Exception] = {}
        self.tried: list[RunDirectory] = []
        self.commands: list[tuple[str, ...]] = []
        self.ending = "JobState=RUNNING"
        self.clock = 0.0
        self.when_asleep: Callable[[], object] = lambda: None

    def my_jobs(self) -> list[Job]:
        if self.num_unanswered:
            self.num_unanswered -= 1
            raise self.fault
        return self.jobs

    def run(self, *command: str, timeout_s: float = 0.0) -> str:
        self.my_jobs()
        self.commands.append(command)
        return f"JobId=1 Restarts=0 RunTime=00:01:00 TimeLimit=01:00:00 {self.ending}"

    def sleep(self, seconds: float) -> None:
        self.clock += seconds
        self.when_asleep()

    def add(self, run: RunDirectory, job_id: str, state: str = "RUNNING") -> None:
        comment = f'{{"run": "{run.reference}", "directory": "{run.path}"}}'
        raw_id = job_id.replace("_", "0")
        self.jobs.append(Job(job_id, state, array_id=job_id.partition("_")[0], raw_id=raw_id, comment=comment))

    def launch(self, run: RunDirectory, tasks: list[int]) -> list[Json]:
        self.tried.append(run)
        if run in self.refusals:
            raise self.refusals[run]
        room = 0 if not_wholly_queued(run.job()) else self.room
        queued, left = tasks[:room], tasks[room:]
        self.room -= len(queued)
        entries: list[Json] = [{"id": f"9{task}", "tasks": [task], "array": False} for task in queued]
        for entry in entries:
            self.add(run, entry["id"], "PENDING")
        run.write_job(run.job() | {"jobs": run.job()["jobs"] + entries})
        backlog.set_tasks(run, left, "no room")
        return entries


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm()
    clock = SimpleNamespace(monotonic=lambda: fake.clock, sleep=fake.sleep, time=lambda: fake.clock)
    for module in (waves, requeue):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(slurm_queries, "my_jobs", fake.my_jobs)
    monkeypatch.setattr(slurm_commands, "run", fake.run)
    monkeypatch.setattr(executor, "launch", fake.launch)
    return fake


def waiting_run(root: Path, name: str = "demo", *parents: RunDirectory) -> RunDirectory:
    """A run of which tasks 0 to 2 are job 7, and 3 to 5 not queued yet."""
    run = run_directory.create(root, "tokenize", name)
    job = {"stage": "tokenize", "name": name, "executor": "slurm", "submitted": 1.0, "num_tasks": 6}
    job |= {"jobs": [{"id": "7", "tasks": [0, 1, 2], "array": True}], "changes": [], "after": [str(parent.path) for parent in parents]}
    run.write_job(job)
    backlog.set_tasks(run, [3, 4, 5], "no room")
    return run


# -- one bad run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["nothing", "a heartbeat", "half a record"])
def test_a_run_without_a_record_leaves_the_backlog_and_the_others_are_queued(tmp_path: Path, slurm: FakeSlurm, left: str) -> None:
    deleted, other = waiting_run(tmp_path, "deleted"), waiting_run(tmp_path, "other")
    shutil.rmtree(deleted.path)
    if left == "a heartbeat":  # of a worker that goes on while the directory is deleted
        (deleted.path / "tasks/0").mkdir(parents=True)
        (deleted.path / "tasks/0/progress.json").write_text("{}")
    if left == "half a record":
        deleted.path.mkdir()
        (deleted.path / "job.json").write_text('{"stage": ')
    slurm.room = 2
    said = waves.queue_what_fits(tmp_path)
    assert said[0].startswith(f"{deleted.reference} is not waited with any more: {deleted.path / 'job.json'}")
    assert said[1:] == [f"{other.reference}: job 9{task} with 1 task queued" for task in (3, 4)]
    assert backlog.read(tmp_path).runs == [other]
    assert job_control.all_targets(Site(runs=tmp_path), []) == [Target([], other, is_whole=True)]


def test_all_that_is_mine_is_found_beside_a_run_without_a_record(tmp_path: Path, slurm: FakeSlurm) -> None:
    deleted, other = waiting_run(tmp_path, "deleted"), waiting_run(tmp_path, "other")
    (deleted.path / "job.json").unlink()
    assert job_control.all_targets(Site(runs=tmp_path), []) == [Target([], other, is_whole=True)]


@pytest.mark.parametrize("error", [UserError(REFUSED), KeyError("resources"), OSError(5, "Input/output error")])
def test_what_is_wrong_with_one_run_is_said_and_stops_no_other(tmp_path: Path, slurm: FakeSlurm, error: Exception) -> None:
    bad, good = waiting_run(tmp_path, "bad"), waiting_run(tmp_path, "good")
    slurm.refusals[bad] = error
    slurm.room = 3
    said = waves.queue_what_fits(tmp_path)
    assert said[0].startswith(f"{bad.reference}: ")
    assert str(error.args[-1]) in said[0]
    assert backlog.read(tmp_path).runs == [bad]
    assert backlog.tasks_of(good) == []


def test_a_damaged_parent_stops_its_child_alone(tmp_path: Path, slurm: FakeSlurm) -> None:
    parent = waiting_run(tmp_path, "parent")
    child, other = waiting_run(tmp_path, "child", parent), waiting_run(tmp_path, "other")
    backlog.set_tasks(parent, [], "")
    (parent.path / "job.json").write_text("[")
    slurm.room = 3
    said = waves.queue_what_fits(tmp_path)
    assert said[0].startswith(f"{child.reference}: {parent.path / 'job.json'} is not valid JSON")
    assert backlog.read(tmp_path).runs == [child]
    assert backlog.tasks_of(other) == []


@pytest.mark.parametrize("left", ["nothing", "a heartbeat"])
def test_a_child_whose_parent_was_deleted_is_given_up_and_its_record_says_why(tmp_path: Path, slurm: FakeSlurm, left: str) -> None:
    parent = waiting_run(tmp_path, "parent")
    child = waiting_run(tmp_path, "child", parent)
    shutil.rmtree(parent.path)
    if left == "a heartbeat":
        (parent.path / "tasks/0").mkdir(parents=True)
    why = f"needed {parent.reference}, whose directory was deleted"
    assert f"3 tasks of {child.reference} that were not queued yet cancelled ({why})" in waves.queue_what_fits(tmp_path)
    assert (child.job()["changes"][0]["what"], child.job()["changes"][0]["how"]) == ({"cancelled_tasks": [3, 4, 5]}, why)
    assert not (tmp_path / backlog.FILE).exists()


# -- staying ----------------------------------------------------------------------------------------------------------


def test_a_job_does_not_stay_for_what_slurm_refuses(tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    run = waiting_run(tmp_path)
    slurm.add(run, "7_0")
    slurm.refusals[run] = UserError(REFUSED)
    waves.look_at_end_of_job(tmp_path, "700")
    assert (slurm.clock, slurm.tried) == (0.0, [run])
    assert capsys.readouterr().out == f"{run.reference}: {REFUSED}\n"
    assert backlog.read(tmp_path) == backlog.Backlog([run], ["700"], None)


def test_nor_for_a_child_of_what_slurm_refuses(tmp_path: Path, slurm: FakeSlurm) -> None:
    parent = waiting_run(tmp_path, "parent")
    child = waiting_run(tmp_path, "child", parent)
    slurm.add(parent, "7_0")
    slurm.refusals[parent] = UserError(REFUSED)
    waves.look_at_end_of_job(tmp_path, "700")
    assert (slurm.clock, slurm.tried, backlog.read(tmp_path).runs) == (0.0, [parent, child], [parent, child])


def test_while_a_job_stays_for_room_what_slurm_refuses_is_not_tried_again(tmp_path: Path, slurm: FakeSlurm) -> None:
    refused, run = waiting_run(tmp_path, "refused"), waiting_run(tmp_path, "run")
    slurm.add(run, "7_0")
    slurm.refusals[refused] = UserError(REFUSED)
    slurm.when_asleep = lambda: setattr(slurm, "room", 3 if slurm.clock >= 5 else 0)
    waves.look_at_end_of_job(tmp_path, "700")
    assert (slurm.clock, slurm.tried.count(refused), slurm.tried.count(run)) == (5.0, 1, 6)
    assert backlog.read(tmp_path).runs == [refused]


def test_a_job_stays_no_longer_than_its_patience(tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    run = waiting_run(tmp_path)
    slurm.add(run, "7_0")
    waves.look_at_end_of_job(tmp_path, "700", patience_seconds=30.0)
    assert 30.0 <= slurm.clock <= 32.0
    assert capsys.readouterr().out == f"no room in the queue for 30 s; `crosscoder submit --resume` goes on with {run.reference}\n"


def test_a_job_does_not_stay_while_another_is_left_that_will_look(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = waiting_run(tmp_path)
    slurm.add(run, "7_0")
    slurm.add(run, "7_1")
    waves.look_at_end_of_job(tmp_path, "700")
    assert slurm.clock == 0.0


def test_jobs_that_are_gone_are_not_kept_among_those_that_have_looked(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = waiting_run(tmp_path)
    backlog.write(tmp_path, backlog.Backlog([run], ["700", "701", "702"], None))
    slurm.add(run, "7_1", "COMPLETING")
    slurm.add(run, "7_2", "COMPLETED")
    slurm.add(run, "7_3")
    waves.look_at_end_of_job(tmp_path, "703", patience_seconds=0.0)
    assert backlog.read(tmp_path).ended == ["701", "703"]


# -- a controller that is away ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["at every question", "at sbatch"])
def test_a_controller_that_is_away_for_a_while_does_not_end_the_waves(tmp_path: Path, slurm: FakeSlurm, where: str) -> None:
    run = waiting_run(tmp_path)
    slurm.add(run, "7_0")
    slurm.room = 3
    if where == "at sbatch":
        slurm.refusals[run] = UserError('sbatch exited 1: "Batch job submission failed: Socket timed out on send/recv operation"')
        slurm.when_asleep = lambda: slurm.refusals.clear() if slurm.clock >= 15 else None
    else:
        slurm.num_unanswered = 15
    waves.look_at_end_of_job(tmp_path, "700")
    assert (slurm.clock, backlog.tasks_of(run)) == (15.0, [])


def test_a_controller_that_stays_away_is_waited_for_as_long_as_patience_lasts(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = waiting_run(tmp_path)
    slurm.num_unanswered = 10**6
    waves.look_at_end_of_job(tmp_path, "700", patience_seconds=30.0)
    assert 30.0 <= slurm.clock <= 33.0
    told = f"no answer from Slurm for 30 s; `crosscoder submit --resume` goes on with {run.reference}\n"
    assert capsys.readouterr().out == f"{AWAY}\n{told}"


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (AWAY, True),
        (UserError("sbatch exited 1: Batch job submission failed: Unable to contact slurm controller (connect failure)"), True),
        (UserError('sbatch: "no answer within 60 s; is the controller up?"'), True),
        (slurm_commands.CommandFailed("the private cluster is stopped", 1, "Unable to contact slurm controller (connect failure)"), True),
        (UserError(REFUSED), False),
        (slurm_commands.CommandFailed("scontrol exited 1", 1, "slurm_load_jobs error: Invalid job id specified"), False),
    ],
)
def test_a_controller_that_is_away_is_told_from_one_that_refuses(error: UserError, is_so: bool) -> None:
    assert slurm_commands.is_out_of_contact(error) is is_so


def test_any_other_failure_of_a_command_ends_the_look_in_a_sentence(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting_run(tmp_path)
    slurm.num_unanswered, slurm.fault = 10**6, slurm_commands.CommandFailed("squeue exited 1: Invalid user", 1, "Invalid user")
    monkeypatch.setattr("sys.argv", ["waves", str(tmp_path)])
    monkeypatch.setenv("SLURM_JOB_ID", "700")
    with pytest.raises(SystemExit, match=r"^crosscoder: squeue exited 1: Invalid user$"):
        waves.main()
    assert slurm.clock == 0.0


STOPPED = Process("slurm", "7_0", 0, 0, 1, 0, 1)


def test_a_stopped_task_is_requeued_by_a_controller_that_is_away_for_a_while(tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.num_unanswered = 4
    assert requeue.go_on_later(waiting_run(tmp_path), 0, STOPPED) == "requeued as job 7_0"
    assert slurm.commands[-1] == ("scontrol", "requeue", "7_0")
    assert slurm.clock == 4 * requeue.POLL_SECONDS


@pytest.mark.parametrize("names_command", [True, False])
def test_a_stopped_task_that_nobody_takes_back_is_told_once_how_to_go_on(tmp_path: Path, slurm: FakeSlurm, names_command: bool) -> None:
    run = waiting_run(tmp_path)
    slurm.num_unanswered = 10**6
    command = f"`crosscoder submit --resume {run.reference}`"
    slurm.refusals[run] = UserError(f"{REFUSED}; mend it and run {command}" if names_command else REFUSED)
    said = requeue.go_on_later(run, 0, STOPPED)
    assert said.count(command) == 1
    assert REFUSED in said
    assert slurm.clock <= requeue.SLURM_TIMEOUT_S


# -- cancelling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "noted", "goes_on"),
    [
        (["RUNNING"], [], True),
        (["PENDING"], [], True),
        (["COMPLETING", "CANCELLED"], [], False),
        (["COMPLETING"], ["7_0"], True),
        ([], [], False),
    ],
)
def test_scancel_of_one_task_concerns_that_task_and_of_all_the_run(
    tmp_path: Path, slurm: FakeSlurm, others: list[str], noted: list[str], goes_on: bool
) -> None:
    run = waiting_run(tmp_path)
    slurm.ending = "JobState=COMPLETING"
    slurm.add(run, "7_0", "COMPLETING")
    for number, state in enumerate(others, start=1):
        slurm.add(run, f"7_{number}", state)
    if noted:
        job_control.note_change(run, {"cancelled": noted}, how="scancel")
    slurm.room = 1
    waves.look_at_end_of_job(tmp_path, "700", patience_seconds=0.0)
    assert (backlog.tasks_of(run), slurm.tried) == (([4, 5], [run]) if goes_on else ([], []))
    assert run.cancelled_tasks() == (set() if goes_on else {3, 4, 5})


def test_cancelling_one_task_or_one_of_several_jobs_gives_up_nothing_else(tmp_path: Path, slurm: FakeSlurm) -> None:
    run = waiting_run(tmp_path)
    run.write_job(run.job() | {"jobs": [*run.job()["jobs"], {"id": "8", "tasks": [3], "array": False}]})
    for job in ("7_1", "7_2", "8"):
        slurm.add(run, job)
    site = Site(runs=tmp_path)
    assert [target.is_whole for target in job_control.find_targets(["7_1", "7", "8", run.reference], site, slurm.jobs)] == [
        *(False, False, False),
        True,
    ]
    assert [target.is_whole for target in job_control.all_targets(site, slurm.jobs)] == [True, True]
    assert [target.is_whole for target in job_control.find_targets(["7"], site, slurm.jobs[:2])] == [True]
    assert list(job_control.cancel(job_control.find_targets(["7_1"], site, slurm.jobs))) == ["7_[1] cancelled"]
    assert backlog.tasks_of(run) == [3, 4, 5]
    assert run.cancelled_jobs() == {"7_1"}


def test_cancelling_a_run_queues_what_of_others_fits_and_cancelling_all_queues_nothing(tmp_path: Path, slurm: FakeSlurm) -> None:
    first, second = waiting_run(tmp_path, "first"), waiting_run(tmp_path, "second")
    slurm.room = 2
    said = list(job_control.cancel([Target([], first, is_whole=True)]))
    assert said[1:] == [f"{second.reference}: job 9{task} with 1 task queued" for task in (3, 4)]
    third = waiting_run(tmp_path, "third")
    slurm.room = 2
    targets = job_control.all_targets(Site(runs=tmp_path), slurm.jobs)
    list(job_control.cancel(targets))
    assert {target.run for target in targets} == {second, third}
    assert (first not in slurm.tried, slurm.tried) == (True, [second])
    assert not (tmp_path / backlog.FILE).exists()


# -- who writes job.json ----------------------------------------------------------------------------------------------


def test_a_change_waits_for_the_submission_under_way_and_neither_loses_the_others_entry(tmp_path: Path) -> None:
    run = waiting_run(tmp_path)
    note = threading.Thread(target=job_control.note_change, args=(run, {"held": ["7"]}), kwargs={"how": "scontrol"})
    with activity.one_submission_at_a_time(tmp_path):
        job = run.job()
        note.start()
        note.join(0.2)
        assert note.is_alive()
        with activity.one_submission_at_a_time(tmp_path / "." / "tokenize" / ".."):  # who has it may take it again
            records.write_json(run.path / "job.json", job | {"jobs": [*job["jobs"], {"id": "8", "tasks": [3], "array": False}]})
        note.join(0.1)
        assert note.is_alive()
    wait_until(lambda: not note.is_alive(), "the note")
    assert ([entry["id"] for entry in run.job()["jobs"]], run.job()["changes"][0]["what"]) == (["7", "8"], {"held": ["7"]})
