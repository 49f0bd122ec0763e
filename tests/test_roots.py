"""One root for data and for runs, the same from every directory: the clone's, or what its site file says."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from toy_project import ToyProject
from waiting import finished, wait_until

from pipeline.config import load
from pipeline.demo import standard_library_text
from slurm.record.run_directory import RunDirectory


@pytest.fixture
def project(tmp_path: Path) -> ToyProject:
    root = tmp_path / "clone"
    root.mkdir()
    return ToyProject(root)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere/configs").mkdir(parents=True)
    (tmp_path / "elsewhere/configs/site.yaml").write_text("runs: not-these\n")  # of another project
    return tmp_path / "elsewhere"


def names_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def roots(project: ToyProject, cwd: Path, **variables: str) -> dict[str, str]:
    found = json.loads(project.crosscoder("doctor", "--json", cwd=cwd, SLURM_CONF="/nowhere/slurm.conf", **variables).stdout)
    return {finding["subject"]: finding["fact"] for finding in found}


def test_a_run_submitted_in_any_directory_lies_in_the_clone_and_is_listed_from_any_other(project: ToyProject, elsewhere: Path) -> None:
    config = project.config(output="'{data}/numbers'")
    before = names_in(elsewhere)
    done = project.crosscoder("submit", str(project.root / config), "--executor", "local", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    run = RunDirectory(project.only_run())
    wait_until(lambda: finished(run), "the run")
    assert (project.root / "data/numbers/manifest.json").is_file()
    assert names_in(elsewhere) == before
    listed = [project.crosscoder("jobs", "--json", cwd=cwd).stdout for cwd in (project.root, elsewhere, Path("/"))]
    assert [json.loads(text)[0]["run"] for text in listed] == [run.reference] * 3
    assert project.crosscoder("show", "toy/toy", cwd=elsewhere).returncode == 0


def test_a_config_on_the_command_line_and_a_path_in_a_change_are_relative_to_the_current_directory(
    project: ToyProject, elsewhere: Path
) -> None:
    (elsewhere / "own.yaml").write_text((project.root / project.config()).read_text())
    (elsewhere / "text").write_text("x")
    done = project.crosscoder("run", "own.yaml", "source=text", "output=../made", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    values = RunDirectory(project.only_run()).config_values()
    assert (values["source"], Path(values["output"]).resolve()) == (str(elsewhere / "text"), elsewhere.parent / "made")


def test_the_site_file_of_the_clone_holds_everywhere_and_its_relative_roots_lie_in_the_clone(project: ToyProject, elsewhere: Path) -> None:
    (project.root / "configs").mkdir()
    (project.root / "configs/site.yaml").write_text("runs: my/runs\nssd: /fast\n")
    clone = str(project.root)
    for cwd in (project.root, elsewhere):
        found = roots(project, cwd)
        assert found["site file"] == f"{clone}/configs/site.yaml"
        assert [found[f"{{{name}}}"] for name in ("data", "ssd", "runs")] == [f"{clone}/data", "/fast", f"{clone}/my/runs"]


def test_a_site_file_that_is_named_has_its_relative_roots_in_the_clone_too(project: ToyProject, elsewhere: Path) -> None:
    found = roots(project, elsewhere, CROSSCODER_SITE="configs/site.yaml")
    assert (found["site file"], found["{runs}"]) == (f"{elsewhere}/configs/site.yaml", f"{project.root}/not-these")


def test_doctor_tells_the_roots_where_no_slurm_answers_too(project: ToyProject, elsewhere: Path) -> None:
    found = roots(project, elsewhere)
    assert found["site file"] == f"none; {project.root}/configs/site.yaml would be it"
    assert found["{runs}"] == f"{project.root}/runs"
    assert found["Slurm"] == "no answer"


def python(code: str, path: Path, cwd: Path, project: ToyProject) -> str:
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=project.environment(PYTHONPATH=str(path)), capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_frozen_code_never_takes_its_own_directory_for_the_clone(project: ToyProject, elsewhere: Path) -> None:
    assert project.crosscoder("run", project.config(), cwd=project.root).returncode == 0
    code = project.only_run() / "code"
    asked = "import pipeline; from pipeline.config.site_file import load_site; print(pipeline.__file__, load_site().runs)"
    assert python(asked, code, elsewhere, project) == f"{code}/pipeline/__init__.py {project.root}/runs"


def test_a_package_installed_without_a_clone_takes_the_current_directory(project: ToyProject, elsewhere: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site-packages"
    installed.mkdir()
    for package in ("pipeline", "slurm"):
        (project.root / package).rename(installed / package)
    asked = "from pipeline.config.site_file import load_site; print(load_site().runs)"
    assert python(asked, installed, elsewhere, project) == f"{elsewhere}/not-these"


def test_a_private_cluster_is_the_clones_from_every_directory(project: ToyProject, elsewhere: Path) -> None:
    status = project.crosscoder("cluster", "status", cwd=elsewhere)
    assert f"no cluster runs in {project.root}/.cluster" in status.stderr


def test_the_demos_text_is_written_where_the_demos_configuration_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site.yaml").write_text(f"data: {tmp_path}/big\n")
    monkeypatch.setenv("CROSSCODER_SITE", str(tmp_path / "site.yaml"))
    written: list[Path] = []
    monkeypatch.setattr(standard_library_text, "write", lambda directory, tests: written.append(directory) or [])
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for words in re.findall(r"-m pipeline\.demo\.standard_library_text (.*?)\)?$", makefile, re.MULTILINE):
        monkeypatch.setattr(sys, "argv", ["standard_library_text", *shlex.split(words)])
        standard_library_text.main()
    config = load.load(Path(__file__).parents[1] / "configs/demo/tokenize.yaml")
    assert written == [*config.inputs().values()] * 2
