"""Changes to a run of which some tasks have ended already, or are not in the queue yet: what is queued later is as changed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_queue import Queue
from toy_project import ToyProject
from waiting import finished, wait_until

from pipeline.config.site_file import Site
from slurm.changing import change
from slurm.client import slurm_queries
from slurm.cluster.daemons import PrivateCluster
from slurm.record import backlog

pytestmark = pytest.mark.slurm


@pytest.fixture
def queue(tmp_path: Path, cluster: PrivateCluster) -> Iterator[Queue]:
    yield Queue(ToyProject(tmp_path), cluster)
    cluster.command("scancel", "--me")


def site(queue: Queue) -> Site:
    return Site(runs=queue.project.runs)


def test_an_array_of_which_a_task_has_ended_is_changed_on_record_too(queue: Queue) -> None:
    program = queue.project.root / "pipeline/stages/toy.py"
    program.write_text(program.read_text().replace("    for step in", "    if run.task == 0:\n        return {}\n    for step in"))
    (run,) = queue.submit(queue.project.config(steps=100, step_seconds=0.2, resources="{array_tasks: 3, max_parallel: 1}"))
    wait_until(lambda: run.task_state(0) == "finished" and run.task_state(1) == "running", "the second task")
    change.change(run.reference, ["timeout_min=45"], site(queue))
    assert run.job()["resources"]["timeout_min"] == 45
    limits = {job.id: job.limit_s for job in slurm_queries.my_jobs() if job.array_id == queue.job(run)}
    assert limits[f"{queue.job(run)}_2"] == 45 * 60


def test_a_run_that_is_not_queued_yet_is_changed_on_record_and_queued_so(queue: Queue) -> None:
    # On a full node: a job that has begun, if only for a moment, would make it a run whose settings can't be changed any more.
    block = queue.cluster.command("sbatch", "--parsable", "-w", "n3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 600").strip()
    wait_until(lambda: queue.slurm_state(block) == "RUNNING", "a full node")
    (run,) = queue.submit(queue.project.config(steps=2), "--node", "n3")
    queue.cluster.command("scancel", queue.job(run))
    wait_until(lambda: queue.slurm_state(queue.job(run)) == "CANCELLED", "Slurm's word of it")
    queue.cluster.command("scancel", block)
    assert run.attempts() == []
    backlog.set_tasks(run, [0], "your submit limit is 3")
    for setting in ("steps=7", "timeout_min=9"):
        done = queue.project.crosscoder("change", run.reference, setting, SLURM_CONF=str(queue.cluster.configuration))
        assert done.stdout.strip() == f"{run.reference}: changed; it is not queued yet, and will be as changed", done.stderr
    assert "steps: 7\n" in (run.path / "config.yaml").read_text()
    assert run.job()["resources"]["timeout_min"] == 9
    assert [next(iter(entry["what"])) for entry in run.job()["changes"]][-1] == "timeout_min"
    queue.submit("--resume", str(run.path))
    wait_until(lambda: finished(run), "the run as changed")
    assert (run.progress() or {})["step"] == 7
    assert "TimeLimit=00:09:00" in queue.detail(queue.job(run))
