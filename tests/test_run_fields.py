"""A run or a sweep's task that a configuration names is found like one on the command line."""

from pathlib import Path

import pytest

from pipeline import records
from pipeline.config import load
from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.commands.run_commands import parse_configs
from slurm.record import run_directory, run_inputs
from slurm.record.run_directory import RunDirectory
from slurm.submission import input_preflight
from slurm.submission.sweep import read_sweep

EVALUATE = str(Path(__file__).parents[1] / "configs/demo/evaluate.yaml")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(runs=tmp_path / "runs", data=tmp_path / "data")


def make(site: Site, stage: str, job_id: str, num_tasks: int) -> RunDirectory:
    """A finished run of train, or sweep over it."""
    run = run_directory.create(site.runs, stage, "x")
    job = {"id": run.id, "stage": stage, "name": "x", "executor": "slurm", "submitted": 0.0, "num_tasks": num_tasks, "after": []}
    run.write_job(job | {"jobs": [{"id": job_id, "tasks": list(range(num_tasks)), "array": num_tasks > 1}]})
    for task in range(num_tasks):
        directory = run.path / "tasks" / str(task) if stage == "sweep" else run.path
        if stage == "sweep":
            directory.mkdir(parents=True)
            RunDirectory(directory).write_job(job | {"stage": "train", "num_tasks": 1, "jobs": []})
        records.write_json(directory / "result.json", {"status": "finished", "started": 0.0, "ended": 1.0 + task, "result": {}})
    return run


def crosscoder(site: Site, given: str) -> Path:
    ((_, config),) = parse_configs([EVALUATE, f"crosscoder={given}"], site)
    return config.inputs()["crosscoder"]


def test_every_form_of_a_tasks_name_is_its_directory(site: Site) -> None:
    run = make(site, "sweep", "1042", 4)
    for given in ("1042_2", "1042/tasks/2", f"sweep/x/{run.id}/tasks/2", f"{run.id[-4:]}/tasks/2", f"{{runs}}/sweep/x/{run.id}/tasks/2"):
        assert crosscoder(site, given) == run.path / "tasks/2", given


def test_every_form_of_a_runs_name_is_its_directory_but_stage_and_name(site: Site) -> None:
    run = make(site, "train", "1042", 1)
    for given in ("1042", "1042_0", run.id, run.id[-4:], f"train/x/{run.id[-4:]}", str(run.path)):
        assert crosscoder(site, given) == run.path, given
    assert crosscoder(site, "train/x") == run.path.parent  # what a chain makes later


def test_runs_in_a_list_are_found_too(site: Site) -> None:
    run, sweep = make(site, "train", "1041", 1), make(site, "sweep", "1042", 4)
    given = ["1041", "1042_2", "train/x"]
    ((_, config),) = parse_configs([EVALUATE, f"compare_with={given}".replace("'", '"')], site)
    found = [config.inputs()[f"compare_with[{number}]"] for number in range(3)]
    assert found == [run.path, sweep.path / "tasks/2", run.path.parent]
    with pytest.raises(UserError, match=rf"^{EVALUATE}: compare_with\[1\]: no run under .* was submitted as job 1043"):
        parse_configs([EVALUATE, 'compare_with=["1041", "1043_2"]'], site)


def test_what_names_no_run_or_several_tasks_is_refused_in_one_sentence(site: Site) -> None:
    run = make(site, "sweep", "1042", 4)
    refused = {
        "1043_2": "no run under .* was submitted as job 1043",
        "1042_9": "has 4 tasks, 1042_0 to 1042_3, not 9",
        "1042": f"is {run.reference}, which has tasks 0 to 3; name one: {run.reference}/tasks/0",
        str(run.path): f"is {run.reference}, which has tasks 0 to 3",
        "sweep/x": f"is {run.reference}, which has tasks 0 to 3; name one: {run.reference}/tasks/0",
        str(run.path.parent): f"is {run.reference}, which has tasks 0 to 3",
        "sweep/y": "no run is called 'sweep/y'",
        "zzzz": "no run is called 'zzzz'",
    }
    for given, sentence in refused.items():
        with pytest.raises(UserError, match=rf"^{EVALUATE}: crosscoder:? .*{sentence}|^{EVALUATE}: crosscoder {sentence}"):
            crosscoder(site, given)


def test_a_sweep_over_the_tasks_of_another_reads_each_from_its_own(site: Site, tmp_path: Path) -> None:
    run = make(site, "sweep", "104", 4)
    (tmp_path / "s.yaml").write_text(f"name: s\nbase: {EVALUATE}\ngrid:\n  crosscoder: [104_0, 104_3]\n")
    read = read_sweep(tmp_path / "s.yaml", [], site)
    assert [config.inputs()["crosscoder"] for config in read.stage_configs] == [run.path / "tasks/0", run.path / "tasks/3"]


def test_a_task_is_an_input_by_its_own_results(site: Site) -> None:
    run = make(site, "sweep", "1042", 4)
    one, other = (run_inputs.describe(crosscoder(site, given)) for given in ("1042_1", "1042_2"))
    assert (one["kind"], one["run"]) == ("run", f"{run.reference}/tasks/1")
    assert one["content"] != other["content"]


def test_a_run_that_holds_no_checkpoint_is_refused_at_submission(site: Site) -> None:
    run = make(site, "train", "7", 1)
    config = load.load(Path(EVALUATE), [f"crosscoder={run.path}"], site)
    (fault,) = [fault for fault in input_preflight.faults_of(config, site.runs) if fault.startswith("crosscoder")]
    assert fault == f"crosscoder is {run.path}, which holds no checkpoint; name a run of train, or one of its checkpoints"
