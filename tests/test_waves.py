"""Arrays and chains where the accounting lets me have three jobs in the queue: a real Slurm with slurmdbd and MariaDB."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_queue import Queue
from toy_project import ToyProject
from waiting import PATIENCE_SECONDS, finished, wait_until

from slurm.client import processes
from slurm.cluster import hardware, layout
from slurm.cluster.daemons import PrivateCluster
from slurm.execution import waves
from slurm.record import backlog
from slurm.record.run_directory import RunDirectory

pytestmark = pytest.mark.slurm_accounting

LIMIT = 3
OPEN = "pending,running,configuring,completing,suspended"


@pytest.fixture(scope="module")
def limited(start_cluster: Callable[..., PrivateCluster]) -> PrivateCluster:
    cluster = start_cluster(layout.pretended(accounting=True, extra_lines=("AccountingStorageEnforce=limits",)))
    user = hardware.user_name()
    if user != "root":
        cluster.command("sacctmgr", "-i", "add", "user", user, "account=root")
    cluster.command("sacctmgr", "-i", "modify", "user", "where", f"name={user}", "set", f"MaxSubmitJobs={LIMIT}")
    wait_until(lambda: f"MaxSubmitJobs={LIMIT}(" in cluster.command("scontrol", "show", "assoc_mgr", f"users={user}"), "the limit")
    return cluster


@pytest.fixture
def queue(tmp_path: Path, limited: PrivateCluster) -> Iterator[Queue]:
    yield Queue(ToyProject(tmp_path), limited)
    limited.command("scancel", "--me")
    wait_until(lambda: not limited.command("squeue", "-h", "-t", OPEN), "an empty queue")


class Most(threading.Thread):
    """Looks as often as it can how many jobs are in the queue."""

    def __init__(self, cluster: PrivateCluster) -> None:
        super().__init__(daemon=True)
        self.cluster, self.seen, self.done = cluster, 0, threading.Event()

    def __enter__(self) -> "Most":
        self.start()
        return self

    def __exit__(self, *of_error: object) -> None:
        self.done.set()
        self.join()

    def run(self) -> None:
        while not self.done.wait(0.05):
            self.seen = max(self.seen, len(self.cluster.command("squeue", "-h", "-r", "-t", "pending,running").split("\n")) - 1)


def starts(run: RunDirectory, task: int) -> int:
    return sum(line["event"] == "start" for line in run.attempts(task))


def rows(queue: Queue, run: RunDirectory) -> list[dict[str, object]]:
    done = queue.project.crosscoder("jobs", "--json", SLURM_CONF=str(queue.cluster.configuration))
    assert done.returncode == 0, done.stderr
    return [row for row in json.loads(done.stdout) if row["run"] == run.reference]


def test_all_tasks_of_an_array_run_once_though_few_may_be_queued_and_what_waits_for_it_waits_for_all(queue: Queue) -> None:
    program = queue.project.root / "pipeline/stages/toy.py"
    program.write_text(program.read_text().replace("if config.output is not None:", "if config.output is not None and run.task == 7:"))
    hold = hold_tasks(queue)
    queue.submit(queue.project.config(resources="{array_tasks: 8}"), "--dry-run")
    assert "  your submit limit is 3: what doesn't fit is queued as earlier jobs end" in queue.said
    first = queue.project.config("first", steps=1, output="data/first", resources="{array_tasks: 8}")
    second = queue.project.config("second", steps=1, data="data/first")
    with Most(queue.cluster) as most:
        array, child = queue.submit(first, second)
        assert "5 of 8 tasks not queued yet: your submit limit is 3; queued as earlier jobs end" in queue.said
        assert f"1 of 1 task not queued yet: {array.reference}, which it waits for, is not wholly queued yet" in queue.said
        listed = rows(queue, array)
        assert all(
            "not queued yet: your submit limit is 3" in str(row["reason"]) for row in listed if row["state"] == "waiting" and not row["job"]
        )
        wait_until(lambda: all(starts(array, task) for task in range(LIMIT)), "the first wave")
        hold.unlink()  # the first three end at once: each of them still counts when the others look for room
        wait_until(lambda: finished(child), "the chain")
    assert finished(array)
    assert [starts(array, task) for task in range(8)] == [1] * 8
    assert starts(child, 0) == 1
    assert (child.result() or {})["started"] >= max((array.result(task) or {})["ended"] for task in range(8))
    assert most.seen == LIMIT
    assert not (queue.project.runs / backlog.FILE).exists()


def hold_tasks(queue: Queue) -> Path:
    """Makes the toy wait as long as the file that this gives is there."""
    file = queue.project.root / "hold"
    file.touch()
    program = queue.project.root / "pipeline/stages/toy.py"
    held = f"    while os.path.exists({str(file)!r}):\n        run.check_stop()\n        time.sleep(0.05)\n"
    program.write_text(program.read_text().replace("    for step in", held + "    for step in"))
    return file


def num_queued(queue: Queue) -> int:
    return len(queue.cluster.command("squeue", "-h", "-r", "-t", OPEN).splitlines())


def test_of_jobs_that_end_together_the_last_to_look_stays_until_there_is_room(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(queue.cluster.configuration))
    hold = hold_tasks(queue)
    (run,) = queue.submit(queue.project.config(steps=1, resources="{array_tasks: 4}"))
    wait_until(lambda: all(starts(run, task) for task in range(LIMIT)), "the first wave")
    *earlier, last = queue.cluster.command("squeue", "-h", "-r", "-t", "running", "-o", "%A").split()
    for job in earlier:
        waves.look_at_end_of_job(queue.project.runs, job, patience_seconds=0.0)
    variables = queue.project.environment(SLURM_CONF=str(queue.cluster.configuration), SLURM_JOB_ID=last)
    look = [sys.executable, "-m", "slurm.execution.waves", str(queue.project.runs)]
    with subprocess.Popen(look, cwd=queue.project.root, env=variables) as staying:
        with pytest.raises(subprocess.TimeoutExpired):
            staying.wait(3.0)
        assert backlog.tasks_of(run) == [3]
        hold.unlink()
        wait_until(lambda: finished(run), "all tasks")
        assert staying.wait(PATIENCE_SECONDS) == 0


def test_a_failed_task_and_a_killed_one_do_not_break_the_chain_of_waves(queue: Queue) -> None:
    program = queue.project.root / "pipeline/stages/toy.py"
    faults = "    if run.task == 1:\n        raise UserError('as it was told')\n    if run.task == 3:\n        os.kill(os.getpid(), 9)\n"
    program.write_text(program.read_text().replace("    for step in", faults + "    for step in"))
    array, child = queue.submit(
        queue.project.config("first", steps=1, output="data/first", resources="{array_tasks: 5}"),
        queue.project.config("second", data="data/first"),
    )
    wait_until(lambda: not num_queued(queue), "an empty queue")
    assert [array.task_state(task) for task in (0, 2, 4)] == ["finished"] * 3
    assert [starts(array, task) for task in range(5)] == [1] * 5
    (row,) = rows(queue, child)
    assert (row["state"], starts(child, 0)) == ("cancelled", 0)
    assert array.reference in str(row["reason"])
    assert not (queue.project.runs / backlog.FILE).exists()


@pytest.mark.parametrize("way", ["crosscoder", "scancel"])
def test_cancelling_a_run_stops_its_waves(queue: Queue, way: str) -> None:
    hold_tasks(queue)
    (run,) = queue.submit(queue.project.config(resources="{array_tasks: 5}"))
    wait_until(lambda: starts(run, 0), "the first task")
    if way == "scancel":
        queue.cluster.command("scancel", queue.job(run))
    else:
        done = queue.project.crosscoder("cancel", run.reference, "--yes", SLURM_CONF=str(queue.cluster.configuration))
        assert f"2 tasks of {run.reference} that were not queued yet cancelled" in done.stdout, done.stderr
    wait_until(lambda: not num_queued(queue), "an empty queue")
    assert [len(entry["tasks"]) for entry in run.job()["jobs"]] == [3]
    assert [run.task_state(task) for task in (3, 4)] == ["cancelled"] * 2
    assert [row["state"] for row in rows(queue, run) if row["task"] in (3, 4)] == ["cancelled"] * 2


def test_tasks_that_are_cancelled_one_by_one_leave_the_waves_of_the_others(queue: Queue) -> None:
    hold = hold_tasks(queue)
    (run,) = queue.submit(queue.project.config(steps=1, resources="{array_tasks: 6}"))
    wait_until(lambda: all(starts(run, task) for task in range(LIMIT)), "the first wave")
    queue.cluster.command("scancel", f"{queue.job(run)}_0")
    one = f"{queue.job(run)}_1"
    done = queue.project.crosscoder("cancel", one, "--yes", SLURM_CONF=str(queue.cluster.configuration))
    assert (done.returncode, "not queued yet" in done.stdout) == (0, False), done.stderr
    wait_until(lambda: starts(run, 3) and starts(run, 4), "the second wave")
    hold.unlink()
    wait_until(lambda: all(run.task_state(task) == "finished" for task in range(2, 6)), "the tasks that nobody cancelled")
    assert [run.task_state(task) for task in (0, 1)] == ["stopped"] * 2
    assert run.cancelled_tasks() == set()


def test_where_the_last_jobs_are_killed_with_their_shells_the_listing_says_so_and_resuming_goes_on(queue: Queue) -> None:
    hold = hold_tasks(queue)
    (run,) = queue.submit(queue.project.config(steps=1, resources="{array_tasks: 5}"))
    wait_until(lambda: all(starts(run, task) for task in range(LIMIT)), "the first wave")
    processes.signal_all([pid for pid in processes.of_jobs(queue.cluster.configuration) if "slurmstepd" not in processes.command_line(pid)])
    wait_until(lambda: not num_queued(queue), "an empty queue")
    hold.unlink()
    left = [row for row in rows(queue, run) if row["task"] in (3, 4)]
    again = f"no job is left that would queue it; `crosscoder submit --resume {run.reference}` does"
    assert [(row["state"], row["reason"]) for row in left] == [("stopped", f"not queued: your submit limit is 3, and {again}")] * 2
    queue.submit("--resume", str(run.path))
    wait_until(lambda: finished(run), "all tasks")
    assert [starts(run, task) for task in range(5)] == [2, 2, 2, 1, 1]
