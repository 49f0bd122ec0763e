"""Every GPU there is, on Slurm's nodes and outside."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from pipeline.config.errors import UserError
from pipeline.config.site_file import Machine as SiteMachine
from pipeline.config.site_file import Site
from slurm.client import slurm_commands
from slurm.client.node_output import GpuCount, Node
from slurm.cluster.daemons import PrivateCluster
from slurm.cluster.hardware import NvidiaGpu
from slurm.commands import watching_commands
from slurm.watching import accelerators, machines
from slurm.watching.accelerators import Row, Total
from slurm.watching.machines import Machine

NODES = [
    Node("n1", ("MIXED",), ("main", "low"), {"h200": GpuCount(8, 3)}),
    Node("n2", ("IDLE", "DRAIN"), ("main",), {"h200": GpuCount(8, 0)}, reason="bad fan"),
    Node("n3", ("IDLE",), ("main",), {"a100": GpuCount(4, 0), "gpu": GpuCount(1, 1)}),
    Node("c1", ("IDLE",), ("cpu",)),
]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs that is all of PATH: the machine has nothing but what a test puts there."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_gpus_are_told_by_type_and_node_and_what_is_drained_is_not_free() -> None:
    rows = accelerators.rows_of_nodes(NODES, {"h200": 141.0})
    assert rows == [
        Row("n1", "h200", 141.0, 8, 3, 5, "mixed", ["main", "low"], ""),
        Row("n2", "h200", 141.0, 8, 0, 0, "idle+drain", ["main"], "bad fan"),
        Row("n3", "a100", None, 4, 0, 4, "idle", ["main"], ""),
        Row("n3", "gpu", None, 1, 1, 0, "idle", ["main"], ""),
    ]
    assert accelerators.totals(rows) == [Total("h200", 16, 3, 5), Total("a100", 4, 0, 4), Total("gpu", 1, 1, 0)]


def test_a_machine_outside_slurm_counts_gpus_with_work_as_used() -> None:
    gpus = [NvidiaGpu(i, "NVIDIA H200", 143_771, used, busy) for i, (used, busy) in enumerate([(4, 0), (90_000, 0), (4, 35), (None, None)])]
    (row,) = accelerators.rows_of_machine(Machine("box", gpus))
    # 143,771 / 1024
    assert row == Row("box", "h200", 140.4, 4, 2, 2, "up", [], "", in_slurm=False)


def test_a_machine_that_does_not_answer_is_a_row_and_no_failure(programs: Path) -> None:
    write_program(programs / "ssh", 'echo "ssh: connect to host box port 22: No route to host" >&2; exit 255')
    rows = accelerators.gather(Site(machines=[SiteMachine(host="box")]))
    assert rows == [Row("box", "", None, 0, 0, 0, "no answer", [], "ssh: connect to host box port 22: No route to host", in_slurm=False)]


def test_machines_are_asked_at_once_in_batch_mode_and_told_in_order(programs: Path) -> None:
    # $4 is ConnectTimeout, $6 the host, $7 what it is to run.
    answer = 'case "$6" in two) /bin/sleep 0.3; echo "0, Tesla T4, 15360, 0, 0";; none) exit 6;; *) echo "0, NVIDIA L4, 23034, 0, 0";; esac'
    write_program(programs / "ssh", f'[ "$2" = BatchMode=yes ] || exit 9\n{answer}')
    asked = machines.ask_all(["two", "one", "none"])
    assert [(machine.host, [gpu.name for gpu in machine.gpus]) for machine in asked] == [
        ("two", ["Tesla T4"]),
        ("one", ["NVIDIA L4"]),
        ("none", []),
    ]
    assert asked[2].error == "has no GPU that nvidia-smi knows"


def test_a_machine_that_hangs_is_given_up(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "ANSWER_S", 0.2)
    write_program(programs / "ssh", "exec /bin/sleep 30")
    assert "gave no answer within 0.2 s" in machines.ask("box").error


def test_a_machine_without_slurm_and_gpus_says_so_and_that_is_no_error(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    watching_commands.accelerators(as_json=False)
    assert re.search(r"has no GPU .* and no Slurm, and the site file names no machines; .* --executor local", capsys.readouterr().out)
    watching_commands.accelerators(as_json=True)
    assert capsys.readouterr().out == "[]\n"


def test_a_workstation_outside_slurm_tells_its_own_gpus(programs: Path) -> None:
    write_program(programs / "nvidia-smi", 'echo "0, NVIDIA GeForce RTX 4090, 24564, 18000, 99"')
    (row,) = accelerators.gather(Site())
    assert (row.node.endswith("(this machine)"), row.type, row.memory_gb, row.total, row.used) == (True, "rtx4090", 24.0, 1, 1)


def test_nvidia_smi_without_a_driver_is_no_gpu_and_its_other_failures_are_told(programs: Path) -> None:
    write_program(programs / "nvidia-smi", 'echo "couldn\'t communicate with the NVIDIA driver"; exit 9')
    with pytest.raises(UserError, match="has no GPU"):
        accelerators.gather(Site())
    write_program(programs / "nvidia-smi", 'echo "Unable to determine the device handle: GPU is lost"; exit 15')
    with pytest.raises(slurm_commands.CommandFailed, match="GPU is lost"):
        accelerators.gather(Site())


@pytest.mark.slurm
def test_a_running_jobs_gpus_are_used_and_the_sites_memory_is_told(cluster: PrivateCluster) -> None:
    before = accelerators.gather(Site(gpu_memory_gb={"a100": 80.0}))
    assert [(row.node, row.type, row.memory_gb, row.free) for row in before] == [
        ("n1", "h200", 141.0, 2),
        ("n2", "h200", 141.0, 2),
        ("n3", "a100", 80.0, 1),
    ]
    assert all(set(row.partitions) == {"main", "low", "short"} for row in before)
    cluster.command("srun", "-Q", "--gres=gpu:h200:1", "-w", "n2", os.path.realpath("/bin/true"))
    job = cluster.command("sbatch", "--parsable", "--gres=gpu:h200:1", "-w", "n2", "-o", "/dev/null", "--wrap", "sleep 60").strip()
    while cluster.command("squeue", "-h", "-j", job, "-o", "%T").strip() != "RUNNING":
        time.sleep(0.05)
    n2 = next(row for row in accelerators.gather(Site()) if row.node == "n2")
    assert (n2.total, n2.used, n2.free, n2.state) == (2, 1, 1, "mixed")
    cluster.command("scancel", job)


@pytest.mark.slurm
def test_text_serves_where_slurm_was_built_without_json(cluster: PrivateCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    while {"idle"} != {row.state for row in accelerators.gather(Site())}:
        time.sleep(0.05)
    with_json = accelerators.gather(Site())
    sinfo = shutil.which("sinfo")
    write_program(
        tmp_path / "sinfo", f'case "$*" in *--json*) echo "sinfo: error: unrecognized option" >&2; exit 1;; esac\nexec {sinfo} "$@"'
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    by_text = accelerators.gather(Site())
    assert [row._replace(partitions=[]) for row in by_text] == [row._replace(partitions=[]) for row in with_json]


def test_the_table_fits_a_narrow_terminal_with_every_node_whole_and_the_sums_below() -> None:
    why = "Kill task failed; the fan of the second GPU is broken, and parts are ordered"
    rows = [
        accelerators.Row("node-with-a-long-name-1", "h200", 141.0, 8, 3, 5, "mixed", ["main", "low"], ""),
        accelerators.Row("node-with-a-long-name-2", "h200", 141.0, 8, 0, 0, "down+drain", ["main", "low"], why),
        accelerators.Row("box", "rtx4090", None, 1, 1, 0, "up", [], "", in_slurm=False),
    ]
    for width in (64, 80, 120, None):
        lines = accelerators.table(rows, width)
        assert all(line == line.rstrip() and len(line) <= (width or 1000) for line in lines)
        text = " ".join(" ".join(lines).split())
        assert "node-with-a-long-name-2" in text
        assert why in text
        assert [line.split() for line in lines[-2:]] == [["all", "h200", "16", "3", "5"], ["all", "rtx4090", "1", "1", "0"]]


def test_of_a_large_cluster_nodes_that_read_alike_share_a_row_and_nothing_is_lost() -> None:
    rows = [Row(f"n{i:03d}", "h200", 141.0, 8, 8 if i < 30 else 2, 0 if i < 30 else 6, "mixed", ["main"], "") for i in range(40)]
    rows[35] = rows[35]._replace(state="down", free=0, note="bad fan")
    rows.append(Row("login", "t4", 16.0, 1, 0, 1, "idle", ["main"], ""))
    folded = [(row.node, row.total, row.used, row.free, row.note) for row in accelerators.fold(rows)]
    assert folded == [
        ("n[000-029]", 240, 240, 0, ""),
        ("n[030-034,036-039]", 72, 18, 54, ""),
        ("n035", 8, 2, 0, "bad fan"),
        ("login", 1, 0, 1, ""),
    ]
    assert accelerators.totals(accelerators.fold(rows)) == accelerators.totals(rows)
    every_other = accelerators.fold(rows[0:30:2])
    assert [(row.node, row.total, row.note) for row in every_other] == [
        ("15 nodes", 120, f"n[{','.join(f'{i:03d}' for i in range(0, 30, 2))}]")
    ]
    assert len(accelerators.table(rows, 120)) == len(accelerators.table(accelerators.fold(rows), 120))
    assert any(line.startswith("n001 ") for line in accelerators.table(rows[:30], 120))


def test_names_are_listed_as_slurm_writes_them() -> None:
    assert accelerators.host_list(["n1", "n2", "n9", "n10", "n11", "login", "gpu-a", "gpu-b7"]) == "n[1-2,9],n[10-11],login,gpu-a,gpu-b7"
