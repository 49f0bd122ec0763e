"""A private Slurm: quick to come, whole while it is there, and nothing left when it is gone."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from toy_project import ToyProject
from waiting import wait_until

from pipeline.config.errors import UserError
from slurm.client import processes, slurm_commands, slurm_queries
from slurm.cluster import control, faults, hardware, layout
from slurm.cluster.daemons import MAX_DIRECTORY_LENGTH, PrivateCluster
from slurm.cluster.layout import Partition

pytestmark = pytest.mark.slurm


def sbatch(cluster: PrivateCluster, script: str, *options: str) -> str:
    return cluster.command("sbatch", "--parsable", "-o", str(cluster.directory / "out-%j"), *options, "--wrap", script).strip()


def state(cluster: PrivateCluster, job: str) -> str:
    return cluster.command("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").split()[0]


def slurm_restarts(cluster: PrivateCluster, job: str) -> int:
    return int(re.search(r" Restarts=(\d+)", cluster.command("scontrol", "-o", "show", "job", job))[1])


def node_of(cluster: PrivateCluster, job: str) -> str:
    return cluster.command("squeue", "-h", "-t", "all", "-j", job, "-o", "%N").strip()


def of_cluster(cluster: PrivateCluster, jobs: Sequence[str] = ()) -> list[int]:
    """Every process, but this one, that was started with the cluster's configuration, and the slurmstepds of `jobs`.

    These are known by their title: a newer one shows no environment.
    """
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]
    titles = tuple(f"slurmstepd: [{job}." for job in jobs)
    return [pid for pid in pids if processes.belongs_to(pid, cluster.configuration) or processes.command_line(pid).startswith(titles)]


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = Path("/tmp") / f"private-slurm-test-{os.getpid()}"
    yield path
    PrivateCluster(path).remove()


# -- what there is ----------------------------------------------------------------------------------------------------


def test_it_has_nodes_with_gpus_of_two_types_and_partitions_with_different_limits(cluster: PrivateCluster) -> None:
    nodes = {node.name: {kind: count.total for kind, count in node.gpus.items()} for node in slurm_queries.all_nodes()}
    assert nodes == {"n1": {"h200": 2}, "n2": {"h200": 2}, "n3": {"a100": 1}}
    partitions = {record["PartitionName"]: record for record in slurm_queries.partitions()}
    assert {name: record["MaxTime"] for name, record in partitions.items()} == {
        "main": "UNLIMITED",
        "low": "UNLIMITED",
        "short": "01:00:00",
    }
    assert partitions["low"]["PreemptMode"] == "REQUEUE"
    assert all(node.takes_jobs for node in slurm_queries.all_nodes())


def test_text_and_json_of_this_slurm_say_the_same(cluster: PrivateCluster) -> None:
    from slurm.client import job_output, node_output

    cluster.command("scontrol", "update", "nodename=n3", "state=drain", "reason=a bad | fan")
    job = sbatch(cluster, "sleep 60", "--gres=gpu:h200:1", "--comment", '{"run": "a|b"}', "--time=7", "--mem=300")
    wait_until(lambda: state(cluster, job) == "RUNNING", "the job")
    by_name = {node.name: node for node in node_output.parse_nodes_json(cluster.command("sinfo", "-N", "--json"))}
    for node in node_output.parse_sinfo(cluster.command("sinfo", "-h", "-N", "-O", node_output.NODE_FORMAT)):
        json_node = by_name.pop(node.name)
        assert node._replace(partitions=()) == json_node._replace(partitions=())
        assert set(node.partitions) == set(json_node.partitions)
    assert by_name == {}
    by_squeue = job_output.parse_squeue(cluster.command("squeue", "-h", "-r", "-j", job, "-o", job_output.JOB_FORMAT))[0]
    by_json = next(j for j in job_output.parse_jobs_json(cluster.command("squeue", "--json")) if j.id == job)
    by_scontrol = slurm_queries.job_details(job)[0]
    plain = {"elapsed_s": 0, "requested": "", "mem_mb": None}
    assert by_squeue._replace(**plain) == by_json._replace(**plain) == by_scontrol._replace(**plain)
    assert by_json.requested == by_scontrol.requested == "cpu=1,mem=300M,node=1,billing=1"
    assert by_json.mem_mb == by_scontrol.mem_mb == 300
    cluster.command("scancel", job)
    cluster.command("scontrol", "update", "nodename=n3", "state=resume")


def test_two_jobs_on_a_node_get_different_gpus(cluster: PrivateCluster) -> None:
    jobs = [sbatch(cluster, "echo $CUDA_VISIBLE_DEVICES; sleep 1", "--gres=gpu:1", "--nodelist=n2") for _ in range(2)]
    wait_until(lambda: all(state(cluster, job) == "COMPLETED" for job in jobs), "both jobs")
    assert sorted((cluster.directory / f"out-{job}").read_text().strip() for job in jobs) == ["0", "1"]


def test_a_job_over_its_partitions_limit_is_refused_at_once(cluster: PrivateCluster) -> None:
    with pytest.raises(slurm_commands.CommandFailed, match=r"sbatch exited 1: .*time limit.*command: sbatch"):
        sbatch(cluster, "true", "--partition=short", "--time=61")


def test_the_callers_slurm_variables_do_not_reach_a_command(cluster: PrivateCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "low")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "7")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    assert slurm_commands.environment()["SLURM_CONF"] == str(cluster.configuration)
    job = slurm_commands.run("sbatch", "--parsable", "-H", "-p", "main", "-t", "5", "-o", "/dev/null", "--wrap", "true").strip()
    (details,) = slurm_queries.job_details(job)
    assert (details.partition, details.limit_s) == ("main", 300)
    assert next(j for j in slurm_queries.my_jobs() if j.id == job).state == "PENDING"
    slurm_commands.run("scancel", job)


def test_a_job_that_slurm_does_not_know_is_said(cluster: PrivateCluster) -> None:
    with pytest.raises(UserError, match="Slurm knows no job 7: it ended a while ago, or never was"):
        slurm_queries.job_details("7")


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_job_of_a_crashed_node_goes_on_elsewhere_and_the_node_comes_back(cluster: PrivateCluster) -> None:
    job = sbatch(cluster, "sleep 60", "--requeue", "--exclude=n3")
    wait_until(lambda: state(cluster, job) == "RUNNING", "the job")
    first = node_of(cluster, job)
    faults.crash(cluster, first)
    wait_until(lambda: state(cluster, job) == "RUNNING" and node_of(cluster, job) not in ("", first), "the job on another node")
    faults.revive(cluster, first)
    wait_until(lambda: all(node.takes_jobs for node in slurm_queries.all_nodes()), "the node")
    cluster.command("scancel", job)


def test_a_job_goes_on_when_only_its_slurmd_dies(cluster: PrivateCluster) -> None:
    beats = cluster.directory / "beats"
    job = sbatch(cluster, f"while true; do date >> {beats}; sleep 0.1; done", "--nodelist=n1")
    wait_until(beats.exists, "the job")
    faults.lose_contact(cluster, "n1")
    size = beats.stat().st_size
    wait_until(lambda: beats.stat().st_size > size, "the job without its slurmd")
    faults.crash(cluster, "n1")
    wait_until(lambda: not any(processes.of_jobs(cluster.configuration)), "the job's end")
    cluster.command("scancel", job)
    faults.revive(cluster, "n1")


# -- coming and going -------------------------------------------------------------------------------------------------


def test_nothing_is_left_when_it_stops_though_arrays_run(start_cluster: Callable[..., PrivateCluster]) -> None:
    cluster = start_cluster()
    array = sbatch(cluster, "setsid sleep 300 & sleep 300", "--array=0-9%6")
    running = ("squeue", "-h", "-r", "-t", "running", "-j", array, "-o", "%A")
    wait_until(lambda: len(cluster.command(*running).split()) == 6, "six tasks")
    jobs = cluster.command(*running).split()
    # The daemons' own (munged, slurmctld, its helper and three slurmd), and a slurmstepd, a script and two sleeps for each of six tasks.
    wait_until(lambda: len(of_cluster(cluster, jobs)) >= 6 + 6 * 4, "the array's processes")
    cluster.stop()
    assert of_cluster(cluster, jobs) == []
    assert not processes.pids_file(cluster.directory).exists()
    assert not cluster.is_running()


def test_the_queue_outlives_a_stop_and_running_jobs_are_requeued(start_cluster: Callable[..., PrivateCluster]) -> None:
    cluster = start_cluster()
    running = sbatch(cluster, "echo started; sleep 300")
    waiting = sbatch(cluster, "true", "-H")
    wait_until(lambda: state(cluster, running) == "RUNNING", "the job")
    cluster.stop()
    cluster.start(layout.pretended())
    wait_until(lambda: state(cluster, running) == "RUNNING" and slurm_restarts(cluster, running) == 1, "the job's second run")
    assert state(cluster, waiting) == "PENDING"
    cluster.stop()
    cluster.start(layout.pretended(), fresh=True)
    assert cluster.command("squeue", "-h") == ""


def test_a_second_start_is_refused_while_it_is_up(cluster: PrivateCluster) -> None:
    with pytest.raises(UserError, match=r"is already up \(munged, slurmctld, slurmd-n1, .*\); `crosscoder cluster stop` ends it"):
        PrivateCluster(cluster.directory).start(layout.pretended())
    assert cluster.is_running()


def test_the_pids_of_before_a_reboot_are_neither_taken_for_its_own_nor_killed(start_cluster: Callable[..., PrivateCluster]) -> None:
    cluster = start_cluster()
    cluster.stop()
    with subprocess.Popen(["sleep", "60"]) as bystander:
        gone = subprocess.Popen(["true"])
        gone.wait()
        processes.write_pids(cluster.directory, {"slurmctld": bystander.pid, "slurmd-n1": gone.pid, "slurmd-n2": 2**22 + 1})
        assert not cluster.is_running()
        assert control.stop(cluster.directory) == f"# no cluster runs in {cluster.directory}"
        processes.write_pids(cluster.directory, {"slurmctld": bystander.pid, "slurmd-n1": gone.pid})
        cluster.start(layout.pretended())
        assert bystander.pid not in cluster.pids().values()
        assert bystander.poll() is None
        bystander.kill()


def test_a_half_written_record_of_pids_is_no_cluster(tmp_path: Path) -> None:
    processes.pids_file(tmp_path).parent.mkdir()
    processes.pids_file(tmp_path).write_text('{"slurmctld": 1')
    assert PrivateCluster(tmp_path).pids() == {}


def test_a_start_that_fails_says_why_and_leaves_nothing(short_path: Path) -> None:
    cluster = PrivateCluster(short_path)
    with pytest.raises(UserError, match=r"did not come up \(slurmctld died\); the ends of its logs:(.|\n)*NoSuchSetting"):
        cluster.start(layout.pretended(extra_lines=("NoSuchSetting=1",)))
    assert of_cluster(cluster) == []


def test_ids_of_a_later_cluster_are_higher_than_those_of_an_earlier_one(start_cluster: Callable[..., PrivateCluster]) -> None:
    first = start_cluster()
    id_of_first = int(sbatch(first, "true", "-H"))
    first.stop()
    time.sleep(0.11)  # ids come from the clock, in tenths of a second
    first.start(layout.pretended(), fresh=True)
    assert int(sbatch(first, "true", "-H")) > id_of_first


def test_a_job_of_a_higher_partition_pushes_a_lower_one_back_into_the_queue(start_cluster: Callable[..., PrivateCluster]) -> None:
    partitions = (Partition("high", tier=10, is_default=True), Partition("low", tier=1, preemptible=True, grace_s=0))
    cluster = start_cluster(replace(layout.pretended(), partitions=partitions))
    low = sbatch(cluster, "sleep 60", "-p", "low", "--gres=gpu:a100:1")
    wait_until(lambda: state(cluster, low) == "RUNNING", "the low job")
    high = sbatch(cluster, "sleep 60", "-p", "high", "--gres=gpu:a100:1")
    wait_until(lambda: state(cluster, high) == "RUNNING", "the high job")
    assert state(cluster, low) == "PENDING"


# -- on a workstation -------------------------------------------------------------------------------------------------


def test_a_workstation_offers_its_own_cores_and_the_command_line_finds_it(short_path: Path) -> None:
    crosscoder = ToyProject(short_path).crosscoder
    started = crosscoder("cluster", "start")
    assert started.returncode == 0, started.stderr
    assert f"export SLURM_CONF={short_path}/.cluster/slurm.conf" in started.stdout
    assert f"{hardware.host_name()}: {len(os.sched_getaffinity(0))} cores" in started.stdout
    again = crosscoder("cluster", "start")
    assert (again.returncode, again.stderr.count("is already up")) == (1, 1)
    assert "queue: empty" in crosscoder("cluster", "status").stdout
    listed = crosscoder("jobs", "--json")
    assert (listed.returncode, json.loads(listed.stdout)) == (0, [])
    examined = json.loads(crosscoder("doctor", "--json").stdout)
    assert next(finding for finding in examined if finding["subject"] == "Slurm")["fact"].endswith("cluster private")
    assert crosscoder("cluster", "stop").stdout.startswith("# down in")
    status = crosscoder("cluster", "status")
    assert (status.returncode, "`crosscoder cluster start` starts one" in status.stderr) == (1, True)
    for command in (["doctor"], ["change", "7", "nice=1"], ["accelerators"]):
        done = crosscoder(*command)
        assert slurm_commands.CLUSTER_STOPPED in done.stdout + done.stderr, command
        assert "belongs to no cluster" not in done.stderr


def test_a_cluster_that_is_taken_up_again_has_the_nodes_that_its_queue_was_made_for(short_path: Path) -> None:
    directory = short_path / "c"
    try:
        control.start(directory, pretend=True)
        control.stop(directory)
        again = control.start(directory)
        assert [line.split()[1] for line in again.splitlines() if "cores" in line] == ["n1:", "n2:", "n3:"]
        assert "its nodes are pretended ones, as before; --fresh forgets them with the queue" in again
        control.stop(directory)
        fresh = control.start(directory, fresh=True)
        assert f"{hardware.host_name()}: " in fresh
        assert "as before" not in fresh
        control.stop(directory)
        assert f"{hardware.host_name()}: " in control.start(directory)
    finally:
        PrivateCluster(directory).remove()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * MAX_DIRECTORY_LENGTH)
    with pytest.raises(UserError, match="unix sockets in it allow 85; choose another directory"):
        PrivateCluster(deep).start(layout.pretended())
