"""What real Slurms of several versions printed (`record_slurm_outputs.py` says how) gives the same plain records from each."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.client import job_output, job_reasons, node_output, slurm_commands, slurm_queries
from slurm.client.job_output import Job
from slurm.client.node_output import GpuCount, Node
from slurm.execution.requeue import Fate, fate_of
from slurm.watching import doctor

OUTPUTS = Path(__file__).parent / "slurm_outputs"
VERSIONS = sorted(path.name for path in OUTPUTS.iterdir())
KILLED = {"JobLaunchFailure", "RaisedSignal:9(Killed)"}
"""22.05 takes a script that ends by a signal for one that could not be started."""

COMMENT = '{"run":"train/a|b","directory":"/runs/a b"}'
WAITING = ("PENDING", "", "main", "")

# Name of each job: its state, nodes, partition, GPUs and reason.
JOBS = {
    "completed": ("COMPLETED", "n3", "main", "", ""),
    "failed": ("FAILED", "n3", "main", "", "NonZeroExitCode"),
    "killed": ("FAILED", "n3", "main", "", "killed"),
    "cancelled": ("CANCELLED", "n1", "main", "", ""),
    "timeout": ("TIMEOUT", "n3", "main", "", "TimeLimit"),
    "node-fail": ("NODE_FAIL", "n4", "main", "", "NodeDown"),
    "preempted-for-good": ("PREEMPTED", "c1", "low", "", ""),
    "urgent": ("COMPLETED", "c1", "main", "", ""),
    "suspended": ("SUSPENDED", "n1", "main", "", ""),
    "running": ("RUNNING", "n1", "main", "gpu:h200:1", ""),
    "two-nodes": ("RUNNING", "n[1-2]", "main", "gpu:h200:1", ""),
    "a100": ("RUNNING", "n2", "main", "gpu:a100:1", ""),
    "array_0": ("FAILED", "n2", "main", "", "NonZeroExitCode"),
    "array_1": ("RUNNING", "n2", "main", "", ""),
    "array_2": ("RUNNING", "n2", "main", "", ""),
    "array_3": (*WAITING, "JobArrayTaskLimit"),
    "array_4": (*WAITING, "JobArrayTaskLimit"),
    "preempted": ("PENDING", "", "low", "", "BeginTime"),
    "requeued": ("PENDING", "", "low", "", "BeginTime"),
    "later": (*WAITING, "BeginTime"),
    "held": ("PENDING", "", "main", "gpu:2", "JobHeldUser"),
    "dependent": (*WAITING, "Dependency"),
    "never": (*WAITING, "DependencyNeverSatisfied"),
    "resources": ("PENDING", "", "main", "gpu:h200:2", "Resources"),
}

PARTITIONS = ("main", "low", "short")
NODES = {
    "n1": Node("n1", ("MIXED",), PARTITIONS, {"h200": GpuCount(2, 2)}, 8, 2, 16_000, 5_096),
    "n2": Node("n2", ("MIXED",), PARTITIONS, {"h200": GpuCount(2, 1), "a100": GpuCount(1, 1)}, 8, 4, 16_000, 2_000),
    "n3": Node("n3", ("IDLE", "DRAIN"), PARTITIONS, {"a100": GpuCount(1, 0)}, 8, 0, 16_000, 0, reason="bad fan, row 3"),
    "n4": Node("n4", ("DOWN", "NOT_RESPONDING"), PARTITIONS, {}, 8, 0, 16_000, 0, reason="crashed"),
    "c1": Node("c1", ("IDLE",), PARTITIONS, {}, 4, 0, 8_000, 0),
}


class Recorded:
    """The answers of one version, given to whoever runs those commands."""

    def __init__(self, version: str) -> None:
        self.directory = OUTPUTS / version
        self.commands: list[dict[str, Any]] = json.loads((self.directory / "commands.json").read_text())

    def text(self, file: str) -> str:
        return (self.directory / file).read_text()

    def answer(self, command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        for entry in self.commands:
            if entry["command"] == list(command):
                return subprocess.CompletedProcess(command, entry["exit_code"], self.text(entry["stdout"]), entry["stderr"])
        raise AssertionError(f"{command} was not recorded; record again: python tests/record_slurm_outputs.py")

    def command(self, file: str) -> list[str]:
        return next(entry["command"] for entry in self.commands if entry["stdout"] == file)

    def id_of(self, name: str) -> str:
        return next(job.array_id or job.id for job in job_output.parse_squeue(self.text("squeue.txt")) if job.name == name)


@pytest.fixture(params=VERSIONS)
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    version = Recorded(request.param)
    squeue = version.command("squeue.txt")
    user = int(squeue[squeue.index("-u") + 1])
    monkeypatch.setattr(os, "getuid", lambda: user)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setattr(slurm_commands.subprocess, "run", lambda command, **options: version.answer(command))
    return version


def named(jobs: list[Job]) -> dict[str, Job]:
    """The jobs by name; the tasks of the array as `array_3`."""
    return {job.name + (f"_{job.id.partition('_')[2]}" if "_" in job.id else ""): job for job in jobs}


def told(job: Job) -> tuple[str, ...]:
    return (job.state, job.nodes, job.partition, job.gpus, "killed" if job.reason in KILLED else job.reason)


def test_the_oldest_version_a_middle_one_and_the_newest_are_recorded() -> None:
    assert {"22.05", "24.11", "26.05"} <= {version[:5] for version in VERSIONS}


# -- jobs -------------------------------------------------------------------------------------------------------------


def test_my_jobs_read_the_same_in_every_version(recorded: Recorded) -> None:
    jobs = named(slurm_queries.my_jobs())
    assert {name: told(job) for name, job in jobs.items()} == JOBS
    assert {name for name, job in jobs.items() if job.priority == 0} == {"held", "suspended"}
    assert (jobs["running"].limit_s, jobs["array_1"].limit_s, jobs["timeout"].limit_s) == (3600, 2 * 86400, 60)
    assert (jobs["running"].comment, jobs["held"].comment) == (COMMENT, "")
    assert jobs["dependent"].dependency == f"afterok:{jobs['running'].id}(unfulfilled)"
    assert jobs["never"].dependency == f"afterok:{jobs['failed'].id}(failed)"
    assert {job.array_id for name, job in jobs.items() if name.startswith("array")} == {recorded.id_of("array")}
    assert 60 <= jobs["timeout"].elapsed_s <= 120
    waits = jobs["later"].started, jobs["later"].submitted
    assert waits[0] is not None
    assert waits[1] is not None
    assert waits[0] - waits[1] == pytest.approx(10 * 86400, abs=2)


def test_json_and_text_of_a_version_tell_the_same_jobs(recorded: Recorded) -> None:
    in_text = named(slurm_queries.my_jobs())
    in_json = named(job_output.parse_jobs_json(recorded.text("squeue.json")))
    folded = in_json.pop("array_[3-4%2]")
    assert (folded.state, folded.reason, folded.throttle) == ("PENDING", "JobArrayTaskLimit", 2)
    unfinished = {name for name, job in in_text.items() if not job.is_final} - {"array_3", "array_4"}
    assert set(in_json) >= unfinished
    for name, job in in_json.items():
        for field in ("id", "raw_id", "array_id", "submitted", "dependency", "comment", "priority"):
            assert getattr(job, field) == getattr(in_text[name], field), (name, field)
        assert told(job) == JOBS[name]


def test_a_job_in_full_is_the_same_in_every_version(recorded: Recorded) -> None:
    (job,) = slurm_queries.job_details(recorded.id_of("running"))
    assert (*told(job), job.limit_s, job.mem_mb, job.required_nodes) == (*JOBS["running"], 3600, 4096, "n1")
    assert (job.comment, job.name, job.nice, job.num_restarts, job.throttle) == (COMMENT, "running", 0, 0, 0)
    assert job.requested.startswith("cpu=1,mem=4G,node=1,billing=1")


def test_a_job_on_two_nodes_is_read_from_its_details(recorded: Recorded) -> None:
    (job,) = job_output.parse_scontrol(recorded.text("scontrol-two-nodes.txt"))
    assert (*told(job), job.nice, job.name) == (*JOBS["two-nodes"], 7, "two-nodes")


@pytest.mark.parametrize("name", ["running", "held", "timeout", "cancelled", "preempted", "preempted-for-good", "requeued"])
def test_scontrols_text_tells_a_job_as_squeue_does(recorded: Recorded, name: str) -> None:
    (job,) = job_output.parse_scontrol(recorded.text(f"scontrol-{name}.txt"))
    assert told(job) == JOBS[name]
    assert (job.comment, job.num_restarts) == (COMMENT if name == "running" else "", int(name in ("preempted", "requeued")))


def test_scontrols_text_tells_an_arrays_tasks_apart(recorded: Recorded) -> None:
    tasks = named(job_output.parse_scontrol(recorded.text("scontrol-array.txt")))
    assert {name: task.state for name, task in tasks.items()} == {
        "array_0": "FAILED",
        "array_1": "RUNNING",
        "array_2": "RUNNING",
        "array_[3-4%2]": "PENDING",
    }
    assert {task.throttle for task in tasks.values()} == {2}


@pytest.mark.parametrize(
    ("name", "fate"),
    [
        ("running", Fate.RUNNING),
        ("requeued", Fate.REQUEUED),
        ("preempted", Fate.REQUEUED),
        ("preempted-for-good", Fate.PREEMPTED),
        ("timeout", Fate.TIMED_OUT),
        ("cancelled", Fate.CANCELLED),
    ],
)
def test_what_slurm_does_to_a_stopped_job_is_read_in_every_version(recorded: Recorded, name: str, fate: Fate) -> None:
    assert fate_of(recorded.text(f"scontrol-{name}.txt"), 0) is fate


def test_every_reason_reads_in_words(recorded: Recorded) -> None:
    jobs = named(slurm_queries.my_jobs())
    words = {name: job_reasons.in_words(job) for name, job in jobs.items()}
    assert words["killed"] in ("its process was ended by signal 9 (Killed)", "could not be launched on its node")
    assert words["timeout"] == "reached its time limit"
    assert words["node-fail"] == "a node that it needs is down"
    assert words["dependent"] == f"waits for {jobs['running'].id}"
    assert words["array_3"] == "waits for other tasks of its array (the throttle)"
    assert [name for name, text in words.items() if text in {job.reason for job in jobs.values() if job.reason}] == []


def test_accounting_tells_the_same_ends(recorded: Recorded) -> None:
    command = recorded.command("sacct.txt")
    jobs = named(slurm_queries.finished_jobs(command[command.index("-j") + 1].split(",")))
    finals = {name: (state, nodes) for name, (state, nodes, *_) in JOBS.items() if state in job_output.FINAL_STATES}
    assert {name: (job.state, job.nodes) for name, job in jobs.items() if job.is_final} == finals
    assert {name: job.reason for name, job in jobs.items() if job.reason} == {
        "failed": "exit code 3",
        "killed": "ended by signal 9",
        "array_0": "exit code 5",
    }


# -- nodes and the cluster --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parse", [node_output.parse_nodes_json, node_output.parse_sinfo])
def test_nodes_read_the_same_in_every_version_from_json_and_text(recorded: Recorded, parse: Callable[[str], list[Node]]) -> None:
    nodes = parse(recorded.text("sinfo.json" if parse is node_output.parse_nodes_json else "sinfo.txt"))
    assert {node.name: node._replace(partitions=tuple(sorted(node.partitions))) for node in nodes} == {
        name: node._replace(partitions=tuple(sorted(node.partitions))) for name, node in NODES.items()
    }
    assert [node.name for node in nodes if node.takes_jobs] == ["c1", "n1", "n2"]


def test_the_doctor_finds_the_same_facts_in_every_version(recorded: Recorded) -> None:
    ours = ("site file", "{data}", "{ssd}", "{runs}")  # of this clone, not of Slurm
    found = {finding.subject: finding.fact for finding in doctor.gather(Site()) if finding.subject not in ours}
    assert found.pop("Slurm") == f"{recorded.directory.name}, cluster private"
    assert found == {
        "preemption": "partition_prio, mode REQUEUE",
        "preemption signal": "the job's own (--signal), then SIGTERM",
        "grace in low": "20 s",
        "requeue": "allowed",
        "requeue delay": "600 s",
        "KillWait": "3 s",
        "partition limits": "enforced at submission",
        "arrays": "MaxArraySize 1001, MaxJobCount 10000",
        "memory": "counted, default 1000 MiB",
        "accounting": "sacct answers",
        "finished jobs": "forgotten after 300 s",
        "lost node": "counted as down after 300 s",
        "failed rank": "ends its job",
        "partition main (default)": "no time limit, priority tier 10, nodes c1,n[1-4]",
        "partition low": "no time limit, priority tier 1, nodes c1,n[1-4]",
        "partition short": "time up to 01:00:00, default 00:10:00, at most 1 node a job, priority tier 5, nodes c1,n[1-4]",
    }


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_an_unknown_job_is_said_in_every_version(recorded: Recorded) -> None:
    with pytest.raises(UserError, match="Slurm knows no job 7: it ended a while ago, or never was"):
        slurm_queries.job_details("7")


def test_a_machine_of_no_cluster_is_known_by_its_refusal(recorded: Recorded) -> None:
    with pytest.raises(slurm_commands.CommandFailed, match="this machine belongs to no cluster") as caught:
        slurm_commands.run(*recorded.command("no-cluster.txt"))
    assert caught.value.is_without_cluster


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("partition-limit.txt", "Requested time limit is invalid"),
        ("running-partition.txt", "Job is no longer pending"),
        ("resume-a-running-node.txt", "Invalid node state"),
    ],
)
def test_a_refusal_keeps_the_words_that_the_code_goes_by(recorded: Recorded, file: str, words: str) -> None:
    with pytest.raises(slurm_commands.CommandFailed) as caught:
        slurm_commands.run(*recorded.command(file))
    assert words in caught.value.stderr
