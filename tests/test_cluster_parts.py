"""The private cluster's parts that need no Slurm: what this machine has, what is missing, what is written."""

import re
import subprocess
from pathlib import Path

import pytest

from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.client import processes, slurm_commands, slurm_queries
from slurm.cluster import configuration, control, hardware, layout, packages
from slurm.cluster.configuration import Place
from slurm.cluster.daemons import PORTS, PrivateCluster, free_ports
from slurm.cluster.hardware import NvidiaGpu
from slurm.watching import job_listing

# The form that nvidia-smi (driver 580) gave on a machine with an H100, with other GPUs put in; the driver of the third tells less.
NVIDIA_SMI = """0, NVIDIA H200, 143771, 4, 0
1, NVIDIA H200, 143771, 120000, 97
2, NVIDIA GeForce RTX 4090, 24564, [N/A], [Not Supported]
"""


def test_gpus_are_read_from_nvidia_smi() -> None:
    assert hardware.parse_nvidia_smi(NVIDIA_SMI) == [
        NvidiaGpu(0, "NVIDIA H200", 143_771, 4, 0),
        NvidiaGpu(1, "NVIDIA H200", 143_771, 120_000, 97),
        NvidiaGpu(2, "NVIDIA GeForce RTX 4090", 24_564, None, None),
    ]
    assert hardware.parse_nvidia_smi("No devices were found\n") == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 3060 Ti", "rtx3060ti"),
        ("NVIDIA RTX A6000", "rtxa6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA L40S", "l40s"),
        ("Graphics Device", "gpu"),
    ],
)
def test_a_type_is_named_as_clusters_name_it(name: str, expected: str) -> None:
    assert hardware.type_name(name) == expected


def test_a_container_with_some_of_a_machines_gpus_offers_those(tmp_path: Path) -> None:
    for name in ("nvidia3", "nvidia11", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert hardware._device_files(2, tmp_path) == [f"{tmp_path}/nvidia3", f"{tmp_path}/nvidia11"]
    assert hardware._device_files(0, tmp_path) == []


def test_memory_is_the_containers_where_it_has_a_limit(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\n")
    assert hardware._memory_mb(meminfo, limit) == int(16_384 * 0.95)
    limit.write_text("max\n")
    assert hardware._memory_mb(meminfo, limit) == int(16_384 * 0.95)
    limit.write_text(f"{4 << 30}\n")
    assert hardware._memory_mb(meminfo, limit) == int(4096 * 0.95)


def test_what_is_missing_is_named_with_the_command_that_gets_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "find", lambda program: None if program in ("slurmd", "squeue", "slurmdbd") else f"/bin/{program}")
    assert packages.missing() == ["slurmd", "slurm-client"]
    assert packages.missing(accounting=True) == ["slurmd", "slurm-client", "slurmdbd"]
    with pytest.raises(UserError, match=r"needs slurmd, slurm-client.*apt-get install -y --no-install-recommends slurmd slurm-client$"):
        PrivateCluster(tmp_path).start(layout.pretended())
    assert packages.install_command(["slurmdbd"]).endswith("slurmdbd slurm-wlm-mysql-plugin")


def place(directory: Path) -> Place:
    return Place(directory, "host", "me", tuple(range(10_000, 10_005)))


def test_jobs_without_a_memory_request_share_a_node() -> None:
    text = configuration.slurm_conf(layout.pretended(), place(Path("/c")), 4711)
    assert "\nDefMemPerCPU=1000\n" in text  # 8 cores of a 16,000 MiB node: half of it at most
    assert "\nFirstJobId=4711\n" in text


def test_a_real_machine_is_not_promised_beyond_what_it_has() -> None:
    real = layout.Layout((layout.Node("w", 4, 8_000, (layout.Gpu("a100", "/dev/nvidia0"),)),), layout.PARTITIONS)
    text = configuration.slurm_conf(real, Place(Path("/c"), "w", "me", (1, 2, 4)), 1)
    assert "config_overrides" not in text
    assert "NodeName=w NodeHostname=w NodeAddr=127.0.0.1 Port=4 CPUs=4 RealMemory=8000 Gres=gpu:a100:1" in text
    assert configuration.gres_conf(real, {"w": ("/dev/nvidia0",)}) == "AutoDetect=off\nNodeName=w Name=gpu Type=a100 File=/dev/nvidia0\n"


def test_free_ports_are_different_and_outside_the_kernels_own_range() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(port in PORTS for port in ports)
    assert max(PORTS) < 32_768


def test_a_cluster_whose_port_is_taken_as_it_starts_takes_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[str] = []

    def start(cluster: PrivateCluster, _layout: layout.Layout) -> None:
        starts.append(cluster.configuration.read_text())
        if len(starts) < takes:
            raise UserError(f"the private cluster did not come up; slurmd.log: Unable to bind listen port: {fault}")

    monkeypatch.setattr(PrivateCluster, "_start_daemons", start)
    monkeypatch.setattr(packages, "require", lambda **_: None)
    monkeypatch.setattr(packages, "version", lambda: (22, 5))
    here = layout.Layout((layout.Node("w", 4, 8_000, ()),), layout.PARTITIONS)
    fault, takes = "Address already in use", 3
    PrivateCluster(tmp_path / "a").start(here)
    assert len({re.findall("Port=([0-9]+)", text)[0] for text in starts}) == 3
    takes = 9
    with pytest.raises(UserError, match=fault):
        PrivateCluster(tmp_path / "b").start(here)
    assert len(starts) == 6
    fault = "Permission denied"
    with pytest.raises(UserError, match=fault):
        PrivateCluster(tmp_path / "c").start(here)
    assert len(starts) == 7  # another fault is no better with other ports


def test_a_process_just_started_is_known_as_the_clusters_at_once(tmp_path: Path) -> None:
    configuration_file = tmp_path / "slurm.conf"
    for _ in range(30):  # right after exec the kernel shows an empty environment
        pid = processes.start(["sleep", "60"], log=tmp_path / "log", variables={"PATH": "/bin", "SLURM_CONF": str(configuration_file)})
        assert processes.belongs_to(pid, configuration_file)
        assert not processes.belongs_to(pid, tmp_path / "other.conf")
        processes.end([pid], configuration_file, patience_s=5)
        assert not processes.belongs_to(pid, configuration_file)


def test_a_slurmstepd_that_shows_no_environment_is_known_by_the_log_that_it_keeps_open(tmp_path: Path) -> None:
    # As from Slurm 24.11 on: it writes its title over its environment.
    for name in ("log", "other"):
        (tmp_path / name).mkdir()
    steps = []
    for log in ("log/slurmd-n1.log", "log/slurmd-n2.log", "other/slurmd-n1.log"):
        with (tmp_path / log).open("w") as file:
            steps.append(subprocess.Popen(["slurmstepd: [7.batch]", "60"], executable="/bin/sleep", env={}, stderr=file))
    try:
        assert set(processes.of_jobs(tmp_path / "slurm.conf")) == {steps[0].pid, steps[1].pid}
        assert list(processes.of_jobs(tmp_path / "slurm.conf", node="n2")) == [steps[1].pid]
    finally:
        for step in steps:
            step.kill()
            step.wait()


def test_a_slurmstepd_is_ended_before_the_job_whose_end_it_would_tell(tmp_path: Path) -> None:
    variables = {"SLURM_CONF": str(tmp_path / "slurm.conf"), "SLURM_JOB_ID": "7"}
    (tmp_path / "log").mkdir()
    with (tmp_path / "log" / "slurmd-n1.log").open("w") as file:
        job = subprocess.Popen(["sleep", "60"], env=variables)
        step = subprocess.Popen(["slurmstepd: [7.batch]", "60"], executable="/bin/sleep", env={}, stderr=file)
    try:
        assert list(processes.of_jobs(tmp_path / "slurm.conf")) == [step.pid, job.pid]
    finally:
        for process in (job, step):
            process.kill()
            process.wait()


def test_cgroups_are_left_alone_in_the_words_of_each_version() -> None:
    assert configuration.cgroup_conf((22, 5)) == configuration.cgroup_conf((23, 11)) == "CgroupPlugin=cgroup/v1\n"
    assert configuration.cgroup_conf((24, 5)) == configuration.cgroup_conf((26, 5)) == "CgroupPlugin=disabled\n"


# -- commands ---------------------------------------------------------------------------------------------------------


def test_an_error_of_a_command_names_it_with_exit_code_and_stderr() -> None:
    with pytest.raises(
        slurm_commands.CommandFailed, match=r'sh exited 3: "went wrong"; command: sh -c .echo went wrong >&2; exit 3'
    ) as caught:
        slurm_commands.run("sh", "-c", "echo went wrong >&2; exit 3")
    assert (caught.value.exit_code, caught.value.stderr) == (3, "went wrong")


def test_a_command_that_hangs_is_killed_and_said() -> None:
    with pytest.raises(slurm_commands.CommandFailed, match=r"`sleep 30` gave no answer within 0.2 s"):
        slurm_commands.run("sleep", "30", timeout_s=0.2)


def test_a_missing_program_is_said_with_what_to_do() -> None:
    with pytest.raises(slurm_commands.CommandMissing, match="no-such-program is not installed on this machine; install it"):
        slurm_commands.run("no-such-program")


def test_a_program_on_the_path_that_may_not_be_executed_is_missing_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's answer is the same where PATH names a directory that the user may not read."""
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm_commands.CommandMissing, match="squeue is not installed on this machine; install Slurm"):
        slurm_commands.run("squeue")


def test_a_configuration_that_is_gone_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(UserError, match=r"SLURM_CONF is .*slurm.conf, which does not exist; unset it, or start that cluster"):
        slurm_commands.run("squeue")


def test_the_environment_of_a_command_has_only_slurms_configuration_from_the_caller() -> None:
    given = {"PATH": "/bin", "SLURM_CONF": "/c/slurm.conf", "SLURM_JOB_ID": "1", "SBATCH_PARTITION": "low", "SRUN_CPUS": "1", "HOME": "/h"}
    assert slurm_commands.environment(given) == {"PATH": "/bin", "SLURM_CONF": "/c/slurm.conf", "HOME": "/h"}


def test_a_stopped_private_cluster_is_not_taken_for_a_running_one(tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").touch()
    (tmp_path / "run").mkdir()
    processes.write_pids(tmp_path, {"slurmctld": 1})
    assert slurm_commands.environment({"PATH": "/bin"}, directory=tmp_path) == {"PATH": "/bin"}


@pytest.mark.slurm
def test_slurm_on_a_machine_that_belongs_to_no_cluster_has_no_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("this machine belongs to a cluster")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.chdir(tmp_path)
    assert slurm_queries.my_jobs_if_any() is None
    assert job_listing.gather(Site(runs=tmp_path)).rows() == []
    with pytest.raises(slurm_commands.CommandFailed, match="no Slurm answers here"):
        slurm_queries.my_jobs()


def test_daemons_are_told_to_listen_on_the_loopback_where_the_machines_name_stands_for_it() -> None:
    closed = configuration.slurm_conf(layout.pretended(), place(Path("/c")), 1)
    assert "\nCommunicationParameters=NoCtldInAddrAny,NoInAddrAny\n" in closed
    elsewhere = configuration.slurm_conf(layout.pretended(), place(Path("/c"))._replace(is_closed=False), 1)
    assert "InAddrAny" not in elsewhere
    for text in (closed, elsewhere):
        assert "SlurmctldHost=host(127.0.0.1)" in text
        assert "NodeAddr=127.0.0.1 " in text


@pytest.mark.parametrize("address", ["127.0.1.1", "192.0.2.2", None])
def test_a_start_says_where_the_machines_name_leaves_the_ports_open(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.setattr(hardware, "address_of_name", lambda: address)
    assert any(f"stands for {address or 'none'}; the cluster's key keeps" in sentence for sentence in control._who_can_reach_it())
    monkeypatch.setattr(hardware, "address_of_name", lambda: "127.0.0.1")
    assert not any("/etc/hosts" in sentence for sentence in control._who_can_reach_it())


def test_every_configuration_authenticates_by_the_clusters_own_munge() -> None:
    for accounting in (False, True):
        chosen = layout.pretended(accounting=accounting)
        for text in (configuration.slurm_conf(chosen, place(Path("/c")), 1), configuration.slurmdbd_conf(chosen, place(Path("/c")))):
            assert "AuthType=auth/munge\nAuthInfo=socket=/c/run/munge.sock," in text
            assert "none\nAuth" not in text
    assert packages.PROGRAMS["munged"] == "munge"
