"""Submission to a real, private Slurm: what reaches a job, what survives, what is refused."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from model_copies import copy_of_model, put_on_hub
from slurm_queue import Queue
from toy_project import ToyProject
from waiting import at_step, finished, wait_until

from pipeline.config.errors import UserError
from slurm.client import slurm_commands
from slurm.cluster import layout
from slurm.cluster.daemons import PrivateCluster
from slurm.execution import executor
from slurm.execution.requeue import MAX_ATTEMPTS_WITHOUT_PROGRESS
from slurm.record import backlog
from slurm.record.run_directory import RunDirectory, append_line

pytestmark = pytest.mark.slurm


@pytest.fixture
def queue(tmp_path: Path, cluster: PrivateCluster) -> Iterator[Queue]:
    yield Queue(ToyProject(tmp_path), cluster)
    cluster.command("scancel", "--me")


def test_a_job_runs_the_frozen_code_though_the_checkout_is_edited_while_it_waits(queue: Queue) -> None:
    config = queue.project.config()
    (run,) = queue.submit(config, "--node", "n1", "steps=2", "resources.cpus=1")
    program = queue.project.root / "pipeline/stages/toy.py"
    program.write_text(program.read_text().replace('"hello"', '"edited"'))
    (queue.project.root / config).write_text("broken")
    wait_until(lambda: finished(run), "the job")
    (log,) = run.log_files()
    assert f"hello from {run.code / 'pipeline/stages/toy.py'} at step 0" in log.read_text()
    assert queue.detail(queue.job(run)).count("ReqNodeList=n1") == 1


def test_a_job_reads_the_model_that_was_frozen_or_none(queue: Queue, tmp_path: Path) -> None:
    own = copy_of_model(queue.project.root / "mymodels/llama")
    hub = put_on_hub(tmp_path / "hub", "mymodels/llama", "a" * 40, weights=b"those of the hub").parents[2]
    config = queue.project.config("first", steps=2, step_seconds=0.5, language_model="{model: mymodels/llama}")
    (first,) = queue.submit(config, HF_HUB_CACHE=str(hub))
    later = queue.project.config("second", language_model="{model: mymodels/llama}")
    (second,) = queue.submit(later, "--after", first.reference, HF_HUB_CACHE=str(hub))
    wait_until(lambda: at_step(first, 1), "the first job")
    copy_of_model(own, b"replace")
    wait_until(lambda: finished(first) and second.result() is not None, "both jobs")
    assert f"the model lies in {own}" in first.log_files()[0].read_text()
    assert f"language_model ({own}) is another one: model.safetensors was changed" in (second.result() or {})["error"]


def test_a_job_gets_its_gpu_and_not_another_jobs(queue: Queue) -> None:
    hold = queue.project.hold()
    config = queue.project.config(hold=hold)
    runs = [queue.submit(config, f"name=g{i}", "--node", "n1", "resources.gpus=1", "resources.gpu_type=h200")[0] for i in range(2)]
    wait_until(lambda: all(at_step(run, 1) for run in runs), "both jobs")
    hold.unlink()
    wait_until(lambda: all(finished(run) for run in runs), "their ends")
    assert sorted(str((run.result() or {})["result"]["gpus"]) for run in runs) == ["0", "1"]


def test_the_callers_slurm_variables_do_not_leak_into_a_submission(queue: Queue) -> None:
    leaks = {"SBATCH_PARTITION": "low", "SBATCH_TIMELIMIT": "7", "SLURM_MEM_PER_CPU": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_JOB_ID": "1"}
    (run,) = queue.submit(queue.project.config(), **leaks)
    detail = queue.detail(queue.job(run))
    assert "Partition=main" in detail
    assert "TimeLimit=01:00:00" in detail
    wait_until(lambda: finished(run), "the job")


def test_the_job_carries_its_run_in_its_comment_and_its_script_in_the_record(queue: Queue) -> None:
    (run,) = queue.submit(queue.project.config())
    comment = queue.cluster.command("squeue", "-h", "-t", "all", "-j", queue.job(run), "-o", "%k").strip()
    assert json.loads(comment) == {"run": run.reference, "directory": str(run.path)}
    assert "#SBATCH --requeue" in run.job()["jobs"][0]["sbatch"]


def test_a_chain_runs_in_order_and_binds_what_it_makes(queue: Queue) -> None:
    first = queue.project.config("first", output="data/first")
    second = queue.project.config("second", data="data/first", output="data/second")
    runs = queue.submit(first, second)
    assert runs[1].inputs()["data"] == {"path": str(queue.project.root / "data/first"), "kind": "pending", "made_by": str(runs[0].path)}
    wait_until(lambda: all(finished(run) for run in runs), "the chain")
    made = json.loads((queue.project.root / "data/first/manifest.json").read_text())["data_id"]
    assert runs[1].inputs()["data"]["data_id"] == made
    assert queue.submit(first, second) == []
    assert queue.said.count("skipped") == 2


def test_a_chain_may_be_looked_at_before_any_of_it_is_there(queue: Queue) -> None:
    first, second = queue.project.config("first", output="data/first"), queue.project.config("second", data="data/first")
    queue.submit(first, second, "--dry-run")
    assert re.search(r"^#SBATCH --dependency='?afterok:<toy/first/\S+>'?$", queue.said, re.M)
    summaries, scripts = queue.said.split("the sbatch script of toy/first:")
    assert "toy/first: 1 task, in Slurm (" in summaries
    assert "toy/second is the first run of this name" in summaries
    assert scripts.count("#!/bin/bash") == 2
    queue.submit(first, second, "--dry-run", "--json")
    assert [row["sbatch"].startswith("#!/bin/bash") for row in json.loads(queue.said)] == [True, True]
    assert queue.cluster.command("squeue", "-h", "-n", "toy-first,toy-second") == ""
    assert list(queue.project.runs.glob("toy/*/*")) == []


def test_a_failed_stage_cancels_what_waits_for_it(queue: Queue) -> None:
    first = queue.project.config("first", fail_at=1, output="data/first")
    second = queue.project.config("second", data="data/first")
    runs = queue.submit(first, second)
    wait_until(lambda: queue.slurm_state(queue.job(runs[1])) == "CANCELLED", "the second job's end")
    assert (runs[0].result() or {})["error"] == "the toy fails at step 1, as it was told"
    assert runs[1].result() is None
    listed = queue.project.crosscoder("jobs", "--json", SLURM_CONF=str(queue.cluster.configuration))
    (row,) = [row for row in json.loads(listed.stdout) if row["run"] == runs[1].reference]
    assert row["state"] == "cancelled"
    assert runs[0].reference in row["reason"]


def test_an_array_has_a_directory_and_a_log_a_task_and_resuming_redoes_only_what_is_missing(queue: Queue) -> None:
    (run,) = queue.submit(queue.project.config(), "resources.array_tasks=4", "resources.max_parallel=2")
    assert "ArrayTaskThrottle=2" in queue.detail(queue.job(run))
    wait_until(lambda: finished(run), "the array")
    assert [(run.result(task) or {})["result"]["task"] for task in range(4)] == [0, 1, 2, 3]
    assert all(len(run.log_files(task)) == 1 for task in range(4))
    wait_until(lambda: queue.slurm_state(f"{queue.job(run)}_2") == "COMPLETED", "Slurm's end of task 2")
    (run.task_directory(2) / "result.json").unlink()
    queue.submit("--resume", str(run.path))
    assert run.job()["jobs"][-1]["tasks"] == [2]
    wait_until(lambda: finished(run), "task 2 again")
    assert [len(run.log_files(task)) for task in range(4)] == [1, 1, 2, 1]
    queue.submit("--resume", str(run.path), expect=1)
    assert "has finished; `crosscoder rerun" in queue.said


def test_a_run_that_is_queued_is_not_queued_again(queue: Queue) -> None:
    (run,) = queue.submit(queue.project.config(step_seconds=5.0))
    queue.submit("--resume", str(run.path), expect=1)
    assert f"is queued or being worked on as job {queue.job(run)}" in queue.said


def test_of_two_submissions_at_the_same_moment_one_wins_and_the_other_says_so(queue: Queue) -> None:
    config = queue.project.config(output="data/made", steps=100, step_seconds=0.2)
    variables = queue.project.environment(SLURM_CONF=str(queue.cluster.configuration))

    def both(*arguments: str) -> list[str]:
        command = [sys.executable, "-P", "-m", "slurm", "submit", *arguments]
        started = [
            subprocess.Popen(command, cwd=queue.project.root, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        ended = [process.communicate(timeout=60) for process in started]
        assert sorted(process.returncode for process in started) == [0, 1], ended
        return [errors for process, (_, errors) in zip(started, ended, strict=True) if process.returncode]

    (said,) = both(config)
    run = RunDirectory(queue.project.only_run())
    assert f"{run.reference} is queued or being worked on (job {queue.job(run)}) and writes the same output" in said
    queue.cluster.command("scancel", queue.job(run))
    wait_until(lambda: queue.slurm_state(queue.job(run)) == "CANCELLED", "Slurm's word of it")
    (said,) = both("--resume", str(run.path))
    assert f"is queued or being worked on as job {queue.job(run)}" in said
    assert len(run.job()["jobs"]) == 2


def test_a_job_whose_submission_was_killed_before_it_was_recorded_is_not_left_beside_the_next(queue: Queue) -> None:
    (run,) = queue.submit(queue.project.config(steps=100, step_seconds=0.2))
    wait_until(lambda: at_step(run, 2), "the first steps")
    (entry,) = run.job()["jobs"]
    run.write_job(run.job() | {"jobs": [], "submitting": [0]})
    executor.launch(run, [0])
    wait_until(lambda: queue.slurm_state(entry["id"]) == "CANCELLED", "the end of the unrecorded job")
    assert queue.job(run) != entry["id"]
    assert "submitting" not in run.job()


def test_a_queue_that_does_not_answer_a_submission_is_given_up(queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = queue.submit(queue.project.config(steps=1))
    wait_until(lambda: finished(run) and queue.slurm_state(queue.job(run)) == "COMPLETED", "its end, which looks at the backlog")
    silent = tmp_path / "bin" / "sbatch"
    silent.parent.mkdir()
    silent.write_text("#!/bin/sh\nexec sleep 600\n")
    silent.chmod(0o755)
    monkeypatch.setenv("PATH", f"{silent.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_commands, "TIMEOUT_S", 1.0)
    backlog.set_tasks(run, [0], "no room")
    with pytest.raises(UserError, match="no answer within 1 s; is the controller up"):
        executor.launch(run, [0])
    assert run.job()["submitting"] == [0]  # it may have been queued all the same: the next submission looks
    silent.write_text("#!/bin/sh\necho 'sbatch: error: Socket timed out on send/recv operation' >&2\nexit 1\n")
    with pytest.raises(UserError, match="Socket timed out"):
        executor.launch(run, [0])
    assert run.job()["submitting"] == [0]
    silent.write_text("#!/bin/sh\necho 'sbatch: error: no' >&2\nexit 1\n")
    run.write_job({key: value for key, value in run.job().items() if key != "submitting"})
    with pytest.raises(UserError, match='sbatch exited 1: "no"'):
        executor.launch(run, [0])
    assert "submitting" not in run.job()
    backlog.set_tasks(run, [], "")


def test_what_the_cluster_cannot_give_is_refused_before_anything_is_queued(queue: Queue) -> None:
    config = queue.project.config()
    for change, sentence in (
        ("resources.partition=nosuch", "resources.partition is nosuch, but this cluster has main, low, short"),
        ("resources.node=n9", "resources.node is n9, but partition main has no such node"),
        ("resources.gpus=3", "resources.gpus is 3 (GPUs on each of 1 nodes), but main has 1 x a100 on n3, 2 x h200 on n1"),
        ("resources.gpu_type=h100", None),
        ("resources.cpus=9", "resources.cpus is 9 for 1 processes, but nodes of main have 8 cores"),
        ("resources.mem_gb=99", "resources.mem_gb is 99, but nodes of main have 15.6"),
        ("resources.nodes=4", "resources.nodes is 4, but main has 3"),
    ):
        if sentence is None:
            queue.submit(config, change, "resources.gpus=1", expect=1)
        else:
            queue.submit(config, change, expect=1)
            assert sentence in queue.said
    queue.submit(config, "resources.partition=short", "resources.timeout_min=61", expect=1)
    assert "resources.timeout_min is 61, but jobs in short may take 60 minutes" in queue.said
    queue.submit(config, "resources.constraint=nosuch", expect=1)
    assert 'sbatch exited 1: "Batch job submission failed: Invalid feature specification"' in queue.said
    assert not list(queue.project.runs.glob("toy/*/*"))


def test_a_preemption_any_signal_to_stop_and_a_requeue_by_hand_save_and_go_on(queue: Queue) -> None:
    ways = {"term": "scancel --signal=TERM", "usr1": "scancel --signal=USR1", "usr2": "scancel --signal=USR2", "byhand": "scontrol requeue"}
    hold, runs = queue.project.hold(), {}
    for name, way in ways.items():
        runs[name] = queue.submit(queue.project.config(name, steps=5, hold=hold), "--node", "n1")[0]
        wait_until(lambda run=runs[name]: at_step(run, 2), "the first steps")
        queue.cluster.command(*way.split(), queue.job(runs[name]))
    place = ("--partition", "low", "--node", "n2", "resources.cpus=8")
    runs["preempted"] = queue.submit(queue.project.config("preempted", steps=5, hold=hold), *place)[0]
    wait_until(lambda: at_step(runs["preempted"], 2), "the first steps")
    (high,) = queue.submit(queue.project.config("high"), "resources.cpus=8", "--node", "n2")
    wait_until(lambda: finished(high), "the job that preempts")
    saved = (runs["preempted"].progress() or {})["step"]
    hold.unlink()
    wait_until(lambda: all(finished(run) for run in runs.values()), "the second attempts")
    for name, run in runs.items():
        lines = run.attempts()
        by = f"Slurm requeues job {queue.job(run)} itself" if name == "byhand" else f"requeued as job {queue.job(run)}"
        assert [(line["status"], line["next"]) for line in lines if line["event"] == "end"] == [
            ("stopped", by),
            ("finished", "stays as it is"),
        ]
        assert [(line["job"], line["restart"]) for line in lines if line["event"] == "start"] == [(queue.job(run), 0), (queue.job(run), 1)]
    assert 2 <= saved < 5
    assert f"at step {saved}" in runs["preempted"].log_files()[-1].read_text()


def test_a_cancelled_job_saves_and_stays_cancelled(queue: Queue) -> None:
    (run,) = queue.submit(queue.project.config(steps=100, step_seconds=0.2))
    wait_until(lambda: at_step(run, 2), "the first steps")
    queue.cluster.command("scancel", queue.job(run))
    wait_until(lambda: run.state() == "stopped", "the stop")
    wait_until(lambda: queue.slurm_state(queue.job(run)) == "CANCELLED", "Slurm's word of it")
    assert "was cancelled; `crosscoder submit --resume" in run.attempts()[-1]["next"]
    queue.submit("--resume", str(run.path))
    wait_until(lambda: at_step(run, 4), "the run to go on")


def test_a_dry_resumption_shows_the_script_and_queues_nothing(queue: Queue) -> None:
    (run,) = queue.submit(queue.project.config(steps=2, fail_at=1), "--partition", "short")
    wait_until(lambda: run.state() == "failed", "the failure")
    before = run.job()
    variables = {"SLURM_CONF": str(queue.cluster.configuration)}
    (row,) = json.loads(queue.project.crosscoder("submit", "--resume", "toy/toy", "--dry-run", "--json", **variables).stdout)
    assert (row["tasks"], row["resources"]["partition"], row["resume_next"]) == ([0], "short", [])
    assert "#SBATCH --partition=short" in row["sbatch"]
    told = queue.project.crosscoder("submit", "--resume", "toy/toy", "--dry-run", **variables).stdout
    assert told.startswith(f"{run.reference}: it would go on: 1 task, in Slurm (partition short), 60 minutes")
    assert (run.job(), run.state()) == (before, "failed")
    assert queue.cluster.command("squeue", "-h", "-t", "pending,running", "-n", "toy-toy") == ""


def test_cancelling_a_task_that_has_ended_cancels_no_other(queue: Queue) -> None:
    (run,) = queue.submit(queue.project.config(steps=500, step_seconds=0.1, resources="{array_tasks: 3, cpus: 1}"))
    wait_until(lambda: all((run.progress(task) or {}).get("step", 0) > 0 for task in range(3)), "three tasks at work")
    one, variables = f"{queue.job(run)}_1", {"SLURM_CONF": str(queue.cluster.configuration)}
    assert queue.project.crosscoder("cancel", "--yes", f"{run.path}/tasks/1", **variables).stdout.endswith(
        f"{queue.job(run)}_[1] cancelled\n"
    )
    wait_until(lambda: run.task_state(1) == "stopped" and queue.slurm_state(one) == "CANCELLED", "the end of the one")
    for name in (one, f"{run.reference}/tasks/1"):
        again = queue.project.crosscoder("cancel", "--yes", name, **variables)
        assert (again.returncode, again.stdout) == (1, "")
        assert f"{run.reference}/tasks/1 has no job that is waiting or running; it is stopped" in again.stderr
    rows = json.loads(queue.project.crosscoder("jobs", "--json", one, **variables).stdout)
    assert [row["task"] for row in rows] == [1]
    assert [run.task_state(task) for task in (0, 2)] == ["running", "running"]
    queue.submit("--resume", one)
    wait_until(lambda: run.task_state(1) == "running", "the one to go on alone")
    assert [entry["tasks"] for entry in run.job()["jobs"]] == [[0, 1, 2], [1]]


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(queue: Queue) -> None:
    (run,) = queue.submit(queue.project.config(steps=3, step_seconds=60.0))
    wait_until(lambda: bool(run.log_files()) and "at step 0" in run.log_files()[-1].read_text(), "the stage")
    earlier = [line for line in run.attempts() if line["event"] == "start"] * (MAX_ATTEMPTS_WITHOUT_PROGRESS - 1)
    for line in earlier:
        append_line(run.path / "attempts.jsonl", line)
    queue.cluster.command("scancel", "--signal=USR2", queue.job(run))
    wait_until(lambda: run.attempts()[-1]["event"] == "end", "its end")
    assert run.attempts()[-1]["next"].startswith("not requeued: its last 10 attempts got no further than the start")


def test_a_queued_job_whose_run_directory_was_deleted_runs_nothing(queue: Queue) -> None:
    (blocker,) = queue.submit(queue.project.config("blocker", steps=100, step_seconds=0.2), "--node", "n3", "resources.cpus=8")
    (run,) = queue.submit(queue.project.config(), "--node", "n3")
    shutil.rmtree(run.path)
    queue.cluster.command("scancel", queue.job(blocker))
    job = re.findall(r"^job (\d+)", queue.said, re.M)[0]
    wait_until(lambda: queue.slurm_state(job) in ("FAILED", "CANCELLED"), "the job's failure")
    assert not run.path.exists() or not list(run.path.rglob("result.json"))


def test_processes_of_a_job_form_a_group_though_their_nodes_names_do_not_resolve(queue: Queue) -> None:
    program = queue.project.root / "pipeline/stages/toy.py"
    program.write_text(
        "import torch\n"
        "import torch.distributed as dist\n"
        "def run(config, run):\n"
        "    dist.init_process_group('gloo')\n"
        "    ranks = torch.tensor([float(dist.get_rank() + 1)])\n"
        "    dist.all_reduce(ranks)\n"
        "    dist.destroy_process_group()\n"
        "    return {'sum': float(ranks)}\n"
    )
    (run,) = queue.submit(queue.project.config(), "resources.nodes=2")
    wait_until(lambda: finished(run), "the job")
    assert (run.result() or {})["result"] == {"sum": 3.0}


def test_a_process_that_fails_ends_the_others_and_the_run_is_failed(queue: Queue) -> None:
    program = queue.project.root / "pipeline/stages/toy.py"
    program.write_text(
        "import os, time\n"
        "def run(config, run):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise RuntimeError('rank 1 crashes')\n"
        "    while True:\n"
        "        run.check_stop()\n"
        "        time.sleep(0.05)\n"
    )
    (run,) = queue.submit(queue.project.config(), "resources.tasks_per_node=2")
    wait_until(lambda: run.state() == "failed", "the failure")
    assert (run.result() or {})["error"] == "process 1: RuntimeError: rank 1 crashes"
    wait_until(lambda: queue.slurm_state(queue.job(run)) == "FAILED", "Slurm's word of it")


def test_a_thousand_tasks_are_one_sbatch(queue: Queue) -> None:
    (run,) = queue.submit(queue.project.config(), "resources.array_tasks=1000", "resources.max_parallel=1")
    (entry,) = run.job()["jobs"]
    queue.cluster.command("scancel", entry["id"])
    assert entry["tasks"] == list(range(1000))
    assert "#SBATCH --array=0-999%1" in entry["sbatch"]


def test_an_array_is_split_where_the_cluster_takes_only_small_ones(tmp_path: Path, start_cluster: Callable[..., PrivateCluster]) -> None:
    small = start_cluster(layout.pretended(dataclasses.replace(layout.TEST_POLICY, max_array_size=3)))
    queue = Queue(ToyProject(tmp_path), small)
    (run,) = queue.submit(queue.project.config(), "resources.array_tasks=7")
    assert [(entry["tasks"], entry["array"]) for entry in run.job()["jobs"]] == [([0, 1, 2], True), ([3, 4, 5], True), ([6], False)]
    wait_until(lambda: finished(run), "all tasks")
    assert [(run.result(task) or {})["result"]["task"] for task in range(7)] == list(range(7))


def test_a_sweep_is_one_throttled_array_listed_and_cancelled_by_its_name(queue: Queue) -> None:
    queue.project.config("base", step_seconds=0.2, resources="{cpus: 1}")
    (queue.project.root / "sweep.yaml").write_text(
        "name: s\nbase: base.yaml\ngrid: {steps: [50, 60, 70, 80]}\nmetric: score\nmax_parallel: 2\n"
    )
    variables = {"SLURM_CONF": str(queue.cluster.configuration)}
    done = queue.project.crosscoder("sweep", "sweep.yaml", **variables)
    assert done.returncode == 0, done.stderr
    run = RunDirectory(queue.project.only_run("s", stage="sweep"))
    assert "ArrayTaskThrottle=2" in queue.detail(queue.job(run))
    wait_until(lambda: at_step(run, 1), "the first step")
    rows = json.loads(queue.project.crosscoder("jobs", "--json", **variables).stdout)
    states = [row["state"] for row in rows if row["run"] == run.reference]
    assert sorted(states) == ["running", "running", "waiting", "waiting"]
    done = queue.project.crosscoder("cancel", "sweep/s", "--yes", **variables)
    assert f"{queue.job(run)}_[0-3] cancelled" in done.stdout, done.stderr
    wait_until(lambda: queue.slurm_state(queue.job(run)) == "CANCELLED", "Slurm's word of it")
