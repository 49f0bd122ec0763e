"""The parts of freezing and of the job's program that need no process of their own."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.config.resources import Resources
from pipeline.run import Run
from slurm.client.node_output import GpuCount, Node
from slurm.execution import dependencies, frozen_code, job_process, requeue, slurm_job
from slurm.execution.local_queue import share_of
from slurm.execution.requeue import Fate
from slurm.execution.terminal import TerminalAndLog
from slurm.record import environment, run_inputs, verification
from slurm.record.comparison import flatten
from slurm.record.run_directory import RunDirectory
from slurm.submission import preflight

# -- what becomes of a stopped job ------------------------------------------------------------------------------------

# As scontrol of Slurm 22.05.8 printed them of a job being ended, cut to the fields that are read.
SCONTROL = (
    "JobId=7 JobName=x Requeue=1 Restarts={restarts} JobState={state} Reason=None RunTime={ran} TimeLimit=00:10:00 {preempt}Comment=a b"
)


@pytest.mark.parametrize(
    ("state", "restarts", "preempt", "ran", "fate"),
    [
        ("RUNNING", 0, "", "00:01:00", Fate.RUNNING),
        ("COMPLETING", 1, "", "00:01:00", Fate.REQUEUED),
        ("PENDING", 1, "PreemptTime=2026-11-23T09:35:14 ", "00:01:00", Fate.REQUEUED),
        ("COMPLETING", 0, "PreemptTime=2026-11-23T09:35:14 ", "00:01:00", Fate.PREEMPTED),
        ("COMPLETING", 0, "PreemptTime=None ", "00:01:00", Fate.CANCELLED),
        ("COMPLETING", 0, "", "00:10:00", Fate.TIMED_OUT),
        ("CANCELLED", 0, "", "00:00:10", Fate.CANCELLED),
    ],
)
def test_what_slurm_does_to_a_stopped_job_is_read_from_its_record(state: str, restarts: int, preempt: str, ran: str, fate: Fate) -> None:
    assert requeue.fate_of(SCONTROL.format(state=state, restarts=restarts, preempt=preempt, ran=ran), 0) is fate


def test_attempts_that_get_no_further_end_and_those_that_do_go_on() -> None:
    starts = [{"event": "start", "place": "train 10"}] * requeue.MAX_ATTEMPTS_WITHOUT_PROGRESS
    assert requeue.leads_nowhere(starts, {"phase": "train", "step": 10}) == "its last 10 attempts got no further than train 10"
    assert requeue.leads_nowhere(starts, {"phase": "train", "step": 11}) is None
    assert requeue.leads_nowhere(starts[1:], {"phase": "train", "step": 10}) is None
    many = [{"event": "start", "place": f"train {i}"} for i in range(requeue.MAX_ATTEMPTS)]
    assert requeue.leads_nowhere(many, {"phase": "train", "step": 999}) == f"it was attempted {requeue.MAX_ATTEMPTS} times"


# -- inputs and environment -------------------------------------------------------------------------------------------


def data_set(directory: Path, content: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "a.bin").write_bytes(content)
    shard = records.commit_shard(directory, "a", "toy/1", ["a.bin"], {}, {})
    records.write_manifest(directory, "toy-set/1", {"a": shard}, {})
    return directory


def test_an_input_with_other_content_is_named_and_a_copy_elsewhere_would_not_be(tmp_path: Path) -> None:
    entry = run_inputs.describe(data_set(tmp_path / "x", b"one"))
    assert run_inputs.describe(data_set(tmp_path / "y", b"one"))["data_id"] == entry["data_id"]
    assert run_inputs.check_all({"tokens": entry}) == {"tokens": entry}
    data_set(tmp_path / "x", b"two")
    with pytest.raises(UserError, match=r"tokens \(.*/x\) had data id [0-9a-f]{12}, has [0-9a-f]{12}: the data changed"):
        run_inputs.check_all({"tokens": entry})


def test_a_pending_input_is_completed_when_it_is_there_and_named_when_it_is_not(tmp_path: Path) -> None:
    entry = {"path": str(tmp_path / "x"), "kind": "pending", "made_by": "/runs/cache/a/1"}
    with pytest.raises(UserError, match=r"tokens: .*/x does not exist; run the stage that makes it first"):
        run_inputs.check_all({"tokens": entry})
    data_set(tmp_path / "x", b"one")
    completed = run_inputs.check_all({"tokens": entry})["tokens"]
    assert completed["kind"] == "data set"
    assert completed["made_by"] == "/runs/cache/a/1"


def test_a_run_that_is_read_may_carry_the_identity_that_the_stage_gave_it(tmp_path: Path) -> None:
    run = tmp_path / "train/demo/20261123-000000-aaaa"
    run.mkdir(parents=True)
    (run / "job.json").write_text("{}")
    (run / "result.json").write_text(json.dumps({"status": "finished", "ended": 1.0, "result": {"loss": 1.0}}))
    entry = run_inputs.describe(run) | {"data_id": "of the crosscoder"}
    assert run_inputs.check_all({"crosscoder": entry}) == {"crosscoder": entry}
    (run / "result.json").write_text(json.dumps({"status": "finished", "ended": 2.0, "result": {"loss": 2.0}}))
    with pytest.raises(UserError, match=r"crosscoder \(.*\) had content [0-9a-f]{12}, has"):
        run_inputs.check_all({"crosscoder": entry})


def test_a_checkpoint_is_an_input_and_the_stage_may_give_the_crosscoder_in_it_an_identity(tmp_path: Path) -> None:
    def checkpoint(weights: bytes) -> Path:
        (tmp_path / "7").mkdir(exist_ok=True)
        (tmp_path / "7/crosscoder.safetensors").write_bytes(weights)
        shard = records.commit_shard(tmp_path / "7", "crosscoder", "checkpoint-part/1", ["crosscoder.safetensors"], {}, {})
        records.write_manifest(tmp_path / "7", "checkpoint/1", {"crosscoder": shard}, {"step": 7})
        return tmp_path / "7"

    run = Run(tmp_path / "run", output=io.StringIO())
    records.write_json(run.directory / "inputs.json", {"crosscoder": run_inputs.describe(checkpoint(b"one"))})
    run.bind_input("crosscoder", "identity of the crosscoder")
    entry = records.read_json(run.directory / "inputs.json")["crosscoder"]
    assert (entry["kind"], entry["data_id"]) == ("checkpoint", "identity of the crosscoder")
    assert run_inputs.check_all({"crosscoder": entry}) == {"crosscoder": entry}
    checkpoint(b"two")
    with pytest.raises(UserError, match=r"crosscoder \(.*/7\) had content [0-9a-f]{12}, has"):
        run_inputs.check_all({"crosscoder": entry})


def test_an_unfinished_data_set_is_not_an_input(tmp_path: Path) -> None:
    records.claim(tmp_path / "x", {"stage": "toy"})
    with pytest.raises(UserError, match=r"has no manifest.json: it is not a finished data set"):
        run_inputs.describe(tmp_path / "x")


def test_source_files_are_known_by_pattern_and_a_new_one_changes_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    before = run_inputs.describe(tmp_path / "*.jsonl")
    (tmp_path / "b.txt").write_text("x")
    assert run_inputs.describe(tmp_path / "*.jsonl") == before
    (tmp_path / "b.jsonl").write_text("x")
    assert run_inputs.describe(tmp_path / "*.jsonl") != before
    with pytest.raises(UserError, match="names no file"):
        run_inputs.describe(tmp_path / "*.zst")


def test_files_that_were_touched_are_the_same_and_a_changed_byte_makes_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("x")
    os.utime(file, (1.0, 1.0))
    before = run_inputs.describe(tmp_path)
    monkeypatch.setattr(run_inputs, "MOST_BYTES_READ", 0)
    by_times = run_inputs.describe(tmp_path)  # as large files are known, and all were by runs of before
    os.utime(file, (2.0, 2.0))
    assert run_inputs.describe(tmp_path, like=before) == before
    assert run_inputs.check_all({"source": before}) == {"source": before}
    with pytest.raises(UserError, match=r"source \(.*\) had content .*: the data changed"):
        run_inputs.check_all({"source": by_times})
    file.write_text("y")
    os.utime(file, (1.0, 1.0))
    assert run_inputs.describe(tmp_path) == by_times
    with pytest.raises(UserError, match=r"source \(.*\) had content .*: the data changed"):
        run_inputs.check_all({"source": before})


def test_each_package_that_differs_is_named() -> None:
    recorded = {"python_version": "3.11.7", "packages": {"torch": "2.13.0", "numpy": "2.1", "rich": "1"}}
    present = {"python_version": "3.12.0", "packages": {"torch": "2.14.0", "numpy": "2.1", "tqdm": "4"}}
    assert environment.differences(recorded, present) == [
        "python was 3.11.7, is 3.12.0",
        "rich was 1, is not installed",
        "torch was 2.13.0, is 2.14.0",
        "tqdm was not installed, is 4",
    ]


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_names_a_flipped_bit_in_any_set_of_a_directory(tmp_path: Path) -> None:
    data_set(tmp_path / "demo/train", b"one")
    broken = data_set(tmp_path / "demo/validation", b"two")
    assert verification.verify(str(tmp_path / "demo"), tmp_path / "runs")[1] == []
    (broken / "a.bin").write_bytes(b"twp")
    (damage,) = verification.verify(str(tmp_path / "demo"), tmp_path / "runs")[1]
    assert damage.startswith(f"{broken / 'a.bin'} does not have the bytes that were written")


def test_verify_says_when_there_is_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a finished data set"):
        verification.verify(str(tmp_path), tmp_path / "runs")


# -- preflight --------------------------------------------------------------------------------------------------------

NODES = (
    Node("n1", ("IDLE",), ("main",), {"h200": GpuCount(2, 0)}, cpus=8, mem_mb=16_000),
    Node("n2", ("DOWN",), ("main",), {}, cpus=4, mem_mb=8_000, reason="fan"),
)
PARTITIONS = {"main": {"Default": "YES", "MaxTime": "1-00:00:00"}, "long": {"Default": "NO", "MaxTime": "UNLIMITED"}}


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        ({"gpus": 2, "gpu_type": "h200", "cpus": 8, "mem_gb": 15.0, "timeout_min": 1440}, None),
        ({"gpus": 1, "gpu_type": "a100"}, "gpus is 1 (a100 GPUs on each of 1 nodes), but main has 2 x h200 on n1"),
        ({"gpus": 1, "nodes": 2}, "gpus is 1 (GPUs on each of 2 nodes), but main has 2 x h200 on n1"),
        ({"node": "n2"}, "node is n2, but that node is down (fan); choose another"),
        # Slurm would take all of them, and then refuse their number.
        ({"node": "n1,n2"}, "node is n1,n2, but partition main has no such node; `crosscoder accelerators` lists them"),
        ({"timeout_min": 1441}, "timeout_min is 1441, but jobs in main may take 1440 minutes"),
        ({"cpus": 3, "tasks_per_node": 3}, "cpus is 3 for 3 processes, but nodes of main have 8 cores"),
        ({"partition": "main,gone"}, "partition is gone, but this cluster has main, long"),
    ],
)
def test_what_the_cluster_cannot_give_is_said(asked: dict[str, Any], fault: str | None) -> None:
    assert preflight.faults_of(Resources(**asked), PARTITIONS, NODES) == ([] if fault is None else [fault])


# -- processes and signals --------------------------------------------------------------------------------------------


def test_a_process_knows_its_place_in_an_array_and_in_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"SLURM_JOB_ID": "1045", "SLURM_ARRAY_JOB_ID": "1042", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    slurm |= {"SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SUBMITIT_EXECUTOR": "slurm"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert job_process.this_process() == job_process.Process("slurm", "1042_3", 2, 3, 4, 1, 2)
    monkeypatch.delenv("SUBMITIT_EXECUTOR")
    assert job_process.this_process().executor == "run"


def test_a_task_of_one_process_joins_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    job_process.join_group(job_process.Process("slurm", "1", 0, 0, 1, 0, 1), tmp_path)
    assert "RANK" not in os.environ


@pytest.mark.parametrize(("timeout_min", "seconds"), [(1, 10), (5, 30), (30, 180), (1440, 180)])
def test_a_job_is_warned_early_enough_and_not_as_it_starts(timeout_min: int, seconds: int) -> None:
    assert slurm_job.signal_delay_s(timeout_min) == seconds


def test_the_frozen_code_comes_first_and_other_checkouts_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkout/pipeline").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'checkout'}:/site/modules")
    variables = frozen_code.frozen_variables(RunDirectory(tmp_path / "run"))
    assert variables == {"PYTHONPATH": f"{tmp_path / 'run/code'}:/site/modules", "PYTHONSAFEPATH": "1"}


# -- small pieces -----------------------------------------------------------------------------------------------------


def test_a_log_gets_the_last_form_of_a_line_that_was_rewritten_in_place() -> None:
    terminal, log = io.StringIO(), io.StringIO()
    both = TerminalAndLog(terminal, log)
    for text in ("start\n", "\r\x1b[2K 10 %", "\r\x1b[2K 20 %", "\r\x1b[2Ksaid\n", "\r\x1b[2K100 %", "\n"):
        both.write(text)
    assert log.getvalue() == "start\nsaid\n100 %\n"
    assert terminal.getvalue().startswith("start\n\r\x1b[2K 10 %")


def test_nested_settings_are_compared_by_dotted_key() -> None:
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": 1, "a.c": [1, 2], "d": None}


def test_tasks_on_one_machine_share_its_cores_and_gpus() -> None:
    def share(num_tasks: int, **resources: object) -> tuple[int, int]:
        return tuple(share_of(Resources.model_validate(resources), num_tasks, 8))  # type: ignore[return-value]

    assert share(3) == (3, 2)
    assert share(20) == (8, 1)
    assert share(20, max_parallel=2) == (2, 4)
    assert share(20, cpus=3) == (2, 4)
    assert share(20, cpus=16, max_parallel=4) == (1, 8)
    assert share(20, tasks_per_node=2) == (4, 1)
    assert share(20, gpus=1) == (1, 8)
    assert share(20, gpus=1, max_parallel=2) == (2, 4)
    assert share(1) == (1, 8)


def test_a_dependency_waits_for_what_has_not_finished_and_for_nothing_else(tmp_path: Path) -> None:
    def parent(name: str, executor_name: str, finished: bool) -> RunDirectory:
        run = RunDirectory(tmp_path / "train" / name / "20261123-000000-aaaa")
        run.path.mkdir(parents=True)
        jobs = [{"id": "7", "tasks": [0], "array": False}, {"id": "9", "tasks": [0], "array": False}]
        run.write_job({"executor": executor_name, "num_tasks": 1, "jobs": jobs})
        if finished:
            (run.path / "result.json").write_text(json.dumps({"status": "finished"}))
        return run

    done, waiting, local = parent("done", "slurm", True), parent("waiting", "slurm", False), parent("local", "local", False)
    assert dependencies.dependency([done]) is None
    assert dependencies.dependency([done, waiting]) == "afterok:9"
    with pytest.raises(UserError, match="is no job of Slurm, so a job can't wait for it"):
        dependencies.dependency([local])
