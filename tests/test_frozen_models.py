"""Language models and tokenizers are inputs of a run: bound when it is frozen, and the job works with those or not at all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from model_copies import copy_of_model, put_on_hub
from tiny_models import TEXTS, tiny_gpt2, tiny_token_set, tiny_tokenizer
from toy_project import ToyProject
from waiting import finished, wait_until

from pipeline import model_files, records
from pipeline.config import load
from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from pipeline.text.encoders import make_encoder
from pipeline.text.tokenizer import load_tokenizer
from slurm.execution import frozen_code
from slurm.execution.worker import work
from slurm.record.comparison import compare_runs
from slurm.record.record_view import as_text
from slurm.record.run_directory import RunDirectory
from slurm.record.run_reference import Named
from slurm.submission import input_preflight
from slurm.submission.freezing import Freezer, already_made
from slurm.submission.refreezing import refreeze
from slurm.submission.resuming import freeze_again

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def project(tmp_path: Path) -> ToyProject:
    return ToyProject(tmp_path)


def runs_of(output: str) -> list[RunDirectory]:
    return [RunDirectory(Path(path)) for path in re.findall(r"^run (.*)$", output, re.M)]


def work_again(run: RunDirectory, directory: Path, *, task: int = 0, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Starts the job of a run that has ended once more, from another working directory, as if it had only waited so far."""
    (run.task_directory(task) / "result.json").unlink()
    command = [sys.executable, "-m", "slurm.execution.worker", str(run.path), str(task)]
    environment = os.environ | frozen_code.frozen_variables(run) | variables
    directory.mkdir(exist_ok=True)
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=60)


# -- through the command line, on a stage without torch ---------------------------------------------------------------


def test_a_relative_directory_is_the_same_for_a_job_that_works_elsewhere(project: ToyProject, tmp_path: Path) -> None:
    own = copy_of_model(project.root / "mymodels/llama", b"own weights")
    put_on_hub(tmp_path / "hub", "mymodels/llama", OLD, weights=b"those of the hub")
    config = project.config(language_model="{model: mymodels/llama}")
    done = project.crosscoder("submit", config, "--executor", "local", HF_HUB_CACHE=str(tmp_path / "hub"))
    (run,) = runs_of(done.stdout)
    wait_until(lambda: finished(run), "the job")
    assert run.config_values()["language_model"]["model"] == str(own)
    again = work_again(run, tmp_path / "elsewhere", HF_HUB_CACHE=str(tmp_path / "hub"))
    assert again.returncode == 0, again.stderr
    assert f"the model lies in {own}; started in {tmp_path / 'elsewhere'}" in again.stdout


def test_weights_that_are_replaced_while_the_job_waits_stop_it_and_the_file_is_named(project: ToyProject) -> None:
    model = copy_of_model(project.root / "llama")
    first = project.config("first", steps=3, step_seconds=0.5, output="data/first")
    second = project.config("second", data="data/first", language_model="{model: ./llama}")
    done = project.crosscoder("submit", first, second, "--executor", "local")
    _, waiting = runs_of(done.stdout)
    copy_of_model(model, b"replace")
    wait_until(lambda: waiting.result() is not None, "the second job")
    error = (waiting.result() or {})["error"]
    assert f"language_model ({model}) is another one: model.safetensors was changed; put back what it was, or submit a new run" in error
    copy_of_model(model)
    assert project.crosscoder("submit", "--resume", str(waiting.path)).returncode == 0
    wait_until(lambda: finished(waiting), "the resumed job")


def test_a_branch_that_moves_on_the_hub_while_the_job_waits_does_not_move_the_job(project: ToyProject, tmp_path: Path) -> None:
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    old = put_on_hub(tmp_path / "hub", "meta/llama", OLD)
    config = project.config(language_model="{model: meta/llama}")
    (run,) = runs_of(project.crosscoder("run", config, **hub).stdout)
    new = put_on_hub(tmp_path / "hub", "meta/llama", NEW, weights=b"newer")
    again = work_again(run, tmp_path / "elsewhere", **hub)
    assert f"the model lies in {old}" in again.stdout, again.stderr
    assert run.inputs()["language_model"]["commit"] == OLD
    # A new run takes what the branch is now, a run that is made again what it was.
    (newer,) = runs_of(project.crosscoder("run", config, **hub).stdout)
    assert newer.inputs()["language_model"]["commit"] == NEW
    (rerun,) = runs_of(project.crosscoder("rerun", run.reference, **hub).stdout)
    assert f"the model lies in {old}" in (rerun.path / "log/terminal.log").read_text()
    assert f"the model lies in {new}" in (newer.path / "log/terminal.log").read_text()
    compared = project.crosscoder("compare", run.reference, newer.reference, **hub).stdout
    assert "language_model: model.safetensors" in compared
    (old / "model.safetensors").write_bytes(b"spoilt")
    assert "language_model (meta/llama) is another one: model.safetensors was changed" in work_again(run, tmp_path, **hub).stderr


def test_a_rerun_refuses_a_model_that_is_another_and_compare_and_show_name_it(project: ToyProject) -> None:
    model = copy_of_model(project.root / "llama")
    config = project.config(language_model="{model: llama}")
    (run,) = runs_of(project.crosscoder("run", config).stdout)
    copy_of_model(model, b"replace")
    (later,) = runs_of(project.crosscoder("run", config).stdout)
    for arguments in ((), ("--dry-run",)):
        refused = project.crosscoder("rerun", run.reference, *arguments)
        assert refused.returncode == 1
        assert f"can't be run again as it was: language_model ({model}) is another one: model.safetensors was changed" in refused.stderr
    copy_of_model(project.root / "other", b"other weights")
    assert project.crosscoder("rerun", run.reference, "language_model.model=other").returncode == 0
    compared = project.crosscoder("compare", run.reference, later.reference).stdout
    assert re.search(
        r"inputs\n  language_model +[0-9a-f]{12} +-> [0-9a-f]{12}\n  language_model: model.safetensors +[0-9a-f]{12}", compared
    )
    assert (
        f"language_model: {model} language model {run.inputs()['language_model']['data_id'][:12]}"
        in project.crosscoder("show", run.reference).stdout
    )
    verified = project.crosscoder("verify", run.reference)
    assert verified.returncode == 1
    assert "model.safetensors was changed" in verified.stdout


def test_what_only_the_hub_has_is_bound_as_it_is_first_used_for_all_tasks_and_attempts(project: ToyProject, tmp_path: Path) -> None:
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    config = project.config(language_model="{model: meta/llama}", resources="{array_tasks: 2}")
    (run,) = runs_of(project.crosscoder("submit", config, "--executor", "local", **hub).stdout)
    wait_until(lambda: all(run.result(task) for task in range(2)), "both tasks, which find nothing on the hub")
    assert run.inputs()["language_model"] == {"kind": "language model", "name": "meta/llama", "revision": None}
    old = put_on_hub(tmp_path / "hub", "meta/llama", OLD)
    assert f"the model lies in {old}" in work_again(run, tmp_path / "elsewhere", task=0, **hub).stdout
    bound = run.inputs()["language_model"]
    assert (bound["commit"], list(bound["files"])) == (OLD, ["config.json", "model.safetensors"])
    put_on_hub(tmp_path / "hub", "meta/llama", NEW, weights=b"newer")
    assert f"the model lies in {old}" in work_again(run, tmp_path / "elsewhere", task=1, **hub).stdout
    (old / "model.safetensors").write_bytes(b"spoilt")
    assert "model.safetensors was changed" in work_again(run, tmp_path / "elsewhere", task=0, **hub).stderr


# -- the stages themselves --------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(data=tmp_path / "data", ssd=tmp_path / "data", runs=tmp_path / "runs")


def tokenize_values(tmp_path: Path) -> dict[str, Any]:
    tiny_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    values = {"sources": [str(tmp_path / "text.jsonl")], "output": str(tmp_path / "tokens"), "processes": 1}
    return {"stage": "tokenize", "name": "x", **values, "tokenizer": {"name": str(tmp_path / "tokenizer")}, "encoder": "tokenizers"}


def cache_values(tmp_path: Path) -> dict[str, Any]:
    tiny_gpt2(tmp_path / "model")
    tiny_token_set(tmp_path / "tokens")
    model = {"language_model": {"model": str(tmp_path / "model"), "device": "cpu"}, "layers": ["transformer.h.0"]}
    return {
        "stage": "cache",
        "name": "x",
        "tokens": str(tmp_path / "tokens"),
        "output": str(tmp_path / "acts"),
        "context_tokens": 16,
        **model,
    }


def frozen(values: dict[str, Any], site: Site) -> RunDirectory:
    return Freezer(site, executor="run").freeze(load.from_values(values, where="x.yaml", site=site), where="x.yaml")


def refusal(run: RunDirectory) -> str:
    assert work(run.path, frozen=False) == 1
    return str((run.result() or {})["error"])


def replace_tokenizer(directory: Path) -> None:
    definition = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(definition.replace('"add_prefix_space":false', '"add_prefix_space":true', 1) + " ")


def test_a_tokenizer_that_is_replaced_while_the_job_waits_stops_it(tmp_path: Path, site: Site) -> None:
    values = tokenize_values(tmp_path)
    whole, alone = (frozen(values | {"tokenizer": {"name": str(tmp_path / "tokenizer" / name)}}, site) for name in ("", "tokenizer.json"))
    replace_tokenizer(tmp_path / "tokenizer")
    for run in (whole, alone):
        assert "is another one: tokenizer.json was changed; put back what it was, or submit a new run" in refusal(run)


def test_what_is_replaced_between_the_check_and_the_loading_stops_the_job(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.language_model import LanguageModel
    from pipeline.stages import tokenize_text

    (tmp_path / "t").mkdir()
    (tmp_path / "c").mkdir()
    tokenize, cache = frozen(tokenize_values(tmp_path / "t"), site), frozen(cache_values(tmp_path / "c"), site)
    read, loaded = tokenize_text.load_tokenizer, LanguageModel.load
    monkeypatch.setattr(tokenize_text, "load_tokenizer", lambda *a, **k: [replace_tokenizer(tmp_path / "t/tokenizer"), read(*a, **k)][1])
    monkeypatch.setattr(LanguageModel, "load", lambda c: [tiny_gpt2(tmp_path / "c/model", seed=1), loaded(c)][1])
    assert f"input tokenizer ({tmp_path / 't/tokenizer'}) is not what this run began with: tokenizer.json was changed" in refusal(tokenize)
    assert f"input language_model ({tmp_path / 'c/model'}) is not what this run began with: model.safetensors was changed" in refusal(cache)


def test_a_tokenizer_that_a_process_of_the_job_loads_again_is_the_same_or_refused(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    definition = load_tokenizer(str(tmp_path), revision=None, special_text="token", end_of_text=None)
    assert make_encoder(definition, "transformers").encode(["a"]).lengths.tolist() == [1]
    replace_tokenizer(tmp_path)
    with pytest.raises(UserError, match=f"tokenizer {tmp_path} was changed while it was used; put back what it was"):
        make_encoder(definition, "transformers")


def test_what_a_stage_loaded_is_what_was_frozen_and_a_model_that_is_another_is_made_again(tmp_path: Path, site: Site) -> None:
    values = cache_values(tmp_path)
    config = load.from_values(values, where="x.yaml", site=site)
    run = frozen(values, site)
    entry = run.inputs()["language_model"]
    assert work(run.path, frozen=False) == 0
    assert run.inputs()["language_model"] == entry
    recipe = records.read_json(tmp_path / "acts/recipe.json")
    assert recipe["inputs"]["language_model"] == entry["data_id"]
    assert already_made(config, site.runs)
    tiny_gpt2(tmp_path / "model", seed=1)
    assert already_made(config, site.runs) is None
    now = model_files.language_model_record(tmp_path / "model")["data_id"]
    (fault,) = input_preflight.faults_of(config, site.runs)
    assert f"made with other settings: inputs.language_model was {entry['data_id'][:12]}, now it is {now[:12]}; choose another" in fault


def test_every_one_of_several_models_is_frozen_and_none_may_change(tmp_path: Path, site: Site) -> None:
    values = cache_values(tmp_path)
    base, chat = values.pop("language_model"), {"model": str(tiny_gpt2(tmp_path / "chat", seed=1)), "device": "cpu"}
    values |= {"language_models": {"base": base, "chat": chat}, "layers": ["base/transformer.h.0", "chat/transformer.h.0"]}
    run, waiting = frozen(values, site), frozen(values | {"name": "waits"}, site)
    assert run.inputs().keys() == {"tokens", "language_models.base", "language_models.chat"}
    assert work(run.path, frozen=False) == 0
    recipe = records.read_json(tmp_path / "acts/recipe.json")
    hashes = {name: run.inputs()[f"language_models.{name}"]["data_id"] for name in ("base", "chat")}
    assert recipe["inputs"].items() >= {f"language_models.{name}": value for name, value in hashes.items()}.items()
    assert records.read_manifest(tmp_path / "acts")["language_models"] == hashes
    assert len(set(hashes.values())) == 2
    config = load.from_values(values, where="x.yaml", site=site)
    assert already_made(config, site.runs)
    tiny_gpt2(tmp_path / "chat", seed=2)
    assert f"language_models.chat ({tmp_path / 'chat'}) is another one: model.safetensors was changed" in refusal(waiting)
    (fault,) = input_preflight.faults_of(config, site.runs)
    assert f"inputs.language_models.chat was {hashes['chat'][:12]}, now it is" in fault


def test_weights_that_are_drawn_are_bound_by_the_stage_and_known_again(tmp_path: Path, site: Site) -> None:
    values = cache_values(tmp_path)
    values["language_model"] |= {"random_weights": True}
    (tmp_path / "model/model.safetensors").unlink()
    run = frozen(values, site)
    assert "data_id" not in run.inputs()["language_model"]
    assert work(run.path, frozen=False) == 0
    assert run.inputs()["language_model"]["data_id"] == records.read_json(tmp_path / "acts/recipe.json")["inputs"]["language_model"]
    config = load.from_values(values, where="x.yaml", site=site)
    assert already_made(config, site.runs)
    (tmp_path / "model/config.json").write_text((tmp_path / "model/config.json").read_text().replace("0.02", "0.03"))
    assert already_made(config, site.runs) is None


def test_a_tokenizer_that_is_another_is_not_skipped_and_one_that_moved_is(tmp_path: Path, site: Site) -> None:
    values = tokenize_values(tmp_path)
    run = frozen(values, site)
    assert work(run.path, frozen=False) == 0
    assert run.inputs()["tokenizer"]["data_id"] == records.read_json(tmp_path / "tokens/train/recipe.json")["inputs"]["tokenizer"]
    moved = values | {"tokenizer": {"name": str((tmp_path / "tokenizer").rename(tmp_path / "moved"))}}
    config = load.from_values(moved, where="x.yaml", site=site)
    assert already_made(config, site.runs)
    replace_tokenizer(tmp_path / "moved")
    assert already_made(config, site.runs) is None


def test_a_run_that_waits_compares_with_one_that_ended_by_what_both_know(tmp_path: Path, site: Site) -> None:
    values = tokenize_values(tmp_path)
    ended = frozen(values, site)
    assert work(ended.path, frozen=False) == 0
    assert compare_runs(Named(ended), Named(frozen(values, site)))["inputs"] == []
    replace_tokenizer(tmp_path / "tokenizer")
    names = [row["name"] for row in compare_runs(Named(ended), Named(frozen(values, site)))["inputs"]]
    assert names == ["tokenizer", "tokenizer: tokenizer.json"]


def test_a_change_to_a_run_that_waits_does_not_take_what_lies_there_now(tmp_path: Path, site: Site) -> None:
    run = frozen(cache_values(tmp_path), site)
    before = run.inputs()
    tiny_gpt2(tmp_path / "model", seed=1)
    refreeze(run, ["max_tokens=50"], run.config().resources, site)
    assert run.inputs() == before
    tiny_gpt2(tmp_path / "other", seed=1)
    refreeze(run, [f"language_model.model={tmp_path / 'other'}"], run.config().resources, site)
    assert run.inputs()["language_model"]["name"] == str(tmp_path / "other")
    assert work(run.path, frozen=False) == 0


def test_a_run_made_again_has_the_demos_model_of_its_own_code(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    run = frozen(tokenize_values(tmp_path) | {"tokenizer": {"name": "demo"}}, site)
    assert work(run.path, frozen=False) == 0
    monkeypatch.setattr(model_files, "DEMO_MODEL", tmp_path / "tokenizer")
    again = freeze_again(run, [], "run", site).inputs()["tokenizer"]
    assert again["files"] == run.inputs()["tokenizer"]["files"]
    assert "data_id" not in again  # other versions of the libraries may find another


def test_a_run_is_shown_with_its_model(tmp_path: Path, site: Site) -> None:
    run = frozen(cache_values(tmp_path), site)
    identity = run.inputs()["language_model"]["data_id"]
    assert f"language_model: {tmp_path / 'model'} language model {identity[:12]}" in as_text(run)


def test_a_model_on_the_hub_is_loaded_at_the_commit_that_was_frozen(tmp_path: Path) -> None:
    """With transformers itself, which reads where its cache is as it is imported."""
    hub, new = tmp_path / "hub", tmp_path / "hub/models--meta--llama/snapshots" / NEW
    tiny_gpt2(put_on_hub(hub, "meta/llama", OLD))
    (tmp_path / "x.yaml").write_text(json.dumps(cache_values(tmp_path) | {"language_model": {"model": "meta/llama", "device": "cpu"}}))
    program = (
        "import shutil, sys; from pathlib import Path; from pipeline.config import load; from pipeline.config.site_file import Site;"
        "from slurm.submission.freezing import Freezer; from slurm.execution.worker import work;"
        "site = Site(runs=Path(sys.argv[1]) / 'runs'); config = load.load(Path(sys.argv[1]) / 'x.yaml', site=site);"
        "run = Freezer(site, executor='run').freeze(config, where='x');"
        "hub = Path(sys.argv[1]) / 'hub/models--meta--llama'; (hub / 'refs/main').write_text(sys.argv[2]);"
        "raise SystemExit(work(run.path, frozen=False))"
    )
    tiny_gpt2(new, seed=1)
    environment = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), NEW], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = model_files.language_model_record(hub / "models--meta--llama/snapshots" / OLD)["data_id"]
    assert records.read_json(tmp_path / "acts/recipe.json")["inputs"]["language_model"] == expected
