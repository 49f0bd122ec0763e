"""The tests are the same for whoever runs them, from wherever: what the caller has set, and what he keeps in the clone, plays no part."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import shipped

TESTS = Path(__file__).parent

HOSTILE_LINES = """
    CROSSCODER_SITE=/nowhere/site.yaml SLURM_JOB_ID=7 SLURM_CONF=/nowhere SBATCH_PARTITION=low RANK=1
    HF_HOME=/nowhere HF_HUB_OFFLINE=0 HF_ENDPOINT=http://nowhere TRANSFORMERS_CACHE=/nowhere
    COLUMNS=20 LINES=3 FORCE_COLOR=1 TERM=dumb TZ=Asia/Kathmandu LC_ALL=C LANG=de_DE
    GIT_DIR=/nowhere GIT_CONFIG_GLOBAL=/nowhere PYTHONWARNINGS=ignore PYTHONDONTWRITEBYTECODE=1
"""
HOSTILE = dict(setting.split("=", 1) for setting in HOSTILE_LINES.split())


def as_caller(tmp_path: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Runs a command as a user would whose settings are as disturbing as can be, in the background, with a strict umask."""
    home = tmp_path / "home"
    other = tmp_path / "other clone/pipeline"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise ImportError('another clone')\n")
    hooks = home / "hooks"
    hooks.mkdir(parents=True)
    (hooks / "pre-commit").write_text("#!/bin/sh\nexit 1\n")
    (hooks / "pre-commit").chmod(0o755)
    (home / ".gitconfig").write_text(f"[core]\n\thooksPath = {hooks}\n[commit]\n\tgpgsign = true\n[status]\n\tshowUntrackedFiles = no\n")
    (home / "tmp ä").mkdir()
    variables = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home / "tmp ä"), "PYTHONPATH": str(other.parent), **HOSTILE}
    variables["PYTEST_ADDOPTS"] = f"--basetemp={tmp_path / 'base'}"

    def in_the_background() -> None:
        os.umask(0o077)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    return subprocess.run(
        command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120, preexec_fn=in_the_background
    )


def test_what_the_caller_has_set_reaches_no_test(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import isolation; isolation.isolate()\n"
        "import json, os, signal, subprocess, pipeline\n"
        "git = subprocess.run(['git', 'config', '--get', 'core.hooksPath'], capture_output=True, text=True).stdout\n"
        "umask = os.umask(0)\n"
        "interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "print(json.dumps([dict(os.environ), pipeline.__file__, git, umask, interrupts, open(os.devnull).encoding.lower()]))\n"
    )
    done = as_caller(tmp_path, sys.executable, "-c", program, str(TESTS))
    assert done.returncode == 0, done.stderr
    environment, package, git, umask, interrupts, encoding = json.loads(done.stdout)
    assert {name: value for name, value in environment.items() if HOSTILE.get(name) == value} == {}
    assert not {"PYTHONPATH", "PYTEST_ADDOPTS", "GIT_CONFIG_GLOBAL"} & set(environment)
    assert Path(package) == shipped.ROOT / "pipeline/__init__.py"
    assert (git, umask, interrupts, encoding) == ("", 0o022, True, "utf-8")
    assert not Path(environment["HOME"]).exists()  # it went with the process


def test_tests_pass_under_settings_that_disturb_git_python_and_every_path(tmp_path: Path) -> None:
    files = [str(TESTS / name) for name in ("test_snapshot.py", "test_dry_run.py")]
    done = as_caller(tmp_path, sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "not slurm", *files)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_a_user_adds_to_the_clone_is_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    for name in ("configs/demo/train.yaml", "configs/mine/train.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    names = {"configs/demo/train.yaml", "configs/mine/train.yaml"}
    assert {str(path.relative_to(tmp_path)) for path in shipped.files("configs/*/*.yaml")} == names  # an archive without git
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "add", "configs/demo"], check=True)
    assert shipped.files("configs/*/*.yaml") == [tmp_path / "configs/demo/train.yaml"]


@pytest.mark.parametrize("target", ["test", "test-fast", "end-to-end"])
def test_make_says_first_how_long_the_tests_take(target: str) -> None:
    makefile = (shipped.ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(rf"^{target}: .*\n\t(.*)$", makefile, re.M)
    assert recipe
    assert re.match(r'@echo "about \d+ minutes on 2 idle cores', recipe[1])
