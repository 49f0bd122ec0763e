"""A toy project that submits to a private cluster, and what became of its jobs."""

import re
from pathlib import Path

from toy_project import ToyProject

from slurm.cluster.daemons import PrivateCluster
from slurm.record.run_directory import RunDirectory


class Queue:
    """A toy project that submits to the private cluster."""

    def __init__(self, project: ToyProject, cluster: PrivateCluster) -> None:
        self.project = project
        self.cluster = cluster

    def submit(self, *arguments: str, expect: int = 0, **variables: str) -> list[RunDirectory]:
        done = self.project.crosscoder("submit", *arguments, SLURM_CONF=str(self.cluster.configuration), **variables)
        assert done.returncode == expect, done.stdout + done.stderr
        self.said = done.stdout + done.stderr
        return [RunDirectory(Path(path)) for path in re.findall(r"^run (.*)$", done.stdout, re.M)]

    def job(self, run: RunDirectory) -> str:
        return str(run.job()["jobs"][-1]["id"])

    def slurm_state(self, job: str) -> str:
        return self.cluster.command("squeue", "-h", "-a", "-r", "-t", "all", "-j", job, "-o", "%T").split()[0]

    def detail(self, job: str) -> str:
        return self.cluster.command("scontrol", "show", "job", "-o", job)
