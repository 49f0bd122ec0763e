"""What a real Slurm does that would catch a run unawares, each done to one: the run goes on, or says why it does not."""

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_queue import Queue
from toy_project import ToyProject
from waiting import at_step, finished, wait_until

from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.client import processes
from slurm.cluster import layout
from slurm.cluster.daemons import PrivateCluster
from slurm.execution import executor
from slurm.record.run_directory import RunDirectory
from slurm.watching import job_listing
from slurm.watching.jobs import Row

pytestmark = pytest.mark.slurm


@pytest.fixture
def queue(tmp_path: Path, cluster: PrivateCluster) -> Iterator[Queue]:
    yield Queue(ToyProject(tmp_path), cluster)
    cluster.command("scancel", "--me")


def row_of(queue: Queue, run: RunDirectory) -> Row:
    return next(row for row in job_listing.gather(Site(runs=queue.project.runs)).rows() if row.run == run.reference)


# -- what reaches a job -----------------------------------------------------------------------------------------------


def test_a_submission_from_inside_a_job_gets_nothing_of_that_job(queue: Queue) -> None:
    """Slurm describes a job to its processes in the variables that sbatch takes for options."""
    root = queue.project.root
    queue.project.config()
    outer = f"cd '{root}' && PYTHONPATH='{root}' '{sys.executable}' -P -m slurm submit toy.yaml > said.txt 2>&1"
    options = ("-p", "low", "-t", "7", "--mem-per-cpu=150", "-n", "2", "--array=0-0", "-o", "/dev/null")
    queue.cluster.command("sbatch", *options, "--wrap", outer)
    wait_until(lambda: list(queue.project.runs.glob("toy/toy/*/result.json")), "the inner job")
    run = RunDirectory(queue.project.only_run())
    wait_until(lambda: finished(run), "the inner job's end")
    detail = queue.detail(queue.job(run))
    assert all(words in detail for words in ("Partition=main", "TimeLimit=01:00:00", "NumTasks=1", "MinMemoryCPU=1000M")), detail


def test_a_signal_to_stop_that_reaches_the_jobs_shell_and_srun_too_does_not_end_the_job(queue: Queue) -> None:
    """A node's shutdown sends SIGTERM to every process of the job."""
    ways = {"term": "--full --signal=TERM", "usr1": "--full --signal=USR1", "usr2": "--full --signal=USR2", "everyone": ""}
    ways |= {"shell": "--batch --signal=TERM"}
    hold, runs = queue.project.hold(), {}
    for name, way in ways.items():
        run = runs[name] = queue.submit(queue.project.config(name, steps=5, hold=hold))[0]
        wait_until(lambda run=run: at_step(run, 2), "the first steps")
        if way:
            queue.cluster.command("scancel", *way.split(), queue.job(run))
        else:
            its_job = f"SLURM_JOB_ID={queue.job(run)}".encode()
            everyone = [pid for pid in processes.of_jobs(queue.cluster.configuration) if its_job in processes.variables_of(pid)]
            assert len(everyone) > 2
            processes.signal_all(everyone, signal.SIGTERM)
    wait_until(lambda: sum(line["event"] == "start" for line in runs["usr2"].attempts()) == 2, "a second attempt")
    hold.unlink()
    wait_until(lambda: all(finished(run) for run in runs.values()), "the second attempts")
    # What srun kills at once when it gets a SIGTERM itself can't say how it ended.
    ends = {name: [line["status"] for line in run.attempts() if line["event"] == "end"] for name, run in runs.items()}
    saved = ["stopped", "finished"]
    assert (ends["usr1"], ends["usr2"], ends["shell"]) == (saved, saved, ["finished"])
    assert ends["term"][-1:] == ends["everyone"][-1:] == ["finished"]
    assert sum(line["event"] == "start" for line in runs["everyone"].attempts()) == 2


def test_a_setup_line_that_fails_ends_the_job_before_its_program(queue: Queue) -> None:
    """Of submitit's setup lines nobody looks whether they fail."""
    site = queue.project.root / "site.yaml"
    site.write_text(f"setup: ['echo loading', 'no-such-command']\nruns: {queue.project.runs}\n")
    (run,) = queue.submit(queue.project.config(), CROSSCODER_SITE=str(site))
    wait_until(lambda: row_of(queue, run).state == "failed", "the job's end")
    assert run.attempts() == []
    said = queue.project.crosscoder("logs", run.reference).stdout
    assert "loading" in said
    assert "no-such-command: command not found" in said


def test_processes_of_a_task_get_the_cores_and_the_gpu_that_slurm_gave_them(queue: Queue) -> None:
    """srun before 23.11 does not read the cores of a process from its job; a local rank is not the number of a GPU.

    Without core binding, as here, the step has all cores of its job either way: its script tells what it would be bound to.
    """
    (queue.project.root / "pipeline/stages/toy.py").write_text(
        "import os, re, subprocess\n"
        "from pipeline import records\n"
        "def run(config, run):\n"
        "    step = subprocess.check_output(['scontrol', 'show', 'step', os.environ['SLURM_JOB_ID'] + '.0'], text=True)\n"
        "    got = [os.environ.get(name) for name in ('CUDA_VISIBLE_DEVICES', 'LOCAL_RANK', 'WORLD_SIZE')]\n"
        "    records.write_json(run.directory / 'got.json', [re.search(r'CPUs=(\\d+)', step)[1], *got])\n"
        "    return {}\n"
    )
    queue.cluster.command("sbatch", "-w", "n1", "--gres=gpu:1", "-o", "/dev/null", "--wrap", "sleep 60")
    resources = ("resources.tasks_per_node=2", "resources.cpus=3", "resources.gpus=1")
    (run,) = queue.submit(queue.project.config(), "--node", "n1", *resources)
    wait_until(lambda: finished(run) and (run.path / "ranks/1/got.json").exists(), "the job")
    got = [json.loads((place / "got.json").read_text()) for place in (run.path, run.path / "ranks/1")]
    assert got == [["6", "1", "0", "2"], ["6", "1", "1", "2"]]
    assert " --cpus-per-task=3 " in next(line for line in run.job()["jobs"][0]["sbatch"].splitlines() if line.startswith("srun "))


def test_a_dependency_of_one_submission_is_not_the_next_ones(queue: Queue) -> None:
    """A parameter that submitit was given once can't be taken back."""
    long = queue.project.config("long", steps=100, step_seconds=0.2)
    (first,) = queue.submit(long)
    child, lone = queue.submit(queue.project.config("child"), queue.project.config("lone"), "--after", first.reference)
    lone.write_job(lone.job() | {"after": []})
    entries = [executor.launch(run, [0])[0] for run in (child, lone)]
    shown = [queue.cluster.command("squeue", "-h", "-t", "all", "-j", entry["id"], "-o", "%E").strip() for entry in entries]
    assert shown == [f"afterok:{queue.job(first)}(unfulfilled)", "(null)"]


def test_a_submission_to_a_cluster_that_is_gone_is_refused_at_once(queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With SLURM_CONF naming a missing file sbatch tries again for a minute."""
    (run,) = queue.submit(queue.project.config())
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "gone/slurm.conf"))
    monkeypatch.setattr(executor, "time_limit", pytest.fail)
    with pytest.raises(UserError, match="which does not exist; unset it, or start that cluster"):
        executor.launch(run, [0])


# -- what becomes of a job --------------------------------------------------------------------------------------------


def test_a_suspended_job_is_neither_done_nor_queued_again(queue: Queue) -> None:
    hold = queue.project.hold()
    (run,) = queue.submit(queue.project.config(hold=hold))
    wait_until(lambda: at_step(run, 2), "the first steps")
    queue.cluster.command("scontrol", "suspend", queue.job(run))
    wait_until(lambda: queue.slurm_state(queue.job(run)) == "SUSPENDED", "Slurm's word of it")
    row = row_of(queue, run)
    assert (row.state, row.reason) == ("running", "is suspended")
    queue.submit("--resume", run.reference, expect=1)
    assert f"is queued or being worked on as job {queue.job(run)}" in queue.said
    queue.cluster.command("scontrol", "resume", queue.job(run))
    hold.unlink()
    wait_until(lambda: finished(run), "the job")
    assert len(run.job()["jobs"]) == 1


def test_a_job_that_its_node_could_not_launch_is_held_said_so_and_released(queue: Queue) -> None:
    spool = queue.cluster.directory / "spool/n3"
    aside = spool.rename(spool.with_name("aside"))
    spool.touch()  # no job's script can be put into it
    try:
        (run,) = queue.submit(queue.project.config(), "--node", "n3")
        wait_until(lambda: row_of(queue, run).state == "held", "the hold")
    finally:
        spool.unlink()
        aside.rename(spool)
    assert row_of(queue, run).reason == f"could not be launched, and is held; `crosscoder release {queue.job(run)}` tries again"
    released = queue.project.crosscoder("release", run.reference, SLURM_CONF=str(queue.cluster.configuration))
    assert released.returncode == 0, released.stderr
    wait_until(lambda: finished(run), "the job")


def test_a_task_of_several_processes_saves_and_goes_on_as_one(queue: Queue) -> None:
    (queue.project.root / "pipeline/stages/toy.py").write_text(
        "import time\n"
        "from pipeline import records\n"
        "def run(config, run):\n"
        "    state = run.directory / 'state.json'\n"
        "    first = records.read_json(state) if state.exists() else 0\n"
        "    for step in range(first, config.steps):\n"
        "        while step >= 2 and config.hold.exists():\n"
        "            run.check_stop()\n"
        "            time.sleep(0.05)\n"
        "        records.write_json(state, step + 1)\n"
        "        run.report('count', step + 1, config.steps, unit='steps', done=True)\n"
        "    return {'began_at': first}\n"
    )
    hold = queue.project.hold()
    (run,) = queue.submit(queue.project.config(steps=5, hold=hold), "resources.tasks_per_node=2")
    wait_until(lambda: at_step(run, 2), "the first steps")
    queue.cluster.command("scancel", "--signal=USR1", queue.job(run))
    wait_until(lambda: any(line["event"] == "end" for line in run.attempts()), "the end of the first attempt")
    hold.unlink()
    wait_until(lambda: finished(run), "the second attempt")
    assert [line["next"] for line in run.attempts() if line["event"] == "end"] == [f"requeued as job {queue.job(run)}", "stays as it is"]
    assert (run.result() or {})["result"]["began_at"] >= 2


@pytest.fixture(scope="module")
def stern(start_cluster: Callable[..., PrivateCluster]) -> PrivateCluster:
    """A cluster that requeues nothing by itself, sends no signal of the job's own and lets the other processes of a dead one run."""
    policy = dataclasses.replace(layout.TEST_POLICY, requeues=False, warns_before_preemption=False)
    return start_cluster(layout.pretended(policy, extra_lines=("KillOnBadExit=0",)))


def test_on_a_cluster_that_forbids_requeues_and_warns_of_nothing_a_run_goes_on(
    stern: PrivateCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(stern.configuration))
    queue = Queue(ToyProject(tmp_path), stern)
    place = ("--partition", "low", "--node", "n2", "resources.cpus=8")
    hold = queue.project.hold()
    (run,) = queue.submit(queue.project.config(steps=5, hold=hold), *place)
    wait_until(lambda: at_step(run, 2), "the first steps")
    (high,) = queue.submit(queue.project.config("high"), "resources.cpus=8", "--node", "n2")
    wait_until(lambda: finished(high), "the job that preempts")
    hold.unlink()
    wait_until(lambda: finished(run), "the job that was preempted")
    ends = [(line["restart"], line["status"]) for line in run.attempts() if line["event"] == "end"]
    assert ends == [(0, "stopped"), (1, "finished")]


def test_a_process_that_dies_ends_the_others_where_the_cluster_would_let_them_wait(
    stern: PrivateCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(stern.configuration))
    queue = Queue(ToyProject(tmp_path), stern)
    (queue.project.root / "pipeline/stages/toy.py").write_text(
        "import os, signal, time\n"
        "def run(config, run):\n"
        "    if os.environ.get('SLURM_RESTART_COUNT', '0') != '0':\n"
        "        return {}\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    while True:\n"
        "        run.check_stop()\n"
        "        time.sleep(0.05)\n"
    )
    (run,) = queue.submit(queue.project.config(), "resources.tasks_per_node=2")
    wait_until(lambda: finished(run), "the second attempt")
    assert [line["status"] for line in run.attempts() if line["event"] == "end"] == ["stopped", "finished"]


def test_a_number_that_slurm_gave_anew_is_the_new_runs_alone(queue: Queue) -> None:
    """Slurm begins to count at its first number again when it has lost its state."""
    old, new = (queue.submit(queue.project.config(name), "--node", "n3", "resources.cpus=8")[0] for name in ("old", "new"))
    wait_until(lambda: finished(old) and finished(new), "both jobs")
    (new,) = queue.submit(queue.project.config("new", steps=100, step_seconds=0.2))
    wait_until(lambda: at_step(new, 1), "its first step")
    record = old.job()
    record["jobs"][0]["id"] = queue.job(new)
    old.write_job(record)
    (old.path / "result.json").unlink()
    assert (row_of(queue, old).state, row_of(queue, new).state) == ("lost", "running")
    refused = queue.project.crosscoder("cancel", "--yes", old.reference, SLURM_CONF=str(queue.cluster.configuration))
    assert "has no job that is waiting or running" in refused.stderr
    queue.submit("--resume", old.reference)
    wait_until(lambda: finished(old), "the old run, taken up")
    assert queue.slurm_state(queue.job(new)) == "RUNNING"
