"""A chain of which a run did not finish is taken up again from its front, and says so."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_queue import Queue
from toy_project import ToyProject
from waiting import finished, wait_until

from pipeline import records
from pipeline.config.errors import UserError
from slurm.cluster.daemons import PrivateCluster
from slurm.record import run_directory
from slurm.record.run_directory import RunDirectory
from slurm.submission.chain_resuming import Chain


@pytest.fixture
def queue(tmp_path: Path, cluster: PrivateCluster) -> Iterator[Queue]:
    yield Queue(ToyProject(tmp_path), cluster)
    cluster.command("scancel", "--me")


@pytest.mark.slurm
def test_a_chain_whose_front_was_cancelled_is_resumed_from_its_front(queue: Queue) -> None:
    project = queue.project
    hold = project.hold()
    first = project.config("first", output="data/first", hold=hold)
    second = project.config("second", data="data/first", output="data/second")
    runs = queue.submit(first, second, project.config("third", data="data/second"))
    wait_until(lambda: (runs[0].progress() or {"step": 0})["step"] >= 1, "the first step")
    queue.cluster.command("scancel", queue.job(runs[0]))
    wait_until(lambda: not queue.cluster.command("squeue", "-h", "--me", "-o", "%i").split(), "the end of all three")
    queue.submit("--resume", runs[2].reference, expect=1)
    assert f"{runs[2].reference} needs {runs[0].reference}, which did not finish and is not queued; resume that first" in queue.said
    hold.unlink()
    queue.submit("--resume", runs[0].reference)
    command = "  crosscoder submit --resume "
    assert queue.said.splitlines()[-2:] == [command + run.reference for run in runs[1:]]
    queue.submit("--resume", runs[2].reference, expect=1)
    assert f"`crosscoder submit --resume {runs[1].reference}`" in queue.said
    for run in runs[1:]:
        queue.submit("--resume", run.reference)
    wait_until(lambda: all(finished(run) for run in runs), "the chain")


def test_what_has_finished_or_waits_for_room_in_the_queue_stands_in_nobodys_way(tmp_path: Path) -> None:
    def make(name: str, after: list[RunDirectory], **job: object) -> RunDirectory:
        run = run_directory.create(tmp_path, "toy", name)
        plain = {"stage": "toy", "name": name, "executor": "run", "submitted": len(names), "num_tasks": 1, "jobs": [], "changes": []}
        run.write_job({**plain, "after": [str(parent.path) for parent in after], **job})
        names.append(name)
        return run

    names: list[str] = []
    done, waits = make("done", []), make("waits", [], not_queued={"tasks": [0], "why": "your submit limit is 5"})
    records.write_json(done.path / "result.json", {"status": "finished"})
    child = make("child", [done, waits])
    Chain(tmp_path).check_needed(child)
    failed = make("failed", [done])
    records.write_json(failed.path / "result.json", {"status": "failed"})
    behind = make("behind", [failed])
    last = make("last", [behind])
    with pytest.raises(UserError, match=f"{last.reference} needs {failed.reference}, which did not finish"):
        Chain(tmp_path).check_needed(last)
    assert Chain(tmp_path).behind(failed) == [behind, last]
    assert Chain(tmp_path).behind(done) == [child, failed, behind, last]
