"""Records what the Slurm of this machine prints, in every state that a job or a node can be in, for the tests to read.

    .venv/bin/python tests/record_slurm_outputs.py [DIRECTORY]

Needs Slurm's daemons (Debian, Ubuntu: slurmctld slurmd slurm-client slurm-wlm-basic-plugins; for sacct slurmdbd,
slurm-wlm-mysql-plugin and mariadb-server besides), no root, and about two minutes. It starts a private cluster in
/tmp/cluster, brings jobs and nodes into each state, asks every question that this project asks, and leaves nothing behind but

    tests/slurm_outputs/24.11.5/
      commands.json    [{"command": ["squeue", "-h", ...], "exit_code": 0, "stderr": "", "stdout": "squeue.txt"}, ...]
      squeue.txt       what that command printed, to the byte; of JSON only the spaces between values are left out
      ...

`test_recorded_outputs.py` reads every directory there, so a newer Slurm is tested as soon as its own lies there. Without the
daemons, `--here` asks the cluster in reach the questions that need no situation: its nodes, configuration, partitions and
your own jobs. That goes to `slurm_outputs/` in the current directory, to be sent with a report of a wrong reading; no test
reads it. Look through the files before: they name your cluster's nodes and your jobs.
"""

import argparse
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from slurm.client import job_output, node_output, slurm_commands, slurm_queries, slurm_values
from slurm.cluster import faults, layout, packages
from slurm.cluster.daemons import PrivateCluster
from slurm.cluster.layout import Gpu, Node

OUTPUTS = Path(__file__).parent / "slurm_outputs"
CLUSTER = Path("/tmp/cluster")
PATIENCE_S = 200.0

H200, A100 = Gpu("h200"), Gpu("a100")
NODES = (
    Node("n1", 8, 16_000, (H200, H200)),
    Node("n2", 8, 16_000, (H200, H200, A100)),
    Node("n3", 8, 16_000, (A100,)),
    Node("n4", 8, 16_000),
    Node("c1", 4, 8_000),
)
"""n1 and n2 come to be in use, the second with two types of GPU; n3 is drained, n4 goes down, c1 idles."""

# What goes back to the queue is to be seen there, and no node is to be lost but the one that is crashed.
POLICY = replace(layout.TEST_POLICY, requeue_delay_s=600, node_timeout_s=300)

IN_TEXT = ("running", "array", "held", "timeout", "cancelled", "preempted", "preempted-for-good", "requeued")
"""Jobs whose state is asked for in text: a run asks so what Slurm does to it, and change reads so what it changed before 23.02."""

COMMENT = '{"run":"train/a|b","directory":"/runs/a b"}'


class Recorder:
    """Asks, and writes down the command with its answer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.commands: list[dict[str, Any]] = []
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)

    def ask(self, file: str, *command: str) -> None:
        variables = slurm_commands.environment()
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=60)
        text = done.stdout
        if file.endswith(".json") and text.startswith("{"):
            text = compact(json.loads(text))
        (self.directory / file).write_text(text)
        self.commands.append({"command": list(command), "exit_code": done.returncode, "stderr": done.stderr, "stdout": file})
        rows = ",\n".join(json.dumps(entry) for entry in self.commands)
        (self.directory / "commands.json").write_text(f"[\n{rows}\n]\n")


def compact(answer: dict[str, Any]) -> str:
    """The answer with a line for each of its jobs or nodes."""
    parts = []
    for key, value in answer.items():
        rows = value if isinstance(value, list) and value and isinstance(value[0], dict) else None
        text = "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]" if rows else json.dumps(value)
        parts.append(f"{json.dumps(key)}:{text}")
    return "{" + ",\n".join(parts) + "}\n"


# -- situations -------------------------------------------------------------------------------------------------------


class Stage:
    """The private cluster, and its jobs by name: each is named for the situation that it is brought into."""

    def __init__(self, cluster: PrivateCluster) -> None:
        self.cluster = cluster
        self.ids: dict[str, str] = {}

    def submit(self, name: str, script: str, *options: str) -> str:
        command = ["sbatch", "--parsable", "-J", name, "-o", "/dev/null", "--chdir", "/tmp", "--mem", "500M", *options, "--wrap", script]
        self.ids[name] = self.cluster.command(*command).strip()
        return self.ids[name]

    def states(self, name: str) -> list[str]:
        return self.cluster.command("squeue", "-h", "-r", "-t", "all", "-j", self.ids[name], "-o", "%T").split()

    def wait_for(self, name: str, state: str) -> None:
        wait_until(lambda: state in self.states(name), f"{name} to be {state}, not {', '.join(self.states(name))}")


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_S:g} s for {what}")
        time.sleep(0.1)


def jobs_that_end(stage: Stage) -> None:
    stage.submit("timeout", "sleep 600", "-w", "n3", "--time", "1")
    stage.submit("completed", "true", "-w", "n3")
    stage.submit("failed", "exit 3", "-w", "n3")
    stage.submit("killed", "kill -KILL $$", "-w", "n3")
    for name in ("cancelled", "suspended"):
        stage.submit(name, "sleep 600", "-w", "n1")
        stage.wait_for(name, "RUNNING")
    stage.cluster.command("scancel", stage.ids["cancelled"])
    stage.cluster.command("scontrol", "suspend", stage.ids["suspended"])
    for name in ("completed", "failed", "killed", "cancelled"):
        stage.wait_for(name, name.upper() if name != "killed" else "FAILED")


def jobs_that_run(stage: Stage) -> None:
    stage.submit("running", "sleep 600", "-w", "n1", "--gres", "gpu:h200:1", "--time", "60", "--comment", COMMENT, "--mem", "4G")
    stage.wait_for("running", "RUNNING")
    stage.submit("two-nodes", "sleep 600", "-N", "2", "-w", "n1,n2", "--gres", "gpu:h200:1", "--nice=7")
    stage.wait_for("two-nodes", "RUNNING")
    stage.submit("a100", "sleep 600", "-w", "n2", "--gres", "gpu:a100:1")
    stage.wait_for("a100", "RUNNING")
    # Task 0 fails, 1 and 2 run, the rest waits for them.
    stage.submit("array", "[ $SLURM_ARRAY_TASK_ID = 0 ] && exit 5; sleep 600", "--array", "0-4%2", "-w", "n2", "--time", "2-0")
    wait_until(lambda: sorted(stage.states("array")) == ["FAILED", *["PENDING"] * 2, *["RUNNING"] * 2], "the array")


def jobs_that_wait(stage: Stage) -> None:
    running = stage.ids["running"]
    stage.submit("held", "true", "--hold", "--gres", "gpu:2", "--requeue")
    stage.submit("dependent", "true", "-d", f"afterok:{running}")
    stage.submit("never", "true", "-d", f"afterok:{stage.ids['failed']}")
    stage.submit("later", "true", "--begin", "now+10days")
    stage.submit("resources", "true", "-w", "n1", "--gres", "gpu:h200:2")
    wait_until(lambda: "DependencyNeverSatisfied" in stage.cluster.command("squeue", "-h", "-o", "%r"), "the job whose parent failed")


def jobs_pushed_aside(stage: Stage) -> None:
    """A job of the upper partition takes c1, where two preemptible jobs are; one of them may be requeued."""
    for name, option in (("preempted", "--requeue"), ("preempted-for-good", "--no-requeue"), ("requeued", "--requeue")):
        stage.submit(name, "sleep 600", "-p", "low", "-w", "c1", option)
        stage.wait_for(name, "RUNNING")
    stage.cluster.command("scontrol", "requeue", stage.ids["requeued"])
    stage.submit("urgent", "true", "-w", "c1", "-c", "4")
    stage.wait_for("preempted", "PENDING")
    stage.wait_for("preempted-for-good", "PREEMPTED")
    stage.wait_for("urgent", "COMPLETED")


def nodes_that_fail(stage: Stage) -> None:
    stage.submit("node-fail", "sleep 600", "-w", "n4", "--no-requeue")
    stage.wait_for("node-fail", "RUNNING")
    time.sleep(2)  # of a job that is still being launched Slurm hears otherwise, and takes the node for alive
    faults.crash(stage.cluster, "n4")
    stage.wait_for("node-fail", "NODE_FAIL")
    stage.cluster.command("scontrol", "update", "nodename=n3", "state=drain", "reason=bad fan, row 3")


# -- questions --------------------------------------------------------------------------------------------------------


def ask_what_needs_no_situation(recorder: Recorder) -> None:
    separator, user = slurm_values.SEPARATOR, str(os.getuid())
    recorder.ask("squeue.txt", "squeue", "-h", "-r", "-a", "-t", "all", "-u", user, "-o", job_output.JOB_FORMAT)
    recorder.ask("sinfo.json", "sinfo", "-a", "-N", "--json")
    recorder.ask("sinfo.txt", "sinfo", "-a", "-h", "-N", "-O", node_output.NODE_FORMAT)
    recorder.ask("config.txt", "scontrol", "show", "config")
    recorder.ask("partitions.txt", "scontrol", "-a", "-o", "show", "partition")
    ids = [job.raw_id for job in slurm_queries.my_jobs()]
    fields = ",".join(job_output.SACCT_FIELDS)
    recorder.ask("sacct.txt", "sacct", "-X", "-n", "-P", f"--delimiter={separator}", "-D", "-j", ",".join(ids), "-o", fields)


def ask_about_jobs(recorder: Recorder, stage: Stage) -> None:
    recorder.ask("squeue.json", "squeue", "-a", "--json")
    for name in IN_TEXT:
        recorder.ask(f"scontrol-{name}.txt", "scontrol", "-o", "show", "job", stage.ids[name])
    recorder.ask("scontrol-two-nodes.txt", "scontrol", "-o", "-d", "show", "job", stage.ids["two-nodes"])
    recorder.ask("scontrol-running.json", "scontrol", "show", "job", stage.ids["running"], "--json")


def ask_for_refusals(recorder: Recorder, stage: Stage) -> None:
    """What is said where something can't be done; the code tells some of these apart by their words."""
    recorder.ask("unknown-job.json", "scontrol", "show", "job", "7", "--json")
    recorder.ask("unknown-job.txt", "scontrol", "-o", "show", "job", "7")
    recorder.ask("unknown-job-squeue.txt", "squeue", "-h", "-j", "7", "-o", "%T")
    recorder.ask("partition-limit.txt", "sbatch", "-p", "short", "--time", "61", "-o", "/dev/null", "--wrap", "true")
    recorder.ask("running-partition.txt", "scontrol", "update", f"jobid={stage.ids['running']}", "partition=low")
    recorder.ask("resume-a-running-node.txt", "scontrol", "update", "nodename=c1", "state=resume")
    before = os.environ.pop("SLURM_CONF")
    try:
        recorder.ask("no-cluster.txt", "squeue", "-h", "-o", "%T")
    finally:
        os.environ["SLURM_CONF"] = before


def record_private_cluster(outputs: Path) -> Path:
    accounting = not packages.missing(accounting=True)
    chosen = replace(layout.pretended(POLICY, accounting=accounting), nodes=NODES)
    cluster = PrivateCluster(CLUSTER)
    cluster.start(chosen, fresh=True)
    os.environ["SLURM_CONF"] = str(cluster.configuration)
    try:
        stage = Stage(cluster)
        for situation in (jobs_that_end, jobs_that_run, jobs_pushed_aside, jobs_that_wait, nodes_that_fail):
            situation(stage)
        stage.wait_for("timeout", "TIMEOUT")
        time.sleep(5 if accounting else 0)  # sacct lags behind
        recorder = Recorder(outputs / slurm_queries.configuration()["SLURM_VERSION"])
        ask_what_needs_no_situation(recorder)
        ask_about_jobs(recorder, stage)
        ask_for_refusals(recorder, stage)
    finally:
        cluster.remove()
    return recorder.directory


def record_here(outputs: Path) -> Path:
    recorder = Recorder(outputs / slurm_queries.configuration()["SLURM_VERSION"])
    ask_what_needs_no_situation(recorder)
    return recorder.directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--here", action="store_true", help="ask the cluster in reach instead of a private one")
    given = parser.parse_args()
    if given.here:
        print(record_here(given.directory or Path("slurm_outputs")))
    else:
        print(record_private_cluster(given.directory or OUTPUTS))
