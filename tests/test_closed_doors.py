"""A private cluster lets in its owner alone. `pytest -s` prints the table of attempts, as `python tests/closed_doors.py` does."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from closed_doors import attempts_to_enter, attempts_to_read, listening, sleeping_job, table
from other_user import as_user, needs_root, nobody
from waiting import wait_until

from pipeline.config.errors import UserError
from slurm.client import processes, slurm_commands
from slurm.cluster import configuration, control, hardware, layout
from slurm.cluster.daemons import PrivateCluster

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that everybody may enter: what keeps others out is to be the cluster's own."""
    with tempfile.TemporaryDirectory(prefix="private-slurm-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def running(place: Path) -> Iterator[tuple[PrivateCluster, str]]:
    """A cluster, and a job that runs a step on it."""
    cluster = PrivateCluster(place / "c")
    try:
        cluster.start(layout.pretended())
        yield cluster, sleeping_job(cluster, wait_until)
    finally:
        cluster.remove()


def test_nobody_enters_whatever_he_says_he_is(running: tuple[PrivateCluster, str]) -> None:
    cluster, job = running
    attempts = attempts_to_enter(cluster, job)
    print("\n" + table(attempts))
    is_closed = hardware.address_of_name() == configuration.ADDRESS  # else the ports can be reached, and the key alone keeps others out
    assert [attempt for attempt in attempts if attempt.succeeded and (is_closed or "connect" not in attempt.what)] == []
    assert cluster.command("squeue", "-h", "-o", "%i %T").split() == [job, "RUNNING"]
    assert set(cluster.command("sinfo", "-h", "-N", "-o", "%T").split()) <= {"idle", "mixed"}


@needs_root
def test_nobody_reads_key_state_logs_or_job_scripts(running: tuple[PrivateCluster, str]) -> None:
    attempts = attempts_to_read(running[0])
    print("\n" + table(attempts))
    assert [attempt for attempt in attempts if attempt.succeeded] == []
    assert {"munge.key", "job_state", "slurm_script", "slurmctld.log", "slurm.conf"} <= {Path(a.what).name for a in attempts}


def test_only_its_owner_may_enter_its_directory(running: tuple[PrivateCluster, str]) -> None:
    directory = running[0].directory
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "run" / "munge.key").stat().st_mode & 0o777 == 0o600


def test_daemons_and_the_steps_of_jobs_listen_on_the_loopback_alone(running: tuple[PrivateCluster, str]) -> None:
    if hardware.address_of_name() != configuration.ADDRESS:
        pytest.skip("this machine's name does not stand for 127.0.0.1; with a line `127.0.0.1 NAME` in /etc/hosts it does")
    cluster, _ = running
    addresses = listening([*cluster.pids().values(), *processes.of_jobs(cluster.configuration)])
    assert len(addresses) >= 4 + 2  # slurmctld and three slurmd; what srun listens on for its step
    assert {address.rpartition(":")[0] for address in addresses} == {configuration.ADDRESS}


def test_a_start_by_root_says_that_jobs_are_roots(place: Path) -> None:
    directory = place / "told"
    try:
        assert ("every job runs as root" in control.start(directory, pretend=True)) == (os.getuid() == 0)
    finally:
        PrivateCluster(directory).remove()


def test_a_crashed_clusters_munge_is_taken_up_and_none_is_left(place: Path) -> None:
    cluster = PrivateCluster(place / "crashed")
    try:
        cluster.start(layout.pretended())
        first = cluster.pids()["munged"]
        processes.signal_all(cluster.pids().values())
        wait_until(lambda: not cluster.pids(), "the end of its daemons")
        cluster.start(layout.pretended())
        second = cluster.pids()["munged"]
        cluster.stop()
        assert not any(processes.belongs_to(pid, cluster.configuration) for pid in (first, second))
    finally:
        cluster.remove()


@needs_root
def test_a_directory_of_another_user_is_no_place_for_a_cluster(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    directory.mkdir()
    os.chown(directory, nobody(), nobody())
    with pytest.raises(UserError, match=r"c is of another user \(uid \d+\), who could put a configuration"):
        PrivateCluster(Path(os.path.relpath(directory))).start(layout.pretended())


@needs_root
def test_another_users_cluster_is_said_in_one_sentence(
    running: tuple[PrivateCluster, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster, _ = running
    variables = {"PATH": os.defpath, "SLURM_CONF": str(cluster.configuration)}
    with pytest.raises(UserError, match=r"which you may not read: a private cluster answers its owner alone; unset it"):
        as_user(nobody(), lambda: slurm_commands.run("squeue", variables=variables))
    assert as_user(nobody(), lambda: slurm_commands.private_configuration(cluster.directory)) is None
    monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))
    assert as_user(nobody(), lambda: slurm_commands.stopped_private_cluster()) is None


@pytest.mark.slurm_accounting
def test_the_accounting_database_has_no_port_and_slurmdbd_listens_on_the_loopback(place: Path) -> None:
    cluster = PrivateCluster(place / "accounting")
    try:
        cluster.start(layout.pretended(accounting=True))
        pids = cluster.pids()
        assert listening([pids["mariadbd"]]) == []
        assert [address.rpartition(":")[0] for address in listening([pids["slurmdbd"]])] == [
            configuration.ADDRESS if hardware.address_of_name() == configuration.ADDRESS else "0.0.0.0"
        ]
        assert "private" in cluster.command("sacctmgr", "-n", "-P", "list", "cluster", "format=cluster")
    finally:
        cluster.remove()
