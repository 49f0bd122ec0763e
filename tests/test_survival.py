"""Each of the five stages is interrupted six times at random moments on a real Slurm, and gives the same bytes as undisturbed."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from survival_stages import SmallStage, small_stages, write_config, write_inputs

from slurm.client import processes
from slurm.client.slurm_values import parse_records
from slurm.cluster import layout
from slurm.cluster.daemons import PrivateCluster
from slurm.record.run_directory import RunDirectory

pytestmark = [pytest.mark.end_to_end, pytest.mark.slurm, pytest.mark.timeout(600)]

SEED = int(os.environ.get("SURVIVAL_SEED", "1"))
PATIENCE_SECONDS = 120.0
WAYS = ("preempted", "preempted", "requeued by hand", "SIGTERM", "SIGUSR1", "SIGUSR2")
MOMENTS = ("start", "start", "work", "work", "work", "work")
LONGEST_WAIT_SECONDS = {"start": 1.5, "work": 1.0}
CPUS = 8


class Interruption(NamedTuple):
    way: str
    moment: str
    wait_seconds: float


class Hit(NamedTuple):
    """An interruption that was done, and where the stage stood."""

    stage: str
    interruption: Interruption
    phase: str


class Project:
    """This checkout, with data and runs in `root`."""

    def __init__(self, root: Path, cluster: PrivateCluster) -> None:
        self.root = root
        self.cluster = cluster

    def submit(self, outputs: Path, configs: list[Path], executor: str) -> list[RunDirectory]:
        site = outputs.with_suffix(".site.yaml")
        site.write_text(f"data: {outputs}\nssd: {outputs}\nruns: {self.root / 'runs'}\n")
        variables = os.environ | {"CROSSCODER_SITE": str(site), "SLURM_CONF": str(self.cluster.configuration), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "slurm", "submit", *map(str, configs), "--executor", executor]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return [RunDirectory(Path(path)) for path in re.findall(r"^run (.*)$", done.stdout, re.M)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, start_cluster: Callable[..., PrivateCluster]) -> Project:
    nodes = tuple(layout.Node(f"n{number}", CPUS, 4_000) for number in range(5))
    chosen = layout.Layout(nodes, layout.PARTITIONS, layout.TEST_POLICY, is_real_hardware=False)
    root = tmp_path_factory.mktemp("survival")
    write_inputs(root)
    return Project(root, start_cluster(chosen))


def test_each_stage_survives_six_interruptions_at_random_moments_and_gives_the_same_bytes(project: Project) -> None:
    root = project.root
    undisturbed = root / "undisturbed"
    stages = small_stages(root, undisturbed, undisturbed, crosscoder=str(root / "runs/train/undisturbed"))
    configs = [write_config(root, stage, "undisturbed", {}) for stage in stages]
    expected = project.submit(undisturbed, configs, "debug")

    stages = small_stages(root, undisturbed, root / "disturbed", crosscoder=str(expected[3].path))
    runs = list[RunDirectory]()
    print(f"SURVIVAL_SEED={SEED}")
    with ThreadPoolExecutor(len(stages)) as pool:
        interrupted = []
        for number, stage in enumerate(stages):
            resources = {"cpus": CPUS, "partition": "low", "node": f"n{number}"}
            runs += project.submit(root / "disturbed", [write_config(root, stage, "disturbed", resources)], "slurm")
            # At once: on a loaded machine it may have finished before the last of the others is submitted.
            interrupted.append(pool.submit(interrupt, project.cluster, stage, runs[-1]))
        hits = [of_stage.result() for of_stage in interrupted]

    for hit in (hit for of_stage in hits for hit in of_stage):
        way, moment, seconds = hit.interruption
        print(f"{hit.stage:9s} {way:16s} {seconds:.2f} s after {moment}: in {hit.phase}")
    assert [len(of_stage) for of_stage in hits] == [len(WAYS)] * len(stages)
    for stage, run, undisturbed_run in zip(stages, runs, expected, strict=True):
        assert stage.outcome(run) == stage.outcome(undisturbed_run), stage.name


def interrupt(cluster: PrivateCluster, stage: SmallStage, run: RunDirectory) -> list[Hit]:
    """Interrupts the run's job six times, waits until it has finished, and tells what landed: Slurm started it once more for each."""
    job = Job(cluster, run)
    hits = []
    for number, interruption in enumerate(plan(stage.name)):
        job.wait_until(lambda restarts=number: job.restarts() == restarts and job.state() == "RUNNING", f"attempt {number}")
        phase = job.wait_for(interruption, number)
        job.strike(interruption.way)
        job.wait_until(lambda restarts=number: job.restarts() == restarts + 1, f"the restart after {interruption}")
        hits.append(Hit(stage.name, interruption, phase))
    job.wait_until(lambda: run.state() == "finished", "its end")
    return hits


def plan(stage: str) -> list[Interruption]:
    """Six ways at six moments, in an order that the seed draws."""
    generator = random.Random(f"{SEED} {stage}")
    ways, moments = generator.sample(WAYS, len(WAYS)), generator.sample(MOMENTS, len(MOMENTS))
    return [
        Interruption(way, moment, generator.uniform(0.0, LONGEST_WAIT_SECONDS[moment])) for way, moment in zip(ways, moments, strict=True)
    ]


class Job:
    """The one job of a run."""

    def __init__(self, cluster: PrivateCluster, run: RunDirectory) -> None:
        self.cluster = cluster
        self.run = run
        self.id = str(run.job()["jobs"][0]["id"])
        self.node = run.job()["resources"]["node"]

    def _detail(self) -> dict[str, str]:
        return parse_records(self.cluster.command("scontrol", "-o", "show", "job", self.id))[0]

    def state(self) -> str:
        return self._detail()["JobState"]

    def restarts(self) -> int:
        return int(self._detail()["Restarts"])

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            told = f"{self.run.reference}, {what}: {self.state()}, {self.restarts()} restarts, {self.run.attempts()[-2:]}"
            assert self.state() != "COMPLETED", told
            assert time.monotonic() < deadline, told
            time.sleep(0.1)

    def wait_for(self, interruption: Interruption, restarts: int) -> str:
        """Waits for the moment and says in which phase the stage is then.

        A signal needs a process that can keep it: at the start, the one that submitit starts in.
        """
        if interruption.moment == "work":
            self.wait_until(lambda: self._phase(restarts) is not None, "its first heartbeat")
        elif interruption.way.startswith("SIG"):
            self.wait_until(self._has_started, "its process")
        time.sleep(interruption.wait_seconds)
        return self._phase(restarts) or "start"

    def _has_started(self) -> bool:
        pids = processes.of_jobs(self.cluster.configuration, node=self.node)
        return any(re.match(r"\S+ -u -m submitit", processes.command_line(pid)) for pid in pids)

    def _phase(self, restarts: int) -> str | None:
        """The phase of the heartbeat of this attempt; None before it has one."""
        starts = [line for line in self.run.attempts() if line["event"] == "start" and line["restart"] == restarts]
        progress: dict[str, Any] | None = self.run.progress()
        return str(progress["phase"]) if starts and progress and progress["started"] >= starts[-1]["time"] else None

    def strike(self, way: str) -> None:
        if way.startswith("SIG"):
            self.cluster.command("scancel", f"--signal={way.removeprefix('SIG')}", self.id)
        elif way == "preempted":
            log = str(self.cluster.directory / "urgent.log")
            self.cluster.command("sbatch", "-p", "main", "-w", self.node, "-c", str(CPUS), "-o", log, "--wrap", "true")
        else:
            self.cluster.command("scontrol", "requeue", self.id)
