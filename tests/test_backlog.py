"""Tasks that the queue has no room for: how they are kept, and what Slurm's words for a limit mean."""

from pathlib import Path

import pytest

from slurm.client import submit_limits
from slurm.client.submit_limits import SubmitLimit
from slurm.execution import executor
from slurm.execution.dependencies import not_wholly_queued
from slurm.execution.waves import give_up
from slurm.record import backlog, run_directory
from slurm.record.run_directory import RunDirectory


def make_run(root: Path, num_tasks: int = 6, max_parallel: int | None = None) -> RunDirectory:
    run = run_directory.create(root, "tokenize", "demo")
    entry = {"id": "1042", "tasks": [0, 1, 2], "array": True}
    resources = {"max_parallel": max_parallel, "account": None, "qos": None}
    job = {"stage": "tokenize", "num_tasks": num_tasks, "jobs": [entry], "changes": [], "after": [], "resources": resources}
    run.write_job(job)
    return run


def test_the_backlog_is_a_file_as_long_as_a_run_has_tasks_in_it(tmp_path: Path) -> None:
    first, second = make_run(tmp_path), make_run(tmp_path)
    for run in (first, second, first):
        backlog.set_tasks(run, [5, 3], "your submit limit is 3")
    assert backlog.read(tmp_path).runs == [first, second]
    assert backlog.tasks_of(first) == [3, 5]
    assert backlog.in_words(first) == "2 of 6 tasks not queued yet: your submit limit is 3; queued as earlier jobs end"
    backlog.set_tasks(first, [], "")
    assert (backlog.read(tmp_path).runs, backlog.in_words(first)) == ([second], "")
    assert "not_queued" not in first.job()
    backlog.set_tasks(second, [], "")
    assert not (tmp_path / backlog.FILE).exists()


@pytest.mark.parametrize("damage", ['{"runs": ["/a', "[]", "{}", ""])
def test_a_damaged_backlog_is_gathered_from_the_runs(tmp_path: Path, damage: str) -> None:
    waiting = make_run(tmp_path)
    for run in (make_run(tmp_path), waiting):
        run.write_job({"id": run.id, "name": "demo", "executor": "slurm", "cluster": None, "submitted": 0.0, "setup": []} | run.job())
    backlog.set_tasks(waiting, [5], "your submit limit is 3")
    (tmp_path / backlog.FILE).write_text(damage)
    assert backlog.read(tmp_path) == backlog.Backlog([waiting], [], None)
    backlog.set_tasks(waiting, [], "")
    assert not (tmp_path / backlog.FILE).exists()


def test_what_is_not_queued_is_new_and_what_is_given_up_cancelled(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    backlog.set_tasks(run, [2, 4], "no room")  # 2 was queued before, and has to be again
    assert [run.task_state(task) for task in (1, 2, 4)] == ["queued", "new", "new"]
    assert give_up(run, "crosscoder cancel") == f"2 tasks of {run.reference} that were not queued yet cancelled (crosscoder cancel)"
    assert [run.task_state(task) for task in (1, 4, 5)] == ["queued", "cancelled", "new"]
    assert not (tmp_path / backlog.FILE).exists()


def test_a_run_that_waits_for_another_is_not_queued_before_all_of_that_is(tmp_path: Path) -> None:
    parent = make_run(tmp_path)
    job = {"after": [str(parent.path)]}
    assert not_wholly_queued(job) is None
    backlog.set_tasks(parent, [5], "no room")
    assert not_wholly_queued(job) == parent


@pytest.mark.parametrize(("max_parallel", "room"), [(None, None), (2, 0), (3, 0), (5, 2)])
def test_of_a_run_in_several_arrays_no_more_is_queued_than_may_run_at_once(
    tmp_path: Path, max_parallel: int | None, room: int | None
) -> None:
    run = make_run(tmp_path, max_parallel=max_parallel)
    assert executor._room_of(run)[0] is None  # its first array has a throttle of its own
    backlog.set_tasks(run, [3, 4, 5], "no room")
    assert executor._room_of(run)[0] == room


def test_slurms_word_for_a_limit_is_found_and_put_in_words() -> None:
    said = "sbatch: error: {}\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, ...)"
    assert submit_limits.word_of_refusal(said.format("AssocMaxSubmitJobLimit")) == "AssocMaxSubmitJobLimit"
    assert submit_limits.word_of_refusal(said.format("QOSMaxSubmitJobPerUserLimit")) == "QOSMaxSubmitJobPerUserLimit"
    assert submit_limits.word_of_refusal(said.format("AssocMaxWallDurationPerJobLimit")) is None
    limits = [
        SubmitLimit(9, "Assoc", "the submit limit of account a"),
        SubmitLimit(5, "Assoc", "your submit limit"),
        SubmitLimit(2, "QOS", "q"),
    ]
    assert submit_limits.why("AssocMaxSubmitJobLimit", limits) == "your submit limit is 5"
    assert submit_limits.why("QOSGrpSubmitJobsLimit", limits[:2]) == (
        "a submit limit of your account or qos is reached (QOSGrpSubmitJobsLimit)"
    )
