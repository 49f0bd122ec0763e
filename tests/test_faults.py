"""What goes wrong on a cluster, done to jobs on a real one: nodes that die, limits, preemption that cancels."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_queue import Queue
from toy_project import ToyProject
from waiting import at_step, finished, wait_until

from slurm.cluster import faults
from slurm.cluster.daemons import PrivateCluster
from slurm.record.run_directory import RunDirectory

pytestmark = [pytest.mark.end_to_end, pytest.mark.slurm]


@pytest.fixture
def queue(tmp_path: Path, cluster: PrivateCluster) -> Iterator[Queue]:
    yield Queue(ToyProject(tmp_path), cluster)
    cluster.command("scancel", "--me")


def test_where_preemption_cancels_the_job_submits_itself_anew_and_is_waited_for(queue: Queue) -> None:
    queue.cluster.command("scontrol", "update", "partitionname=low", "preemptmode=cancel", "gracetime=0")
    try:
        hold = queue.project.hold()
        first = queue.project.config("first", output="data/first", hold=hold, resources="{cpus: 8, partition: low, node: n2}")
        second = queue.project.config("second", data="data/first")
        runs = queue.submit(first, second)
        wait_until(lambda: at_step(runs[0], 2), "the first steps")
        (high,) = queue.submit(queue.project.config("high"), "resources.cpus=8", "--node", "n2")
        wait_until(lambda: finished(high), "the job that preempts")
        hold.unlink()
        wait_until(lambda: finished(runs[0]), "the job submitted anew")
        old, new = [entry["id"] for entry in runs[0].job()["jobs"]]
        end = next(line for line in runs[0].attempts() if line["event"] == "end")
        assert end["next"].startswith(f"Slurm ended job {old}: preemption cancels here; submitted anew as job {new}")
        wait_until(lambda: finished(runs[1]), "the run that waits for it")
    finally:
        queue.cluster.command("scontrol", "update", "partitionname=low", "preemptmode=requeue", "gracetime=20")


def test_where_preemption_cancels_a_run_is_submitted_anew_up_to_a_cap_and_a_bug_not_at_all(queue: Queue) -> None:
    requeue = queue.project.root / "slurm/execution/requeue.py"
    requeue.write_text(requeue.read_text().replace("MAX_ATTEMPTS_WITHOUT_PROGRESS = 10", "MAX_ATTEMPTS_WITHOUT_PROGRESS = 3"))
    place = ("--partition", "low", "--node", "n2", "resources.cpus=8")
    queue.cluster.command("scontrol", "update", "partitionname=low", "preemptmode=cancel", "gracetime=0")
    try:
        (run,) = queue.submit(queue.project.config(steps=3, step_seconds=300.0), *place)
        for attempt in range(1, 4):
            wait_until(lambda number=attempt: len(run.attempts()) == 2 * number - 1 and stage_has_begun(run, number), f"attempt {attempt}")  # type: ignore[misc]
            queue.cluster.command("sbatch", "-p", "main", "-w", "n2", "-c", "8", "-o", "/dev/null", "--wrap", "true")
            wait_until(lambda number=attempt: len(run.attempts()) >= 2 * number, f"the end of attempt {attempt}")  # type: ignore[misc]
        wait_until(lambda: not queue.cluster.command("squeue", "-h", "-t", "pending,running"), "an empty queue")
        ends = [line["next"] for line in run.attempts() if line["event"] == "end"]
        assert ["submitted anew as job" in end for end in ends] == [True, True, False]
        reason = "not requeued: its last 3 attempts got no further than the start"
        assert ends[2].startswith(reason)
        assert len(run.job()["jobs"]) == 3
        listed = json.loads(queue.project.crosscoder("jobs", "--json", SLURM_CONF=str(queue.cluster.configuration)).stdout)
        (row,) = [row for row in listed if row["run"] == run.reference]
        assert row["state"] == "stopped"
        assert reason in row["reason"]

        (bug,) = queue.submit(queue.project.config("bug", crash_at=1), *place)
        wait_until(lambda: queue.slurm_state(queue.job(bug)) == "FAILED", "the bug's end")
        assert len(bug.job()["jobs"]) == 1
        assert [line["event"] for line in bug.attempts()] == ["start", "end"]
    finally:
        queue.cluster.command("scontrol", "update", "partitionname=low", "preemptmode=requeue", "gracetime=20")


def stage_has_begun(run: RunDirectory, times: int) -> bool:
    return sum("at step 0" in log.read_text() for log in run.log_files()) >= times


def test_a_job_whose_node_dies_goes_on_elsewhere(queue: Queue) -> None:
    hold = queue.project.hold()
    (run,) = queue.submit(queue.project.config(hold=hold), "resources.constraint=null")
    wait_until(lambda: at_step(run, 2), "the first steps")
    node = queue.cluster.command("squeue", "-h", "-j", queue.job(run), "-o", "%N").strip()
    faults.crash(queue.cluster, node)
    hold.unlink()
    try:
        wait_until(lambda: finished(run), "the job's second attempt")
    finally:
        faults.revive(queue.cluster, node)
    starts = [line for line in run.attempts() if line["event"] == "start"]
    assert [line["restart"] for line in starts] == [0, 1]
    assert "at step 0" not in run.log_files()[-1].read_text().splitlines()[-1]


def test_a_job_that_slurm_runs_twice_has_one_holder(queue: Queue) -> None:
    """slurmd dies and its job runs on: the attempt that Slurm starts elsewhere takes over, and the first one ends."""
    hold = queue.project.hold()
    (run,) = queue.submit(queue.project.config(steps=50, hold=hold))
    wait_until(lambda: at_step(run, 2), "the first steps")
    node = queue.cluster.command("squeue", "-h", "-j", queue.job(run), "-o", "%N").strip()
    faults.lose_contact(queue.cluster, node)
    queue.cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    try:
        wait_until(lambda: sum(line["event"] == "start" for line in run.attempts()) == 2, "the second attempt")
        first, second = [line for line in run.attempts() if line["event"] == "start"]
        wait_until(lambda: not Path(f"/proc/{first['pid']}").exists(), "the end of the first")
        assert json.loads((run.path / "lock.json").read_text())["pid"] == second["pid"]
        assert "took it over; this process ends without saving" in "".join(log.read_text() for log in run.log_files())
        hold.unlink()
        wait_until(lambda: finished(run), "the end of the second")
        assert (run.result() or {})["result"]["steps"] == json.loads((run.path / "state.json").read_text())["step"] == 50
    finally:
        faults.revive(queue.cluster, node)


def test_a_sweep_is_one_array_and_survives_a_preemption_in_the_middle(queue: Queue) -> None:
    queue.project.config("base", step_seconds=0.2, resources="{cpus: 8, partition: low}")
    (queue.project.root / "sweep.yaml").write_text("name: s\nbase: base.yaml\ngrid: {steps: [30, 32], seed: [0, 1, 2, 3]}\nmetric: score\n")
    done = queue.project.crosscoder("sweep", "sweep.yaml", SLURM_CONF=str(queue.cluster.configuration))
    assert done.returncode == 0, done.stderr
    run = RunDirectory(queue.project.only_run("s", stage="sweep"))
    (entry,) = run.job()["jobs"]
    wait_until(lambda: any((run.progress(task) or {"step": 0})["step"] >= 3 for task in range(8)), "the first steps")
    (high,) = queue.submit(queue.project.config("high"), "resources.nodes=3", "resources.cpus=8")
    wait_until(lambda: finished(run) and finished(high), "the sweep")
    attempts = [line for task in range(8) for line in run.attempts(task)]
    assert any(line.get("status") == "stopped" for line in attempts)
    assert {line["job"].partition("_")[0] for line in attempts} == {entry["id"]}
    assert all((run.result(task) or {})["result"]["steps"] == (30 if task < 4 else 32) for task in range(8))


def test_a_job_at_its_time_limit_saves_and_goes_on(queue: Queue) -> None:
    """Slurm's smallest limit is a minute, and it looks at limits every half minute."""
    (run,) = queue.submit(queue.project.config(steps=400, step_seconds=0.2), "resources.timeout_min=1")
    wait_until(lambda: len(run.attempts()) == 3, "the second attempt", patience_seconds=150.0)
    start, end, again = run.attempts()
    assert (end["status"], end["next"]) == ("stopped", f"requeued as job {queue.job(run)}")
    assert 1 < end["time"] - start["time"] < 60
    assert (start["restart"], again["restart"]) == (0, 1)
    wait_until(lambda: run.log_files()[-1].read_text().count("at step") == 2, "the stage")
    assert "at step 0" not in run.log_files()[-1].read_text().splitlines()[-1]
    queue.cluster.command("scancel", queue.job(run))


def make_full(path: Path) -> None:
    """A device like /dev/full: every write to it fails as on a full disk. A link to that one would be refused as a link."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))
    except PermissionError:
        pytest.skip("only root may make a device that is always full")


def test_a_full_log_disk_costs_a_job_its_log_and_nothing_else(queue: Queue) -> None:
    blocker = queue.cluster.command("sbatch", "--parsable", "-w", "n3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 60").strip()
    (run,) = queue.submit(queue.project.config(steps=4, step_seconds=0.1), "--node", "n3")
    job = queue.job(run)
    (run.path / "log").mkdir(exist_ok=True)
    for log in (f"log/{job}.log", f"submitit/{job}_0_log.out", f"submitit/{job}_0_log.err"):
        make_full(run.path / log)
    queue.cluster.command("scancel", blocker)
    wait_until(lambda: finished(run), "the job")
    assert (run.result() or {})["result"]["steps"] == 4
    assert stat.S_ISCHR((run.path / f"log/{job}.log").lstat().st_mode)
