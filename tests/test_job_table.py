"""The table of jobs: folded, cut, and fit to the terminal."""

import time
from typing import Any

import pytest
from job_rows import NOW, beat, job, only, task

from slurm.client.slurm_values import ranges
from slurm.watching import job_table, jobs
from slurm.watching.jobs import Row


def test_tasks_that_read_alike_are_one_line_and_running_ones_stay_apart() -> None:
    tasks = [task(f"1042_{i}", task=i, num_tasks=9) for i in range(9)]
    states = ["RUNNING", "RUNNING", "PENDING", "PENDING", "PENDING", "FAILED", "PENDING", "PENDING", "PENDING"]
    queue = [job(f"1042_{i}", state, reason="JobHeldUser" if i == 8 else "") for i, state in enumerate(states)]
    lines = job_table.fold(jobs.join(queue, tasks, now=NOW))
    assert [(line.job, line.rows[0].state) for line in lines] == [
        ("1042_0", "running"),
        ("1042_1", "running"),
        ("1042_[2-4,6-7]", "waiting"),
        ("1042_8", "held"),
        ("1042_5", "failed"),
    ]
    assert sum(len(line.rows) for line in lines) == 9


def test_hundreds_of_running_tasks_are_one_line_and_one_that_needs_a_warning_stays_apart() -> None:
    tasks = [task(f"1042_{i}", task=i, num_tasks=300, progress=beat(step=10 * i)) for i in range(100)]
    tasks[7] = tasks[7]._replace(progress=beat(seconds_left=9e9))
    rows = jobs.join([job(f"1042_{i}") for i in range(100)], tasks, now=NOW)
    lines = job_table.fold(rows)
    assert [line.job for line in lines] == ["1042_[0-6,8-99]", "1042_7"]
    assert job_table.cells(lines[0], NOW)[2] == "99 running"
    assert job_table.cells(lines[0], NOW)[6:] == [
        "0-99 %",
        f"49.5/s together, the last ends {job_table.moment(NOW + 1498, NOW)} (25 min)",
    ]


def test_an_array_with_more_holes_than_its_column_holds_names_its_tasks_in_the_text() -> None:
    tasks = [task(f"1042_{i}", task=i, num_tasks=40) for i in range(0, 40, 2)]
    (line,) = job_table.fold(jobs.join([job(f"1042_{i}", "PENDING") for i in range(0, 40, 2)], tasks, now=NOW))
    assert line.job == "1042"
    assert job_table.cells(line, NOW)[-1] == "tasks " + ",".join(str(i) for i in range(0, 40, 2))


def test_ranges_are_written_as_slurm_writes_them() -> None:
    assert ranges([3, 1, 2, 7]) == "1-3,7"
    assert ranges([5]) == "5"
    assert ranges([]) == ""


def text_of(rows: list[Row], **keywords: Any) -> str:
    return "\n".join(line.plain for line in job_table.table(rows, now=NOW, **keywords))


def test_the_table_shows_a_line_as_a_person_reads_it() -> None:
    rows = jobs.join([job(), job("1050", "PENDING", reason="Priority", limit_s=90_000)], [task(progress=beat()), task("1050")], now=NOW)
    summary, empty, header, *lines = text_of(rows).splitlines()
    assert (summary, empty) == ("1 running, 1 waiting", "")
    assert header.split() == ["JOB", "RUN", "STATE", "NODE", "TIME", "LIMIT", "DONE", "DETAIL"]
    first, second = (" ".join(line.split()) for line in lines)
    ends = time.strftime("%H:%M", time.localtime(NOW + 1498))
    assert first == f"1042 train/demo/k3f9 running n1 0:10:00 1:00:00 25 % 250/1000 steps, 0.5/s, ends {ends} (25 min)"
    assert second == "1050 train/demo/k3f9 waiting 1-1:00:00 jobs of higher priority come first"


def test_a_phase_is_named_where_it_says_more_than_the_stage() -> None:
    (row,) = jobs.join([job()], [task(progress=beat(phase="validate"))], now=NOW)
    assert job_table.cells(job_table.Line([row]), NOW)[-1].startswith("validate 250/1000 steps")


def test_a_task_is_named_where_the_id_of_its_job_does_not_tell_it() -> None:
    first, again = (only([job(i)], [task(i, task=7, num_tasks=9)]) for i in ("1042_7", "1050_0"))
    assert job_table.run_text(first) == "train/demo/k3f9"
    assert job_table.run_text(again) == "train/demo/k3f9 task 7"


def test_other_runs_are_named_in_the_short_form_that_commands_take() -> None:
    waiting = job(state="PENDING", reason="Dependency")
    row = only([waiting], [task(waits_for=("cache/demo/20261123-091529-x2aa", "tokenize/a-b.c/20261123-091528-07zz"))])
    assert row.reason == "waits for cache/demo/20261123-091529-x2aa, tokenize/a-b.c/20261123-091528-07zz"
    assert job_table.cells(job_table.Line([row]), NOW)[-1] == "waits for cache/demo/x2aa, tokenize/a-b.c/07zz"


def test_of_a_waiting_job_the_start_that_slurm_expects_is_told() -> None:
    row = only([job(state="PENDING", reason="Resources", started=NOW + 3600)], [task()])
    starts = time.strftime("%H:%M", time.localtime(NOW + 3600))
    assert job_table.cells(job_table.Line([row]), NOW)[-1] == f"waits for nodes to become free; starts about {starts}"


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_a_terminal_of_any_width_shows_whole_ids_and_the_whole_reason(width: int) -> None:
    name = "a-name-as-long-as-the-names-of-runs-may-be-with-sixty-four-letters"
    tasks = [task(f"14364237_{i}", run=f"train/{name}/20261123-091530-k3f9", name=name, task=i, num_tasks=300) for i in range(300)]
    queue = [job(f"14364237_{i}", "PENDING", reason="QOSMaxGRESPerUser") for i in range(300)]
    queue[0] = job("14364237_0", started=NOW - 600)
    tasks[0] = tasks[0]._replace(progress=beat(seconds_left=9000.0))
    text = text_of(jobs.join(queue, tasks, now=NOW), width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "14364237_[1-299]" in text
    assert "/k3f9" in text
    assert "299 waiting" in text
    words = " ".join(text.split())
    assert "a limit of your account or qos is reached (QOSMaxGRESPerUser)" in words
    assert "needs 1 h 39 min more than its time limit" in words


def test_what_ended_is_listed_newest_first_and_only_the_last_ten_unless_asked() -> None:
    tasks = [task(str(i), "finished", result={"status": "finished", "ended": NOW - 100 * i}) for i in range(1, 31)]
    rows = jobs.join([job("99")], [*reversed(tasks), task("99")], now=NOW)
    lines = text_of(rows, num_older=5).splitlines()
    first = [line.split()[0] if line else "" for line in lines]
    assert first == ["1", "", "JOB", "99", "", "JOB", *map(str, range(1, 11)), "", "25"]
    assert lines[0] == "1 running, 30 finished"
    assert lines[-1] == "25 more have ended: crosscoder jobs --all"
    everything = text_of(rows, most_ended=None).splitlines()
    assert len(everything) == len(lines) + 20 - 2  # without the last line and the empty one before it


def test_what_ended_with_a_long_name_takes_no_room_from_what_runs() -> None:
    long = task("1", "failed", run=f"train/{'x' * 60}/20261123-091530-k3f9", result={"status": "failed", "error": "e", "ended": NOW})
    alone = text_of(jobs.join([job("99")], [task("99", progress=beat())], now=NOW), width=100).splitlines()
    beside = text_of(jobs.join([job("99")], [task("99", progress=beat()), long], now=NOW), width=100).splitlines()
    assert beside[1:4] == alone[1:4]


def test_a_table_cut_to_the_screens_height_says_how_much_it_leaves_out() -> None:
    rows = jobs.join([job(str(i)) for i in range(30)], [], now=NOW)
    lines = text_of(rows, max_lines=10).splitlines()
    assert (len(lines), lines[0], lines[-1]) == (10, "30 running", "... 24 lines more")


def test_a_job_that_a_new_submission_replaced_is_no_row_of_its_own_once_it_is_over() -> None:
    changed = task("1043", replaced_jobs=frozenset({"1042", "1043"}))
    assert [row.job for row in jobs.join([job(state="CANCELLED"), job("1043")], [changed], now=NOW)] == ["1043"]
    assert [row.job for row in jobs.join([job("1042_3", "CANCELLED"), job("1043")], [changed], now=NOW)] == ["1043"]
    # One that scancel did not reach still runs, and must be seen.
    assert sorted(row.job for row in jobs.join([job(), job("1043")], [changed], now=NOW)) == ["1042", "1043"]


def test_tasks_in_one_line_are_not_given_the_job_of_the_first_of_them() -> None:
    waiting = [job(f"1042_{i}", "PENDING", reason="JobHeldUser", priority=0) for i in (1, 2, 3, 12)]
    (line,) = job_table.fold(jobs.join(waiting, [], now=NOW))
    assert job_table.cells(line, NOW)[-1] == "held by you; `crosscoder release 1042_[1-3,12]` frees it"


def test_a_moment_of_another_year_says_which() -> None:
    then = time.localtime(NOW + 40 * 86400)
    assert job_table.moment(NOW + 40 * 86400, NOW) == time.strftime("%a %d %b %Y %H:%M", then)
    assert job_table.moment(NOW + 3 * 86400, NOW) == time.strftime("%a %d %b %H:%M", time.localtime(NOW + 3 * 86400))
