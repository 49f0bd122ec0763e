"""The command line's `run` and `submit`, with the executors that need no queue, on a stage that only counts."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_project import ToyProject
from waiting import PATIENCE_SECONDS, finished, wait_until

from pipeline import records
from slurm.record.run_directory import RunDirectory


@pytest.fixture
def project(tmp_path: Path) -> ToyProject:
    return ToyProject(tmp_path)


@pytest.fixture
def hold(project: ToyProject) -> Path:
    return project.hold()


def runs_of(output: str) -> list[RunDirectory]:
    return [RunDirectory(Path(path)) for path in re.findall(r"^run (.*)$", output, re.M)]


# -- run and debug --------------------------------------------------------------------------------------------------


def test_a_run_directory_is_complete(project: ToyProject) -> None:
    done = project.crosscoder("run", project.config(), "steps=2")
    assert done.returncode == 0, done.stderr
    (run,) = runs_of(done.stdout)
    assert run.config_values()["steps"] == 2
    assert run.job()["command"] == ["crosscoder", "run", "toy.yaml", "steps=2"]
    assert (run.result() or {})["result"]["steps"] == 2
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["python"] == sys.executable
    assert environment["packages"]["torch"] == environment["torch"]
    assert [line["event"] for line in run.attempts()] == ["start", "end"]
    assert (run.progress() or {})["step"] == 2
    assert "at step 0\n" in (run.path / "log/terminal.log").read_text()
    assert {path.name for path in run.path.iterdir()} == {
        *("config.yaml", "code", "code.json", "code.diff", "environment.json", "inputs.json", "job.json", "setup.json", "log"),
        *("attempts.jsonl", "progress.json", "result.json", "seal.json", "state.json"),
    }


def test_the_users_mistake_is_one_sentence_and_exit_code_1(project: ToyProject) -> None:
    for arguments, sentence in (
        (["run", project.config(), "stepz=1"], "crosscoder: toy.yaml: stepz is not a setting; did you mean `steps`?\n"),
        (["run", "none.yaml"], "crosscoder: none.yaml does not exist; name a YAML file, for example configs/demo/train.yaml\n"),
        (["submit", "--executor", "debug", project.config(), "data=gone"], "data/gone does not exist"),
        (["show", "toy/none"], "crosscoder: no run is called 'toy/none'"),
        (["run", project.config(), "train.seed=1"], "is for the stage train, which none of the configurations is of"),
    ):
        done = project.crosscoder(*arguments)
        assert done.returncode == 1
        assert sentence.replace("data/gone", "/gone") in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(project.runs.glob("toy/*/*"))


def test_wrong_usage_is_exit_code_2(project: ToyProject) -> None:
    assert project.crosscoder("submit").returncode == 2
    assert project.crosscoder("nonsense").returncode == 2
    assert project.crosscoder("submit", "--resume", "x", "y.yaml").returncode == 2


def test_a_stages_failure_is_recorded_and_a_crash_has_its_traceback(project: ToyProject) -> None:
    failed = project.crosscoder("run", project.config(), "fail_at=1")
    (run,) = runs_of(failed.stdout)
    assert (failed.returncode, failed.stderr) == (1, "crosscoder: the toy fails at step 1, as it was told\n")
    assert {key: (run.result() or {})[key] for key in ("status", "error")} == {
        "status": "failed",
        "error": "the toy fails at step 1, as it was told",
    }
    crashed = project.crosscoder("run", project.config(), "crash_at=1")
    (run,) = runs_of(crashed.stdout)
    assert crashed.returncode == 70
    assert "Traceback" in crashed.stderr
    assert (run.result() or {})["error"] == "RuntimeError: the toy crashes"
    assert "Traceback" in (run.path / "log/terminal.log").read_text()


def test_ctrl_c_saves_and_says_how_to_go_on(project: ToyProject, hold: Path) -> None:
    command = [sys.executable, "-P", "-m", "slurm", "run", project.config(hold=hold)]
    with subprocess.Popen(command, cwd=project.root, env=project.environment(), stdout=subprocess.PIPE, text=True) as process:
        wait_until(lambda: list(project.runs.glob("toy/*/*/state.json")), "the first step")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    (run,) = runs_of(output)
    saved = json.loads((run.path / "state.json").read_text())["step"]
    assert process.returncode == 75
    assert f"`crosscoder submit --resume {run.reference}` goes on from there" in output
    assert run.state() == "stopped"
    hold.unlink()
    again = project.crosscoder("submit", "--resume", run.reference)
    assert f"hello from {run.code / 'pipeline/stages/toy.py'} at step {saved}" in again.stdout
    assert finished(run)
    assert project.crosscoder("logs", run.reference).stdout.count("hello from") == 2  # all attempts, those at the terminal too


def test_a_finished_run_is_not_run_again_by_resuming_it(project: ToyProject) -> None:
    (run,) = runs_of(project.crosscoder("run", project.config()).stdout)
    done = project.crosscoder("submit", "--resume", run.reference)
    assert done.returncode == 1
    assert f"has finished; `crosscoder rerun {run.reference}` does it again, as a new run" in done.stderr
    assert len(run.attempts()) == 2


def test_the_run_of_a_name_that_has_not_finished_is_named_where_its_newest_has(project: ToyProject) -> None:
    assert project.crosscoder("run", project.config(), "fail_at=1").returncode == 1
    (failed,) = [RunDirectory(path) for path in (project.runs / "toy/toy").iterdir()]
    (run,) = runs_of(project.crosscoder("run", project.config()).stdout)
    said = project.crosscoder("submit", "--resume", "toy/toy").stderr
    assert said.startswith(f"crosscoder: {run.reference} has finished; `crosscoder rerun {run.reference}` does it again")
    assert said.endswith(f"; {failed.reference} has not (failed): `crosscoder submit --resume {failed.reference}` goes on with it\n")


def test_what_comes_later_of_a_chain_at_a_terminal_is_said_to_wait_as_long_as_that_works(project: ToyProject) -> None:
    hold = project.hold()
    project.config("first", hold=hold, resources="{array_tasks: 2}", output="data/first")
    project.config("second", data="data/first", output="data/second")
    project.config("third", data="data/second")
    command = [sys.executable, "-P", "-m", "slurm", "submit", "first.yaml", "second.yaml", "third.yaml", "--executor", "debug"]
    with subprocess.Popen(command, cwd=project.root, env=project.environment(), stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: any("at step" in log.read_text() for log in project.runs.glob("toy/first/*/tasks/0/log/*")), "the start")
            rows = {(row["name"], row["task"] or 0): row for row in json.loads(project.crosscoder("jobs", "--json").stdout)}
            assert rows["first", 0]["state"] == "running"
            names = {name: project.only_run(name).name for name in ("first", "second")}
            assert {key: (row["state"], row["reason"]) for key, row in rows.items() if key != ("first", 0)} == {
                ("first", 1): ("waiting", "is starting, or waits for other tasks of its run to end"),
                ("second", 0): ("waiting", f"waits for toy/first/{names['first']}"),
                ("third", 0): ("waiting", f"waits for toy/second/{names['second']}"),
            }
        finally:
            process.kill()
    rows = {row["name"]: row for row in json.loads(project.crosscoder("jobs", "--json").stdout)}
    assert rows["second"]["state"] == "new"


def test_a_rerun_runs_the_old_code_and_a_resumed_run_refuses_changed_code(project: ToyProject) -> None:
    (run,) = runs_of(project.crosscoder("run", project.config(), "fail_at=1").stdout)
    program = project.root / "pipeline/stages/toy.py"
    program.write_text(program.read_text().replace('"hello"', '"edited"'))
    again = project.crosscoder("rerun", run.reference, "fail_at=null")
    assert again.returncode == 0, again.stderr
    assert "hello from" in again.stdout
    frozen = run.code / "pipeline/stages/toy.py"
    frozen.unlink()
    frozen.write_text(program.read_text())
    resumed = project.crosscoder("submit", "--resume", run.reference)
    assert resumed.returncode == 1
    assert "is not the code that was frozen: pipeline/stages/toy.py was changed; submit a new run" in resumed.stderr


def test_a_run_frozen_by_code_that_todays_commands_cannot_start_is_refused_in_one_sentence(project: ToyProject) -> None:
    done = project.crosscoder("run", project.config(fail_at=1))
    run = RunDirectory(project.only_run())
    (run.code / "slurm/execution/worker.py").unlink()
    for command in (("submit", "--resume", str(run.path)), ("rerun", str(run.path))):
        done = project.crosscoder(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{run.reference} was frozen with another version of this code, which has no slurm/execution/worker.py" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_chain_runs_in_order_here_and_what_is_there_is_skipped(project: ToyProject) -> None:
    first = project.config("first", output="data/first", source="text")
    second = project.config("second", data="data/first", output="data/second")
    (project.root / "text").mkdir()
    (project.root / "text/a.jsonl").write_text("{}\n")
    done = project.crosscoder("submit", first, second, "--executor", "debug")
    assert done.returncode == 0, done.stderr
    runs = runs_of(done.stdout)
    assert [run.job()["name"] for run in runs] == ["first", "second"]
    made = json.loads((project.root / "data/first/manifest.json").read_text())["data_id"]
    assert runs[1].inputs()["data"]["data_id"] == made
    again = project.crosscoder("submit", first, second, "--executor", "debug")
    assert again.stdout.count("skipped; ") == 2
    (project.root / "text/b.jsonl").write_text("{}\n")
    with_more_text = project.crosscoder("submit", first, "--executor", "debug")
    assert len(runs_of(with_more_text.stdout)) == 1


def test_what_comes_after_a_failed_run_of_a_chain_is_not_started_and_says_why(project: ToyProject) -> None:
    first = project.config("first", output="data/first", fail_at=0)
    second = project.config("second", data="data/first")
    done = project.crosscoder("submit", first, second, "--executor", "debug")
    assert done.returncode == 1
    run = RunDirectory(project.only_run("second"))
    assert "was not started: toy/first/" in (run.result() or {})["error"]


def test_a_change_may_name_its_stage(project: ToyProject) -> None:
    done = project.crosscoder("run", project.config(), "toy.steps=7", "seed=3")
    (run,) = runs_of(done.stdout)
    assert (run.config_values()["steps"], run.config_values()["seed"]) == (7, 3)


def test_a_change_that_only_some_stages_of_a_chain_have_is_refused_with_the_way_to_write_it(project: ToyProject) -> None:
    count = project.root / "count.yaml"
    count.write_text("stage: count\nname: c\ntokens: data/t\n")
    done = project.crosscoder("submit", project.config(), "count.yaml", "splits=[a]", "--executor", "debug")
    assert done.returncode == 1
    assert done.stderr == "crosscoder: toy.yaml: splits is not a setting of toy; write `count.splits=[a]`, which changes that stage alone\n"


def test_the_name_of_a_run_is_bound_to_its_newest_finished_run(project: ToyProject) -> None:
    (made,) = runs_of(project.crosscoder("run", project.config("made")).stdout)
    project.crosscoder("run", project.config("made"), "fail_at=0")
    (reader,) = runs_of(project.crosscoder("run", project.config("reader", source="runs/toy/made")).stdout)
    assert reader.config_values()["source"] == str(made.path)
    none = project.crosscoder("run", project.config("reader", source="runs/toy/other"))
    assert "but no run of toy/other has finished; run it first, or submit both in one chain" in none.stderr


# -- local ------------------------------------------------------------------------------------------------------------


def test_a_local_job_runs_the_frozen_code_though_everything_is_edited_after_the_submission(project: ToyProject) -> None:
    first = project.config("first", output="data/first", steps=10, step_seconds=0.1)
    second = project.config("second", data="data/first")
    done = project.crosscoder("submit", first, second, "--executor", "local")
    assert done.returncode == 0, done.stderr
    program = project.root / "pipeline/stages/toy.py"
    program.write_text("broken(")
    (project.root / "second.yaml").write_text("broken")
    runs = runs_of(done.stdout)
    wait_until(lambda: all(finished(run) for run in runs), "the chain")
    assert f"hello from {runs[1].code / 'pipeline/stages/toy.py'} at step 0" in runs[1].log_files()[0].read_text()
    logs = project.crosscoder("logs", runs[1].reference, "--follow")
    assert "at step 0" in logs.stdout


def test_a_changed_config_code_data_or_package_stops_a_job_with_a_sentence_that_names_it(project: ToyProject) -> None:
    (maker,) = runs_of(project.crosscoder("run", project.config("maker", output="data/made")).stdout)
    assert finished(maker)
    reader = project.config("reader", data="data/made", fail_at=0)

    def spoilt(spoil: Callable[[RunDirectory], object]) -> str:
        (run,) = runs_of(project.crosscoder("run", reader).stdout)
        spoil(run)
        done = project.crosscoder("submit", "--resume", run.reference)
        assert done.returncode == 1
        return done.stderr

    def edit(path: Path, old: str, new: str) -> None:
        text = path.read_text()
        assert old in text
        path.unlink()
        path.write_text(text.replace(old, new))

    assert "config.yaml was changed after it was frozen" in spoilt(lambda run: edit(run.path / "config.yaml", "steps: 3", "steps: 4"))
    said = spoilt(lambda run: edit(run.path / "environment.json", '"numpy": "', '"numpy": "0.'))
    assert re.search(r"the environment is not the one .*: numpy was 0\.[\d.]+, is [\d.]+; restore it, or submit a new run", said)
    said = spoilt(lambda run: project.crosscoder("run", project.config("maker", output="data/made2"), "steps=5"))
    assert "as it was told" in said
    manifest = project.root / "data/made/manifest.json"
    other = records.with_checksum(records.read_json(manifest) | {"data_id": "00" * 32})
    said = spoilt(lambda run: records.write_json(manifest, other))
    assert re.search(r"data \(.*/data/made\) had data id [0-9a-f]{12}, has 00[0-9a-f]{10}: the data changed", said)


def test_an_array_works_locally_a_few_at_a_time_and_resumes_what_is_missing(project: ToyProject) -> None:
    config = project.config(steps=2, step_seconds=0.3)
    done = project.crosscoder("submit", config, "resources.array_tasks=3", "resources.max_parallel=2", "--executor", "local")
    (run,) = runs_of(done.stdout)
    wait_until(lambda: finished(run), "the array")
    assert [(run.result(task) or {})["result"]["task"] for task in range(3)] == [0, 1, 2]
    moments = sorted((line["time"], 1 if line["event"] == "start" else -1) for task in range(3) for line in run.attempts(task))
    assert max(itertools.accumulate(change for _, change in moments)) <= 2
    (log,) = run.path.glob("submitit/*_0_log.out")
    cores = len(os.sched_getaffinity(0))
    assert f"3 tasks, {min(2, cores)} at a time, OMP_NUM_THREADS=1" in log.read_text()
    wait_until(lambda: not Path(f"/proc/{run.job()['jobs'][0]['id']}").exists(), "the controller's end")
    (run.task_directory(1) / "result.json").unlink()
    again = project.crosscoder("submit", "--resume", run.reference)
    assert "1 of 3 tasks" in again.stdout
    wait_until(lambda: finished(run), "the task")
    assert [len(run.attempts(task)) for task in range(3)] == [2, 4, 2]


def test_the_sites_setup_lines_hold_for_a_local_job_and_a_failing_one_is_said(project: ToyProject) -> None:
    program = project.root / "pipeline/stages/toy.py"
    program.write_text(program.read_text().replace('"task": run.task', '"module": os.environ.get("LOADED"), "task": run.task'))
    (project.root / "configs").mkdir()
    site = project.root / "configs/site.yaml"
    site.write_text('setup: ["echo loading", "export LOADED=\'a module\'"]\n')
    (run,) = runs_of(project.crosscoder("submit", project.config(), "--executor", "local").stdout)
    wait_until(lambda: finished(run), "the job")
    assert (run.result() or {})["result"]["module"] == "a module"
    site.write_text('setup: ["echo no such module >&2; false", "export LOADED=no"]\n')
    done = project.crosscoder("submit", project.config("second"), "--executor", "local")
    assert done.returncode == 1
    assert 'setup lines exited 1: "no such module"' in done.stderr
    assert not list(project.runs.glob("toy/second/*"))


def test_a_local_job_is_told_to_stop_before_its_time_limit(project: ToyProject) -> None:
    (run,) = runs_of(project.crosscoder("run", project.config(), "fail_at=0", "step_seconds=0.2").stdout)
    # Seconds: the process must have begun, on a busy machine too, before it is told to stop.
    program = "import sys; from slurm.execution.local_queue import LocalQueue; LocalQueue(sys.argv[1], [0], 1, [], 8.0)()"
    values = (run.path / "config.yaml").read_text().replace("fail_at: 0", "fail_at: null").replace("steps: 3", "steps: 1000")
    (run.path / "config.yaml").write_text(values)
    run.write_job(run.job() | {"config_hash": records.hash_file(run.path / "config.yaml")})
    environment = project.environment() | {"PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", program, str(run.path)], env=environment, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 75
    assert {key: (run.result() or {})[key] for key in ("status", "error")} == {"status": "stopped", "error": "SIGUSR2"}


def test_a_run_that_waits_for_one_that_failed_gives_up_with_the_reason(project: ToyProject) -> None:
    first = project.config("first", output="data/first", fail_at=0)
    second = project.config("second", data="data/first")
    done = project.crosscoder("submit", first, second, "--executor", "local")
    runs = runs_of(done.stdout)
    wait_until(lambda: runs[1].state() == "failed", "the second run's end")
    assert (runs[1].result() or {})["error"] == f"not started: {runs[0].reference}, which it waited for, did not finish (failed)"


def test_a_full_log_disk_costs_log_lines_and_not_the_run(project: ToyProject) -> None:
    (run,) = runs_of(project.crosscoder("run", project.config(), "fail_at=1").stdout)
    (run.path / "log/77.log").symlink_to("/dev/full")
    job = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "77", "SUBMITIT_LOCAL_NTASKS": "1"}
    job |= {"SUBMITIT_LOCAL_GLOBALID": "0", "PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-u", "-m", "slurm.execution.local_queue", str(run.path), "0"]
    done = subprocess.run(command, env=project.environment() | job, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 1, done.stderr
    assert (run.result() or {})["error"] == "the toy fails at step 1, as it was told"


def test_a_run_may_wait_for_one_that_was_submitted_before(project: ToyProject, hold: Path) -> None:
    first = project.config("first", output="data/first", hold=hold)
    (maker,) = runs_of(project.crosscoder("submit", first, "--executor", "local").stdout)
    second = project.config("second", data="data/first")
    refused = project.crosscoder("submit", second, "--executor", "local")
    assert "data/first does not exist; run the stage that makes it first, or submit both in one chain" in refused.stderr
    done = project.crosscoder("submit", second, "--executor", "local", "--after", maker.reference)
    (reader,) = runs_of(done.stdout)
    hold.unlink()
    wait_until(lambda: finished(reader), "the run that waits")
    assert reader.inputs()["data"]["made_by"] == str(maker.path)


def test_a_second_run_does_not_write_what_another_is_writing(project: ToyProject) -> None:
    config = project.config(output="data/made", steps=250, step_seconds=0.1)
    (run,) = runs_of(project.crosscoder("submit", config, "--executor", "local").stdout)
    second = project.crosscoder("submit", config, "--executor", "local")
    assert second.returncode == 1
    assert f"toy.yaml: {run.reference} is queued or being worked on" in second.stderr
    wait_until(lambda: run.progress(), "the first step")
    os.kill(int(run.job()["jobs"][0]["id"]), signal.SIGTERM)
    wait_until(lambda: run.state() == "stopped", "the stop")


def test_two_processes_on_one_run_one_wins_and_the_other_says_so(project: ToyProject, hold: Path) -> None:
    done = project.crosscoder("submit", project.config(hold=hold), "--executor", "local")
    (run,) = runs_of(done.stdout)
    wait_until(lambda: (run.path / "progress.json").exists(), "the first step")
    environment = project.environment() | {"PYTHONPATH": str(run.code), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "slurm.execution.worker", str(run.path)]
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert second.returncode == 1
    assert "one at a time; wait for it, or cancel it first" in second.stderr
    hold.unlink()
    wait_until(lambda: finished(run), "the first")
    assert len(run.attempts()) == 2


def test_a_killed_process_leaves_a_run_that_can_be_resumed(project: ToyProject, hold: Path) -> None:
    done = project.crosscoder("submit", project.config(hold=hold), "--executor", "local")
    (run,) = runs_of(done.stdout)
    wait_until(lambda: (run.path / "state.json").exists(), "the first step")
    os.kill(run.attempts()[0]["pid"], signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{run.job()['jobs'][0]['id']}").exists(), "the controller's end")
    hold.unlink()
    again = project.crosscoder("submit", "--resume", run.reference)
    assert again.returncode == 0, again.stderr
    wait_until(lambda: finished(run), "the second attempt")
    assert re.findall(r"at step (\d+)", run.log_files()[-1].read_text())[-1] != "0"


# -- what login commands cost -----------------------------------------------------------------------------------------


def test_login_commands_import_neither_torch_nor_transformers(project: ToyProject) -> None:
    project.crosscoder("run", project.config())
    program = (
        "import sys\n"
        "from slurm.commands.command_line import main\n"
        "sys.argv = ['crosscoder', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["show", "toy/toy"], ["logs", "toy/toy"], ["submit", "toy.yaml", "--executor", "local", "--dry-run"]):
        command = [sys.executable, "-P", "-c", program, *arguments]
        done = subprocess.run(command, cwd=project.root, env=project.environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
