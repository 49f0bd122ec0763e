"""A machine without Slurm says loudly which tests it leaves out, and how to get them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.fixture
def without_slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which the test run finds none of Slurm's programs."""
    (tmp_path / "no_slurm.py").write_text("from slurm.cluster import packages\npackages.find = lambda program: None\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_PLUGINS": "no_slurm", "PYTHONDONTWRITEBYTECODE": "1"}


def run_tests(variables: dict[str, str], *options: str) -> "subprocess.CompletedProcess[str]":
    files = [str(TESTS / name) for name in ("test_doctor.py", "test_watch.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slurm", *files, *options]
    return subprocess.run(command, env=variables, cwd=TESTS.parent, capture_output=True, text=True, check=False, timeout=120)


def test_what_is_left_out_is_counted_with_the_packages_and_the_command(without_slurm: dict[str, str]) -> None:
    done = run_tests(without_slurm)
    assert done.returncode == 0, done.stdout
    install = "sudo apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
    counted = re.search(
        r"LEFT OUT: (\d+) tests on a real Slurm, for want of slurmctld, slurmd, slurm-client, munge; get them with: (.*)\n", done.stdout
    )
    assert counted
    assert counted[2] == install
    skipped = re.search(r"(\d+) skipped", done.stdout)
    assert skipped
    assert int(skipped[1]) == int(counted[1]) + 1  # the one that needs accounting besides
    with_accounting = f"{install} slurmdbd mariadb-server slurm-wlm-mysql-plugin"
    assert "LEFT OUT: 1 test on a real Slurm, for want of slurmctld, slurmd, slurm-client, munge, slurmdbd, mariadb-server" in done.stdout
    assert with_accounting in done.stdout


def test_where_slurm_is_required_its_absence_is_a_failure(without_slurm: dict[str, str]) -> None:
    done = run_tests(without_slurm, "--require-slurm")
    assert done.returncode == 4
    assert re.search(r"--require-slurm: \d+ tests on a real Slurm, for want of slurmctld", done.stderr)
