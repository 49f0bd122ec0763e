"""Changes to what is queued, on a real Slurm: made, read back, recorded; or refused with the reason."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_project import ToyProject
from waiting import wait_until

from pipeline.config.errors import UserError
from pipeline.config.resources import Resources
from pipeline.config.site_file import Site
from slurm.changing import change, job_control, job_updates
from slurm.client import slurm_commands, slurm_queries, slurm_values
from slurm.client.job_output import Job
from slurm.cluster.daemons import PrivateCluster
from slurm.record import record_view
from slurm.record.run_directory import RunDirectory
from slurm.watching import job_listing


class Queue:
    """A toy project and a cluster whose node n3 is full, so that what is sent there waits."""

    def __init__(self, root: Path, cluster: PrivateCluster) -> None:
        self.project = ToyProject(root)
        self.cluster = cluster
        self.site = Site(runs=self.project.runs)

    def block(self) -> None:
        self.cluster.command("sbatch", "-w", "n3", "-c", "8", "-o", "/dev/null", "-J", "block", "--wrap", "sleep 600")

    def crosscoder(self, *arguments: str, expect: int = 0) -> str:
        done = self.project.crosscoder(*arguments, SLURM_CONF=str(self.cluster.configuration))
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *arguments: str) -> list[RunDirectory]:
        return [RunDirectory(Path(path)) for path in re.findall(r"^run (.*)$", self.crosscoder("submit", *arguments), re.M)]

    def waiting(self, *arguments: str, name: str = "toy") -> RunDirectory:
        """A run that waits for n3."""
        return self.submit(self.project.config(name), "--node", "n3", *arguments)[0]

    def change(self, run: RunDirectory, *changes: str) -> list[str]:
        return change.change(run.reference, changes, self.site)

    def job(self, run: RunDirectory, task: int = 0) -> str:
        job_id = run.job_of_task(task)
        assert job_id is not None
        return job_id

    def details(self, run: RunDirectory) -> Job:
        return slurm_queries.job_details(self.job(run))[0]

    def state(self, job_id: str) -> str:
        return next((job.state for job in slurm_queries.my_jobs() if job.id == job_id), "gone")


@pytest.fixture(scope="module")
def module_queue(tmp_path_factory: pytest.TempPathFactory, cluster: PrivateCluster) -> Queue:
    return Queue(tmp_path_factory.mktemp("toy"), cluster)


@pytest.fixture
def queue(module_queue: Queue) -> Iterator[Queue]:
    module_queue.block()
    yield module_queue
    module_queue.cluster.command("scancel", "--me")
    wait_until(lambda: all(job.is_final for job in slurm_queries.my_jobs()), "an empty queue")


def plain(job: Job) -> Job:
    """The job without what the scheduler sets by itself."""
    return job._replace(priority=0, started=None, reason="")


pytestmark = pytest.mark.slurm


# -- by scontrol ------------------------------------------------------------------------------------------------------


def test_resources_of_a_waiting_job_change_on_the_spot_and_are_recorded(queue: Queue) -> None:
    run = queue.waiting("resources.gpus=1", "resources.mem_gb=0.5")
    before = queue.job(run)
    queue.change(run, "node=n2", "partition=low", "timeout_min=20", "resources.gpus=2", "mem_gb=2", "nice=50")
    job = queue.details(run)
    assert (job.id, job.partition, job.required_nodes, job.limit_s, job.gpus, job.mem_mb, job.nice) == (
        before,
        "low",
        "n2",
        1200,
        "gpu:2",
        2048,
        50,
    )
    record = run.job()
    assert (record["resources"]["partition"], record["resources"]["gpus"], record["resources"]["node"]) == ("low", 2, "n2")
    (made,) = record["changes"]
    assert (made["how"], made["what"]["timeout_min"], made["what"]["nice"]) == ("scontrol", [60, 20], 50)
    wait_until(lambda: run.state() == "finished", "the job")
    assert (run.result() or {})["result"]["gpus"] == "0,1"


def test_a_change_that_slurm_refuses_for_the_moment_is_asked_for_again(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Slurm 26.05 without accounting does with a new partition, every other time."""
    run_command, refusals = slurm_commands.run, ["once", "twice"]

    def refusing(*command: str, **options: Any) -> str:
        if "Partition=low" in command and refusals:
            refusals.pop()
            raise slurm_commands.CommandFailed("scontrol exited 1", 1, "Resource temporarily unavailable for job 7")
        return run_command(*command, **options)

    monkeypatch.setattr(slurm_commands, "run", refusing)
    run = queue.waiting()
    queue.change(run, "partition=low")
    assert (queue.details(run).partition, refusals) == ("low", [])
    monkeypatch.setattr(job_updates, "MAX_TRIES", 2)
    refusals[:] = ["for good"] * 3
    with pytest.raises(slurm_commands.CommandFailed, match="scontrol exited 1"):
        job_updates.update(queue.job(run), {"Partition": "low"}, is_running=False)
    assert len(refusals) == 1


def test_a_job_waits_for_the_run_that_it_is_told_to_and_for_none_again(queue: Queue) -> None:
    first, second = queue.waiting(), queue.waiting(name="second")
    queue.change(second, f"after={first.reference}", "node=null")
    assert queue.details(second).dependency == f"afterok:{queue.job(first)}(unfulfilled)"
    assert second.job()["after"] == [str(first.path)]
    queue.change(second, "dependency=null")
    assert queue.details(second).dependency == ""
    assert second.job()["after"] == []


def test_an_arrays_throttle_changes_and_a_single_job_has_none(queue: Queue) -> None:
    array = queue.waiting("resources.array_tasks=4", "resources.max_parallel=1")
    queue.change(array, "throttle=3")
    assert {job.throttle for job in slurm_queries.job_details(queue.job(array).partition("_")[0])} == {3}
    with pytest.raises(UserError, match="max_parallel is the throttle of an array, and this is a single job"):
        queue.change(queue.waiting(name="single"), "max_parallel=3")


def test_what_was_changed_is_said_in_words_and_what_was_so_already_too(queue: Queue) -> None:
    run = queue.waiting("resources.gpus=1", "resources.mem_gb=0.5")
    job = queue.job(run)
    assert queue.change(run, "timeout_min=12", "mem_gb=2", "nice=5", "after=null") == [
        f"{job}: time limit 12 min, memory 2 GB, nice 5, waits for nothing"
    ]
    num_changes = len(run.job()["changes"])
    assert queue.change(run, "gpus=1", "timeout_min=12") == [f"{job}: time limit 12 min already, gpus 1 already"]
    assert len(run.job()["changes"]) == num_changes
    other = queue.waiting(name="other")
    assert queue.change(run, f"after={other.reference}") == [f"{job}: waits for {other.reference}"]


def test_a_gpu_type_without_gpus_is_refused(queue: Queue) -> None:
    run = queue.waiting()
    with pytest.raises(UserError, match=f"{run.reference} has no gpus; give gpus=1 too"):
        queue.change(run, "gpu_type=h200")
    assert len(run.job()["jobs"]) == 1


def test_one_task_of_an_array_can_change_alone(queue: Queue) -> None:
    run = queue.waiting("resources.array_tasks=3")
    change.change(queue.job(run, 1), ["timeout_min=5"], queue.site)
    wait_until(lambda: len({job.limit_s for job in slurm_queries.my_jobs() if job.array_id}) == 2, "the change")
    limits = {job.id: job.limit_s for job in slurm_queries.my_jobs() if job.array_id}
    assert [limits[queue.job(run, task)] for task in range(3)] == [3600, 300, 3600]
    assert run.job()["resources"]["timeout_min"] == 60
    assert record_view.change_text(run.job()["changes"][-1]) == "task 1: timeout_min 60 -> 5"
    change.change(queue.job(run, 1), ["timeout_min=60"], queue.site)  # as the run's record has it, which is not this task's
    wait_until(lambda: {job.limit_s for job in slurm_queries.my_jobs() if job.array_id} == {3600}, "the change back")


def test_what_is_impossible_is_refused_and_changes_nothing(queue: Queue) -> None:
    run = queue.waiting("resources.gpus=1")
    before, record, config = plain(queue.details(run)), run.job(), run.config_values()
    for changes, reason in [
        (["node=n9"], "node is n9, but partition .* has no such node"),
        (["partition=nope"], "partition is nope, but this cluster has main, low, short"),
        (["partition=short", "timeout_min=90"], "timeout_min is 90, but jobs in short may take 60 minutes"),
        (["gpus=2"], "gpus is 2 .*n3"),
        (["node=n1", "gpu_type=a100"], "gpus is 1 .*a100"),
        (["gpus=-1"], "gpus is -1"),
        (["priority=high"], "priority is 'high', expected a whole number"),
        (["partition"], "'partition' is not of the form key=value"),
        ([], "name a change, for example"),
    ]:
        with pytest.raises(UserError, match=reason):
            queue.change(run, *changes)
    for change_, reason in [
        ("array_tasks=5", "the number of tasks can't change under the same id"),
        ("stepz=5", "stepz is not a setting; did you mean `steps`"),
    ]:
        assert reason in queue.crosscoder("change", run.reference, change_, expect=1)
    assert plain(queue.details(run)) == before
    assert (run.job(), run.config_values()) == (record, config)
    assert queue.details(run).priority > 0


def test_what_slurm_accepts_and_does_not_do_is_told(queue: Queue) -> None:
    job = queue.job(queue.waiting())
    with pytest.raises(UserError, match=f"Slurm accepted TimeLimit=1-0 for {job}, but shows 1440: the change was not made"):
        job_updates.update(job, {"TimeLimit": "1-0"}, is_running=False)


# -- by a new submission ----------------------------------------------------------------------------------------------


def test_a_gpu_type_changes_by_a_new_submission_of_the_same_run(queue: Queue) -> None:
    run = queue.waiting("resources.gpus=1", "resources.gpu_type=a100")
    old = queue.job(run)
    said = queue.crosscoder("change", old, "gpu_type=h200", "node=n1", "nice=7")
    new = queue.job(run)
    assert f"{old} cancelled, {run.reference} submitted anew as {new}" in said
    job = queue.details(run)
    assert (job.gpus, job.required_nodes, job.nice, new != old) == ("gpu:h200:1", "n1", 7, True)
    wait_until(lambda: queue.state(old) == "CANCELLED" and run.state() == "finished", "both jobs")
    assert run.job()["changes"][-1]["what"]["resources.gpu_type"] == ["a100", "h200"]
    assert run.config_values()["resources"]["gpu_type"] == "h200"


def test_gpus_that_slurm_would_only_seem_to_take_away_are_taken_away(queue: Queue) -> None:
    run = queue.waiting("resources.gpus=1")
    queue.crosscoder("change", run.reference, "gpus=0")
    assert queue.details(run).gpus == ""


def test_a_setting_changes_under_the_same_id_and_the_job_runs_with_it(queue: Queue) -> None:
    run = queue.waiting("resources.timeout_min=9")
    queue.crosscoder("change", run.reference, "steps=5", "node=null")
    assert run.config_values()["steps"] == 5
    assert run.job()["changes"][-1]["what"]["steps"] == [3, 5]
    assert queue.details(run).limit_s == 540
    wait_until(lambda: run.state() == "finished", "the job")
    assert (run.result() or {})["result"]["steps"] == 5


def test_a_change_made_by_scontrol_is_kept_by_a_later_new_submission(queue: Queue) -> None:
    run = queue.waiting()
    queue.change(run, "timeout_min=33")
    queue.crosscoder("change", run.reference, "cpus=2")
    assert queue.details(run).limit_s == 33 * 60


def test_dependants_wait_for_the_new_job_instead_of_being_cancelled_with_the_old(queue: Queue) -> None:
    first = queue.waiting("resources.gpus=1")
    (second,) = queue.submit(queue.project.config("child"), "--after", first.reference)
    said = queue.crosscoder("change", first.reference, "cpus=2")
    assert f"{queue.job(second)} wait for the new one" in said
    assert queue.details(second).dependency == f"afterok:{queue.job(first)}(unfulfilled)"
    time.sleep(1.5)  # Slurm cancels what can't be fulfilled within a second or so
    assert queue.details(second).state == "PENDING"


def test_a_refused_new_submission_leaves_job_and_record_as_they_were(queue: Queue) -> None:
    run = queue.waiting()
    record, config = run.job(), run.config_values()
    assert "Invalid feature specification" in queue.crosscoder("change", run.reference, "constraint=nope", expect=1)
    assert (run.job(), run.config_values()) == (record, config)
    job = queue.details(run)
    assert (job.id, job.state, job.priority > 0) == (record["jobs"][0]["id"], "PENDING", True)
    assert not list(run.path.glob(".before-change"))


def test_a_held_job_stays_held_through_a_new_submission(queue: Queue) -> None:
    run = queue.waiting()
    queue.crosscoder("hold", run.reference)
    queue.crosscoder("change", run.reference, "cpus=2")
    assert queue.details(run).priority == 0


def test_settings_of_a_run_that_has_begun_are_refused(queue: Queue) -> None:
    (run,) = queue.submit(queue.project.config("begun", steps=100, step_seconds=0.1))
    wait_until(lambda: run.progress() is not None, "the first step")
    said = queue.crosscoder("change", run.reference, "steps=50", expect=1)
    assert "is running on n" in said
    assert "steps can't be changed under it" in said
    queue.cluster.command("scontrol", "requeuehold", queue.job(run))
    wait_until(lambda: queue.details(run).state in ("PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT"), "the requeue")
    assert "has begun to work with its settings; `crosscoder rerun" in queue.crosscoder("change", run.reference, "steps=50", expect=1)


# -- what runs --------------------------------------------------------------------------------------------------------


def test_a_running_job_takes_its_time_limit_and_nothing_else(queue: Queue) -> None:
    (run,) = queue.submit(queue.project.config("long", steps=1000, step_seconds=0.1))
    wait_until(lambda: run.progress() is not None, "the first step")
    with pytest.raises(UserError, match=r"is running on n\d since \d+ s: Slurm can't change partition, gpus of a running job"):
        queue.change(run, "partition=low", "gpus=1")
    queue.change(run, "timeout_min=30")
    assert queue.details(run).limit_s == 1800


def test_jobs_shows_the_run_at_work_with_its_progress_and_the_queue_in_words(queue: Queue) -> None:
    (run,) = queue.submit(queue.project.config("seen", steps=200, step_seconds=0.1))
    held = queue.waiting(name="held")
    queue.crosscoder("hold", held.reference)
    wait_until(lambda: (run.progress() or {"step": 0})["step"] >= 3, "some steps")
    rows = {row.name: row for row in job_listing.gather(queue.site).rows() if row.state != "cancelled"}
    assert (rows["seen"].state, rows["seen"].node[:1], rows["seen"].total, rows["seen"].unit) == ("running", "n", 200, "steps")
    assert rows["seen"].ends is not None
    assert rows["seen"].ends > time.time()
    assert (rows["held"].state, rows["held"].reason) == ("held", f"held by you; `crosscoder release {queue.job(held)}` frees it")
    assert (rows["block"].run, rows["block"].state) == ("", "running")


# -- hold, release, cancel --------------------------------------------------------------------------------------------


def test_some_tasks_of_an_array_are_held_released_and_cancelled(queue: Queue) -> None:
    run = queue.waiting("resources.array_tasks=5")
    array = queue.job(run).partition("_")[0]
    said = queue.crosscoder("hold", f"{array}_[1-2]")
    assert f"{array}_[1-2] held" in said
    held = {job.id for job in slurm_queries.my_jobs() if job.array_id and job.priority == 0}
    assert held == {f"{array}_1", f"{array}_2"}
    queue.crosscoder("release", f"{array}_1")
    assert [job.id for job in slurm_queries.my_jobs() if job.array_id and job.priority == 0] == [f"{array}_2"]
    queue.crosscoder("cancel", "--yes", f"{array}_[2-4]")
    assert [queue.state(f"{array}_{i}") for i in range(2)] == ["PENDING", "PENDING"]
    # Slurm forgets at once a cancelled task that it had not yet told from its array.
    assert {queue.state(f"{array}_{i}") for i in range(2, 5)} <= {"CANCELLED", "gone"}
    assert [row.state for row in job_listing.gather(queue.site).rows() if row.run == run.reference].count("cancelled") == 3


def test_cancel_asks_first_and_takes_all_that_is_mine(queue: Queue) -> None:
    runs = [queue.waiting(name=f"c{i}") for i in range(2)]
    asked = queue.crosscoder("cancel", "--all", expect=1)
    assert "cancel these?" in asked
    assert [queue.state(queue.job(run)) for run in runs] == ["PENDING", "PENDING"]
    queue.crosscoder("cancel", "--all", "--yes")
    wait_until(lambda: all(job.is_final for job in slurm_queries.my_jobs()), "the end of all")
    assert runs[0].job()["changes"][-1]["what"] == {"cancelled": [queue.job(runs[0])]}
    assert runs[0].state() == "cancelled"
    assert "no job of yours is waiting or running" in queue.crosscoder("cancel", "--all", "--yes")


def test_a_job_that_is_no_run_changes_as_far_as_slurm_does_it(queue: Queue) -> None:
    job = queue.cluster.command("sbatch", "--parsable", "-w", "n3", "-o", "/dev/null", "--wrap", "true").strip()
    change.change(job, ["partition=low"], queue.site)
    assert slurm_queries.job_details(job)[0].partition == "low"
    with pytest.raises(UserError, match=f"job {job} belongs to no run here, so it can't be submitted anew, which gpu_type would take"):
        change.change(job, ["gpu_type=h200"], queue.site)


def test_a_reference_to_nothing_is_said(queue: Queue) -> None:
    with pytest.raises(UserError, match="no job 7 of yours is waiting or running; `crosscoder jobs --all` lists what there was"):
        job_control.find_targets(["7"], queue.site, slurm_queries.my_jobs())
    with pytest.raises(UserError, match=r"'\[1-2,a\]' does not name tasks of an array"):
        slurm_values.parse_ranges("[1-2,a]")


# -- without a cluster ------------------------------------------------------------------------------------------------


def test_what_takes_a_new_submission_is_told_from_what_does_not() -> None:
    before = Resources(gpus=1, gpu_type="h200", partition="main", mem_gb=4.0)

    def anew(*changes: str, **fields: object) -> list[str]:
        return change.needs_new_submission(before, before.model_copy(update=fields), change.parse(changes or ["nice=1"]))

    assert anew(partition="low", node="n1", timeout_min=5, gpus=2, mem_gb=8.0, max_parallel=2) == []
    assert anew(gpu_type="a100") == ["gpu_type"]
    assert anew(gpus=0) == ["gpus"]
    assert anew(partition=None, mem_gb=None) == ["partition", "mem_gb"]
    assert anew("learning_rate=1e-3") == ["learning_rate"]


def test_ids_of_one_array_are_named_together() -> None:
    assert job_control.slurm_names(["7_1", "7_2", "7_4", "9"]) == ["7_[1-2,4]", "9"]
