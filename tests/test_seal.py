"""Whatever a finished run contains is hashed in its seal, and `verify` names what is not as it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy_project import ToyProject
from waiting import wait_until

from pipeline import records
from slurm.record import activity, seal
from slurm.record.run_directory import RunDirectory
from slurm.record.verification import verify, verify_run

RESULT = {"status": "finished", "ended": 2.0, "result": {"loss": 0.25}, "seal": seal.FORMAT}
CONTENTS = {
    "metrics.jsonl": b'{"step": 1}\n{"step": 2}\n',
    "metrics.json": b'{"explained_variance": 0.9}',
    "features.safetensors": bytes(range(200)),
    "density.png": b"\x89PNG",
    "empty.txt": b"",
    "tensorboard/events.out.tfevents.1.n1": b"\0\1\2",
    "progress.json": b'{"step": 2}',
    "inputs.json": b"{}",
    "environment.json": b"{}",
    "code.diff": b"",
    "log/1042.log": b"began\n",
    "attempts.jsonl": b'{"event": "start"}\n',
}
LEFT_OUT = ("lock.json", "submitit/1042_0_result.pkl", "ranks/1/failure.json", ".state.json.n1.7.tmp", "checkpoints/00000001.damaged/x")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of one task, sealed with a file of each kind."""
    run = RunDirectory(tmp_path / "runs/train/demo/20261123-091530-k3f9")
    for name, content in {**CONTENTS, **dict.fromkeys(LEFT_OUT, b"x"), "code/pipeline/run.py": b"pass"}.items():
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_bytes(content)
    checkpoint = run.path / "checkpoints/00000002"
    checkpoint.mkdir()
    (checkpoint / "crosscoder.safetensors").write_bytes(b"weights")
    records.write_manifest(checkpoint, "checkpoint/1", {"crosscoder": shard(checkpoint)}, {"step": 2})
    run.write_job({"stage": "train", "name": "demo", "num_tasks": 1, "jobs": []})
    seal.write(run, 0, RESULT)
    records.write_json(run.path / "result.json", RESULT)
    return run


def shard(checkpoint: Path) -> records.Record:
    return records.commit_shard(checkpoint, "crosscoder", "crosscoder/1", ["crosscoder.safetensors"], {}, {})


CHECKPOINT = [f"checkpoints/00000002/{name}" for name in ("crosscoder.safetensors", "crosscoder.json", "manifest.json")]


@pytest.mark.parametrize("name", [*CONTENTS, "result.json", *CHECKPOINT])
def test_a_flipped_bit_a_cut_a_longer_and_a_missing_file_are_each_named(run: RunDirectory, name: str) -> None:
    assert seal.check(run, 0)[0] == []
    path = run.path / name
    content = path.read_bytes()
    advice = f"; restore it, or make the run again with `crosscoder rerun {run.reference}`"
    if content:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        (damage,) = seal.check(run, 0)[0]
        assert (
            damage == f"{path} does not have the bytes that it had when the task finished (its hash differs): it was changed since{advice}"
        )
        path.write_bytes(content[:-1])
        (damage,) = seal.check(run, 0)[0]
        assert damage == f"{path} holds {len(content) - 1:,} bytes, {len(content):,} when the task finished: it was changed since{advice}"
    path.write_bytes(content + b"\n")
    assert len(seal.check(run, 0)[0]) == (0 if name in ("attempts.jsonl", "log/1042.log") else 1)
    path.unlink()
    (damage,) = seal.check(run, 0)[0]
    assert damage == f"{path} is missing; it held {len(content):,} bytes when the task finished{advice}"


def test_what_may_change_after_the_end_is_no_damage(run: RunDirectory) -> None:
    for name in [*LEFT_OUT, "notes.txt", "log/1043.log"]:
        (run.path / name).write_bytes(b"something else")
    run.write_job(run.job() | {"changes": []})
    assert seal.check(run, 0)[0] == []
    assert not {name for name in seal.check(run, 0)[1] if name in LEFT_OUT or name.startswith(("code/", "job"))}


def test_a_checkpoint_s_hashes_come_from_its_records(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    whole = records.hash_file
    monkeypatch.setattr(records, "hash_file", lambda path, *rest, **more: hashed.append(path.name) or whole(path, *rest, **more))
    before = records.read_json(run.path / seal.SEAL)
    seal.write(run, 0, RESULT)
    assert records.read_json(run.path / seal.SEAL) == before
    assert "crosscoder.json" in hashed
    assert "crosscoder.safetensors" not in hashed


def test_a_checkpoint_that_is_damaged_before_the_seal_keeps_no_run_from_its_end_and_is_named(run: RunDirectory) -> None:
    (run.path / CHECKPOINT[0]).write_bytes(b"weight")
    seal.write(run, 0, RESULT)
    records.write_json(run.path / "result.json", RESULT)
    assert seal.check(run, 0)[0] == []
    (damage,) = (told for told in verify_run(run) if "checkpoints/00000002/" in told)
    assert damage.startswith(f"{run.path / CHECKPOINT[0]} holds 6 bytes, its record says 7 bytes")


def test_a_damaged_seal_is_named_itself(run: RunDirectory) -> None:
    path = run.path / seal.SEAL
    for content in (path.read_bytes().replace(b'"bytes": 3', b'"bytes": 4'), b"", b"{}", b"\xff"):
        path.write_bytes(content)
        (damage,) = seal.check(run, 0)[0]
        assert damage.startswith(f"{path} ")


def test_a_file_that_no_record_can_name_does_not_keep_a_run_from_being_sealed(run: RunDirectory) -> None:
    odd = bytes(run.path) + b"/caf\xe9.txt"
    with open(odd, "w") as file:
        file.write("x")
    (run.path / "link").symlink_to("gone")
    seal.write(run, 0, RESULT)
    assert seal.check(run, 0)[0] == []


# -- by the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> ToyProject:
    return ToyProject(tmp_path)


def finished(project: ToyProject, name: str = "toy", **values: object) -> RunDirectory:
    done = project.crosscoder("submit", "--executor", "debug", project.config(name, **values))
    assert done.returncode == 0, done.stderr
    return RunDirectory(project.only_run(name))


def told(project: ToyProject, run: RunDirectory) -> "tuple[list[str], list[str]]":
    return verify(str(run.path), project.runs)[:2]


def test_verify_names_every_file_of_a_finished_run_that_was_changed(project: ToyProject) -> None:
    run = finished(project)
    assert told(project, run) == ([f"run {run.path}"], [])
    names = [str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()]
    names = [name for name in names if name not in ("job.json", "seal.json", "setup.json") and not name.startswith("code/")]
    assert {"result.json", "state.json", "progress.json", "config.yaml", "inputs.json", "environment.json", "code.json"} < set(names)
    for name in names:
        path, content = run.path / name, (run.path / name).read_bytes()
        path.write_bytes(b"?" + content[1:])  # the line that tells of the end stands behind what of attempts.jsonl is sealed
        damages = told(project, run)[1]
        assert any(damage.startswith(f"{path} ") for damage in damages), (name, damages)
        path.write_bytes(content)
    assert told(project, run)[1] == []
    (run.path / "result.json").write_text((run.path / "result.json").read_text().replace("30.0", "31.0"))
    done = project.crosscoder("verify", run.reference)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1), done.stdout
    assert f"{run.path / 'result.json'} does not have the bytes that it had when the task finished" in done.stdout


def test_each_task_of_an_array_has_a_seal_and_what_all_share_is_named_once(project: ToyProject) -> None:
    run = finished(project, resources="{array_tasks: 3}")
    assert [(run.task_directory(task) / seal.SEAL).exists() for task in range(3)] == [True] * 3
    assert told(project, run) == ([f"run {run.path}"], [])
    (run.path / "tasks/1/state.json").write_text('{"step": 4}\n')
    (run.path / "environment.json").write_text("{}")
    starts = [damage.partition(" holds")[0] for damage in told(project, run)[1]]
    assert starts == [str(run.path / "environment.json"), str(run.path / "tasks/1/state.json")]


def test_a_seal_that_is_missing_is_named_and_an_older_run_is_not_called_whole(project: ToyProject) -> None:
    run = finished(project)
    (run.path / seal.SEAL).unlink()
    (damage,) = told(project, run)[1]
    assert damage.startswith(f"{run.path} finished, but is not sealed: seal.json is missing")
    result = records.read_json(run.path / "result.json")
    records.write_json(run.path / "result.json", {key: value for key, value in result.items() if key != "seal"})
    done = project.crosscoder("verify", run.reference)
    limit = "; it finished before runs were sealed, so results, metrics and figures could not be checked"
    assert (done.returncode, done.stdout) == (0, f"no damage found: run {run.path}{limit}\n")
    (run.path / "result.json").write_bytes(b"\0\0")
    assert "is not valid JSON" in told(project, run)[1][0]


def test_a_run_that_failed_has_no_seal_and_is_not_called_whole_without_a_word(project: ToyProject) -> None:
    done = project.crosscoder("submit", "--executor", "debug", project.config(crash_at=1))
    run = RunDirectory(project.only_run())
    checked, damages, is_all = verify(str(run.path), project.runs)
    assert (done.returncode, damages, (run.path / seal.SEAL).exists(), is_all) == (70, [], False, False)
    assert checked[0].endswith("; it did not finish (failed), so only what was frozen and read, and checkpoints, could be checked")


KILLED_BEFORE_ITS_RESULT = """
import os, runpy, sys
from pipeline import records
write = records.write_json
records.write_json = lambda path, value, **how: os._exit(9) if path.name == "result.json" else write(path, value, **how)
sys.argv = ["crosscoder", "submit", "--executor", "debug", "toy.yaml"]
runpy.run_module("slurm", run_name="__main__")
"""


def test_killed_between_its_seal_and_its_result_a_run_has_not_finished_and_is_sealed_when_resumed(project: ToyProject) -> None:
    project.config()
    command = [sys.executable, "-P", "-c", KILLED_BEFORE_ITS_RESULT]
    done = subprocess.run(command, cwd=project.root, env=project.environment(), capture_output=True, check=False, timeout=60)
    run = RunDirectory(project.only_run())
    assert (done.returncode, (run.path / seal.SEAL).exists(), run.state()) == (9, True, "stopped"), done.stderr
    checked, damages = told(project, run)
    assert (damages, "it did not finish" in checked[0]) == ([], True)
    resumed = project.crosscoder("submit", "--resume", run.reference)
    assert resumed.returncode == 0, resumed.stderr
    assert (run.state(), told(project, run)) == ("finished", ([f"run {run.path}"], []))
    (run.path / "result.json").unlink()
    assert "result.json is missing; it held" in json.dumps(told(project, run)[1])


@pytest.mark.parametrize("executor", ["debug", "local"])
def test_a_run_that_finished_and_lost_its_result_and_seal_is_neither_whole_nor_new(project: ToyProject, executor: str) -> None:
    run = finished(project) if executor == "debug" else queued_and_finished(project)
    for name in ("result.json", seal.SEAL):
        (run.path / name).unlink()
    verified, shown = project.crosscoder("verify", run.reference), project.crosscoder("show", run.reference)
    missing = f"{run.path / 'attempts.jsonl'} says that the task finished, but result.json and seal.json are missing; restore them, or "
    assert (verified.returncode, verified.stdout.startswith(missing)) == (1, True), verified.stdout
    assert shown.stdout.startswith(f"{run.reference}: lost: it finished, but its result.json is missing: restore it, or "), shown.stdout
    resumed = project.crosscoder("submit", "--resume", run.reference)
    assert resumed.returncode == 0, resumed.stderr
    wait_until(lambda: run.state() == "finished", "the run made again")
    assert told(project, run) == ([f"run {run.path}"], [])


def queued_and_finished(project: ToyProject) -> RunDirectory:
    assert project.crosscoder("submit", "--executor", "local", project.config()).returncode == 0
    run = RunDirectory(project.only_run())
    wait_until(lambda: run.state() == "finished" and not activity.is_busy(run, 0), "the end")
    return run


def test_of_the_data_that_a_run_read_the_id_is_compared_and_the_command_that_rehashes_it_is_named(project: ToyProject) -> None:
    finished(project, "made", output="data/made")
    run = finished(project, data="data/made")
    data = project.root / "data/made"
    assert told(project, run) == (
        [f"run {run.path}; of the data that it read only the id was compared: `crosscoder verify {data}` would rehash it"],
        [],
    )
    (data / "numbers.bin").write_bytes(bytes(3))
    assert told(project, run)[1] == []
    assert project.crosscoder("verify", str(data)).returncode == 1
