"""My jobs, joined from Slurm's queue, the run directories and their heartbeats."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from job_rows import NOW, beat, job, only, task

from pipeline import records
from slurm.client import job_reasons
from slurm.record import run_directory
from slurm.record.holder import Holder
from slurm.watching import job_listing, job_table, jobs, watch

# -- one row ----------------------------------------------------------------------------------------------------------


def test_a_running_task_shows_place_progress_rate_and_expected_end() -> None:
    row = only([job(gpus="gpu:h200:1")], [task(progress=beat())])
    assert (row.job, row.run, row.stage, row.state, row.node) == ("1042", "train/demo/20261123-091530-k3f9", "train", "running", "n1")
    assert (row.elapsed_s, row.limit_s, row.percent, row.rate, row.gpus) == (600, 3600, 25.0, 0.5, "gpu:h200:1")
    assert row.ends == NOW - 2 + 1500
    assert row.warning == ""


def test_an_end_past_the_time_limit_is_warned_of() -> None:
    row = only([job()], [task(progress=beat(seconds_left=3600.0))])
    # Started 600 s ago with a limit of 3,600 s: 3,000 s are left, and 3,598 s are needed.
    assert row.warning == "needs 9 min 58 s more than its time limit"


def test_a_run_that_fell_silent_is_warned_of() -> None:
    assert only([job()], [task(progress=beat(time=NOW - 300))]).warning == "no sign of life for 5 min 0 s"


def test_of_an_earlier_attempts_heartbeat_only_the_progress_counts() -> None:
    row = only([job(elapsed_s=10, started=NOW - 10)], [task(progress=beat(time=NOW - 400))])
    assert (row.percent, row.stopped_at, row.rate, row.ends, row.warning) == (None, 25.0, None, None, "")


ENDED = {
    "failed": {"file_state": "failed", "result": {"status": "failed", "error": "no disk"}},
    "stopped": {"file_state": "stopped", "result": {"status": "stopped", "error": "SIGTERM"}},
    "cancelled": {"was_cancelled": True},
    "lost": {},
    "waiting": {},
    "held": {},
    "finished": {"file_state": "finished", "result": {"status": "finished", "error": None}},
}
QUEUED = {"waiting": job(state="PENDING", reason="Priority"), "held": job(state="PENDING", reason="JobHeldUser", priority=0)}


@pytest.mark.parametrize("state", [state for state in jobs.STATES if state not in ("running", "new")])
def test_only_what_runs_has_a_percentage(state: str) -> None:
    """Of what does not, the last heartbeat is of its past: 100 % of a phase says nothing of what failed after it."""
    queue = [QUEUED[state]] if state in QUEUED else []
    for step, stopped_at in ((430, 43.0), (1000, None)):
        row = only(queue, [task(progress=beat(step=step), **ENDED[state])])
        assert (row.state, row.rate, row.ends) == (state, None, None)
        assert row.percent is None or state == "finished"
        assert row.stopped_at == (None if state == "finished" else stopped_at)
        (line,) = job_table.fold([row])
        cells = job_table.cells(line, NOW)
        assert cells[6] == ""
        assert ("stopped at 43 %" in cells[7]) == (row.stopped_at is not None)
        assert "100 %" not in " ".join(cells)


def test_where_several_stopped_stands_in_one_line_with_the_phase() -> None:
    tasks = [task(f"1042_{i}", task=i, num_tasks=3, progress=beat(phase="statistics", step=100 * i), **ENDED["failed"]) for i in (1, 2, 10)]
    (line,) = job_table.fold(jobs.join([], tasks, now=NOW))
    assert job_table.cells(line, NOW)[7] == "no disk; stopped at 10-20 % of statistics"


def test_a_task_that_was_started_again_says_how_far_it_was_until_it_reports() -> None:
    row = only([job(elapsed_s=10, started=NOW - 10)], [task(progress=beat(time=NOW - 400))])
    assert job_table.cells(job_table.fold([row])[0], NOW)[6:] == ["", "stopped at 25 % before"]


def test_the_runs_own_result_wins_over_slurms_word() -> None:
    finished = {"status": "finished", "started": NOW - 100, "ended": NOW - 40, "error": None}
    assert only([job(state="COMPLETED")], [task(file_state="finished", result=finished)]).state == "finished"
    forgotten = only([], [task(file_state="finished", result=finished)])
    assert (forgotten.state, forgotten.elapsed_s) == ("finished", 60)
    failed = {"status": "failed", "error": "Traceback:\n  deep\nValueError: loss is nan"}
    row = only([job(state="FAILED", reason="NonZeroExitCode")], [task(file_state="failed", result=failed)])
    assert (row.state, row.reason) == ("failed", "ValueError: loss is nan")


def test_a_result_of_an_earlier_submission_does_not_hide_that_it_waits_again() -> None:
    failed = {"status": "failed", "error": "out of disk"}
    row = only([job(state="PENDING", reason="Priority")], [task(file_state="failed", result=failed)])
    assert (row.state, row.reason) == ("waiting", "jobs of higher priority come first")


def test_a_job_that_ended_well_without_a_result_failed() -> None:
    row = only([job(state="COMPLETED")], [task()])
    assert (row.state, row.reason) == ("failed", "ended without a result; its log may say why")


def test_a_job_that_slurm_forgot_and_that_left_no_result_is_lost() -> None:
    row = only([], [task(file_state="running")])
    assert row.state == "lost"
    assert "crosscoder submit --resume train/demo/20261123-091530-k3f9" in row.reason


def test_where_no_slurm_answers_a_job_is_not_said_to_be_gone() -> None:
    rows = jobs.join(None, [task(), task("8", "finished", result={"status": "finished"})], now=NOW)
    assert [(row.state, row.reason) for row in rows] == [
        ("lost", "no Slurm answers on this machine, so what became of its job is not known here"),
        ("finished", ""),
    ]


def test_accounting_tells_how_a_forgotten_job_ended() -> None:
    lost = [task("1042", "queued"), task("1043", "finished", result={"status": "finished"}), task("7", "running", executor="local")]
    assert jobs.forgotten([job("1050")], lost) == ["1042"]
    assert jobs.forgotten([job("1042")], lost) == []
    row = only([], [task()], remembered=[job(state="OUT_OF_MEMORY")])
    assert (row.state, row.reason) == ("failed", "used more memory than it asked for")


def test_what_was_cancelled_stays_cancelled_when_slurm_has_forgotten_it() -> None:
    assert only([], [task(was_cancelled=True)]).state == "cancelled"
    row = only([], [task(failed_parents=("cache/demo/20261123-091529-x2aa",))])
    assert (row.state, row.reason) == ("cancelled", "it needed cache/demo/20261123-091529-x2aa, which failed or was cancelled")


def test_what_was_stopped_or_cancelled_says_by_what_and_how_to_go_on() -> None:
    again = "`crosscoder submit --resume train/demo/20261123-091530-k3f9` goes on from there"
    stopped = task(file_state="stopped", result={"status": "stopped", "error": "SIGTERM"})
    assert only([], [stopped]).state == "stopped"
    assert only([], [stopped]).reason == f"was stopped (SIGTERM); {again}"
    # The same words whether Slurm still knows the job or not, so that tasks of one array share a line.
    assert only([job(state="CANCELLED")], [task()]).reason == only([], [task(was_cancelled=True)]).reason == f"was cancelled; {again}"


def test_however_a_task_of_a_cancelled_array_was_ended_it_reads_cancelled() -> None:
    def stopped(following: str, error: str = "SIGUSR2") -> dict[str, Any]:
        return {"status": "stopped", "error": error, "next": following}

    run = {"num_tasks": 6, "file_state": "stopped"}
    tasks = [
        task("7_0", **{**run, "file_state": "queued"}, was_cancelled=True),
        task("7_1", **run, task=1, was_cancelled=True, result=stopped("requeued as job 7_1")),
        task("7_2", **run, task=2, result=stopped("was cancelled; `crosscoder submit --resume x` goes on from there", "SIGTERM")),
        task("7_3", **run, task=3, result=stopped("job 7_3 was cancelled; `crosscoder submit --resume x` goes on from there")),
        task("7_4", **run, task=4, result=stopped("requeued as job 7_4")),
        task("7_5", **run, task=5, result=stopped("requeued as job 7_5")),
    ]
    rows = sorted(jobs.join([job("7_4", "CANCELLED")], tasks, now=NOW), key=lambda row: row.task or 0)
    again = "`crosscoder submit --resume train/demo/20261123-091530-k3f9` goes on from there"
    assert {(row.state, row.reason) for row in rows[:5]} == {("cancelled", f"was cancelled; {again}")}
    # Cancelled by other means while it waited again, and forgotten: it is not said to be requeued.
    assert (rows[5].state, rows[5].reason) == ("stopped", f"was stopped (SIGUSR2); Slurm no longer knows its job; {again}")
    assert only(None, tasks[5:]).reason == "was stopped (SIGUSR2); requeued as job 7_5"
    assert len(job_table.fold(rows[:5])) == 1


def test_a_start_that_slurm_puts_a_year_off_for_want_of_a_plan_is_not_told() -> None:
    waiting = job(state="PENDING", reason="Resources")
    assert only([waiting._replace(started=NOW + 3600)], [task()]).starts == NOW + 3600
    assert only([waiting._replace(started=NOW + 365 * 86400)], [task()]).starts is None
    assert only([waiting._replace(started=NOW + 365 * 86400)], []).starts is None


def test_a_run_of_this_machine_is_running_only_while_its_process_lives() -> None:
    assert only([], [task(None, "running", executor="run", is_held=True, progress=beat())]).state == "running"
    gone = only([], [task(None, "running", executor="run", progress=beat())])
    assert (gone.state, gone.rate, gone.ends) == ("lost", None, None)


def test_what_a_stopped_private_cluster_keeps_waits_for_its_next_start() -> None:
    for kept in (task(is_kept=True), task(is_kept=True, file_state="stopped", result={"status": "stopped"})):
        row = only(None, [kept])
        assert (row.state, row.reason) == ("waiting", "the private cluster is stopped; `make cluster` takes it up again")
    assert only(None, [task(is_kept=True, was_cancelled=True)]).state == "cancelled"
    assert only(None, [task(is_kept=True, file_state="failed", result={"status": "failed"})]).state == "failed"


def test_what_is_not_queued_yet_waits_as_long_as_a_job_is_left_that_will_queue_it() -> None:
    beyond = task(None, "new", not_queued="your submit limit is 5")
    row = only([], [beyond._replace(is_served=True)])
    assert (row.state, row.reason) == ("waiting", "not queued yet: your submit limit is 5; queued as earlier jobs end")
    row = only([], [beyond])
    assert row.state == "stopped"
    assert row.reason.endswith("no job is left that would queue it; `crosscoder submit --resume train/demo/20261123-091530-k3f9` does")
    assert only(None, [beyond._replace(is_kept=True)]).state == "waiting"


def test_a_job_that_is_no_run_is_listed_by_its_name() -> None:
    row = only([job("9", "PENDING", name="jupyter", reason="JobHeldUser", priority=0)], [])
    assert (row.job, row.run, row.name, row.state) == ("9", "", "jupyter", "held")
    assert row.reason == "held by you; `crosscoder release 9` frees it"


def test_running_jobs_come_first_and_finished_ones_last() -> None:
    tasks = [task("1", "finished", result={"status": "finished"}), task("2"), task("3"), task("4", "running")]
    rows = jobs.join([job("2", "PENDING"), job("3")], tasks, now=NOW)
    assert [(row.job, row.state) for row in rows] == [("3", "running"), ("2", "waiting"), ("4", "lost"), ("1", "finished")]


# -- reasons ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("PENDING", "Resources", "waits for nodes to become free"),
        ("PENDING", "JobArrayTaskLimit", "waits for other tasks of its array (the throttle)"),
        ("PENDING", "BadConstraints", "no node has what it asks for: it will never start; change it or cancel it"),
        ("PENDING", "ReqNodeNotAvail, UnavailableNodes:n3", "the node that it asks for is not available now"),
        ("PENDING", "launch failed requeued held", "could not be launched, and is held; `crosscoder release 1042` tries again"),
        (
            "PENDING",
            "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
            "the nodes that it asks for are down, drained, or kept for jobs of partitions that come first",
        ),
        ("PENDING", "QOSMaxGRESPerUser", "a limit of your account or qos is reached (QOSMaxGRESPerUser)"),
        ("PENDING", "AssocGrpCpuLimit", "a limit of your account or qos is reached (AssocGrpCpuLimit)"),
        ("PENDING", "SomethingNew", "SomethingNew"),
        ("TIMEOUT", "TimeLimit", "reached its time limit"),
        ("CANCELLED", "JobHeldUser", "was cancelled"),
        ("COMPLETING", "NonZeroExitCode", "is ending"),
        ("REQUEUE_HOLD", "", "requeued and held; `crosscoder release 1042` frees it"),
        ("RUNNING", "", ""),
        ("SUSPENDED", "None", "is suspended"),
    ],
)
def test_a_reason_is_put_into_words(state: str, reason: str, expected: str) -> None:
    assert job_reasons.in_words(job(state=state, reason=reason)) == expected


def test_a_dependency_names_the_runs_that_it_waits_for() -> None:
    waiting = job(state="PENDING", reason="Dependency", dependency="afterok:1040(unfulfilled),afterok:1041_*(unfulfilled)")
    assert job_reasons.in_words(waiting, ["cache/demo/x"]) == "waits for cache/demo/x"
    assert job_reasons.in_words(waiting) == "waits for 1040, 1041_*"
    never = waiting._replace(reason="DependencyNeverSatisfied")
    assert job_reasons.in_words(never).startswith("needs 1040, 1041_*, which failed or was cancelled: it will never start")
    assert job_reasons.in_words(never._replace(state="CANCELLED")).startswith("it needed 1040")


def test_a_requeued_job_says_until_when_it_waits() -> None:
    text = job_reasons.in_words(job(state="PENDING", reason="BeginTime", started=NOW))
    assert text == "waits until " + time.strftime("%H:%M:%S", time.localtime(NOW))


# -- which ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *(("train", True), ("demo", True), ("train/demo", True), ("train/demo/k3f9", True), ("k3f9", True), ("de*", True)),
        *(("train/demo/20261123-091530-k3f9", True), ("20261123-091530-k3f9", True), ("train/demo/", True)),
        *(("dem", False), ("cache", False), ("train/other", False), ("f9", False), ("1042", False)),
    ],
)
def test_a_word_names_a_stage_a_name_or_a_run(word: str, expected: bool) -> None:
    assert job_listing.is_wanted([word], stage="train", name="demo", identity="20261123-091530-k3f9") is expected


def test_a_word_names_a_job_or_its_array() -> None:
    assert job_listing.is_wanted(["1042"], job="1042_3")
    assert job_listing.is_wanted(["7", "1042_3"], job="1042_3")
    assert not job_listing.is_wanted(["1042_3"], job="1042_4")


def test_a_comment_of_another_kind_names_no_run() -> None:
    assert run_directory.directory_in("see ticket 5") is None
    assert run_directory.directory_in("[1]") is None
    assert str(run_directory.directory_in('{"run": "a/b/c", "directory": "/runs/a/b/c"}')) == "/runs/a/b/c"


def test_the_end_of_a_long_log_is_read_in_its_last_form(tmp_path: Any) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {i}\n" for i in range(20_000)) + "step 1\rstep 2\rstep 3\n\nlast")
    assert watch.last_lines(path, 3) == ["line 19999", "step 3", "last"]
    path.write_text("one\n")
    assert watch.last_lines(path, 3) == ["one"]


# -- from the run directories -----------------------------------------------------------------------------------------


def test_a_runs_tasks_are_read_as_the_run_directory_tells_them(tmp_path: Path) -> None:
    parent, done, run = (run_directory.create(tmp_path, stage, "demo") for stage in ("cache", "count", "train"))
    entries = [
        {"id": "70", "tasks": [0, 1, 2, 3, 4], "array": True},
        {"id": "80", "tasks": [1, 3], "array": True},
        {"id": "90", "tasks": [4], "array": False},
    ]
    plain = {"stage": "train", "name": "demo", "executor": "slurm", "resources": {"timeout_min": 5}, "changes": [], "after": []}
    parent.write_job({**plain, "num_tasks": 1, "jobs": entries[2:]})
    done.write_job({**plain, "num_tasks": 1, "jobs": []})
    for other, status in ((parent, "failed"), (done, "finished")):
        records.write_json(other.path / "result.json", {"status": status})
    changes = [{"what": {"cancelled": ["80_1"]}, "how": "scancel"}, {"what": {"nice": 5}, "how": "scontrol"}]
    run.write_job({**plain, "num_tasks": 6, "jobs": entries, "changes": changes, "after": [str(parent.path), str(done.path)]})
    for task_number, status in ((0, "finished"), (2, "failed"), (4, "stopped")):
        records.write_json(run.task_directory(task_number) / "result.json", {"status": status})
    with Holder(run.task_directory(4), job="90", restart=0):
        tasks = job_listing.read_tasks(run)
        assert [t.file_state for t in tasks] == [run.task_state(i) for i in range(6)]
        assert [t.file_state for t in tasks] == ["finished", "queued", "failed", "cancelled", "running", "new"]
    assert [t.job_id for t in tasks] == [run.job_of_task(i) for i in range(6)] == ["70_0", "80_0", "70_2", "80_1", "90", None]
    assert [t.is_held for t in tasks] == [False] * 4 + [True, False]
    assert [t.was_cancelled for t in tasks] == [False, False, False, True, False, False]
    assert tasks[0].failed_parents == tasks[0].waits_for == (parent.reference,)
    assert (tasks[0].limit_s, tasks[0].num_tasks) == (300, 6)


def test_a_local_run_is_not_lost_before_its_process_has_taken_it_up(tmp_path: Path) -> None:
    run = run_directory.create(tmp_path, "train", "demo")
    controller = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "submitit"])
    try:
        job_record = {"stage": "train", "name": "demo", "executor": "local", "resources": {}, "changes": [], "after": [], "num_tasks": 2}
        run.write_job({**job_record, "jobs": [{"id": str(controller.pid), "tasks": [0], "array": False}]})
        first, second = jobs.join(None, job_listing.read_tasks(run), now=NOW)
        assert (first.state, first.reason) == ("waiting", "is starting, or waits for other tasks of its run to end")
        assert second.state == "new"
        waits = job_listing.read_tasks(run)[0]._replace(waits_for=("cache/demo/x",), num_tasks=1)
        assert only(None, [waits]).reason == "waits for cache/demo/x"
        assert only(None, [waits._replace(waits_for=())]).reason == "is starting"
    finally:
        controller.kill()
        controller.wait()
    gone = jobs.join(None, job_listing.read_tasks(run), now=NOW)[0]
    assert (gone.state, gone.reason.partition(";")[0]) == ("lost", "the process that was to run it is gone")
