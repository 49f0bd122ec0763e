"""Fixtures of a private Slurm, and a loud word about the tests that are left out where Slurm's packages are missing."""

import isolation

isolation.isolate()  # before anything reads the caller's settings

# ruff: noqa: E402
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurm.cluster import layout, packages
from slurm.cluster.daemons import PrivateCluster

LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-slurm", action="store_true", help="fail instead of leaving out tests where Slurm's packages are missing")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slurm_accounting: needs slurmdbd and MariaDB besides")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slurm_accounting"):
            item.add_marker("slurm")
    # What waits for Slurm begins first, and what computes fills the time. With --dist loadfile a file is one worker's.
    waiting = {item.path for item in items if item.get_closest_marker("slurm")}
    items.sort(key=lambda item: item.path not in waiting)
    left_out: dict[str, int] = {}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if "slurm" not in marks:
            continue
        missing = packages.missing(accounting="slurm_accounting" in marks)
        if missing:
            names = ", ".join(missing)
            left_out[names] = left_out.get(names, 0) + 1
            item.add_marker(pytest.mark.skip(reason=f"needs {names}"))
    config.stash[LEFT_OUT] = left_out
    if left_out and config.getoption("--require-slurm"):
        raise pytest.UsageError("--require-slurm: " + "; ".join(_sentences(left_out)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for sentence in _sentences(config.stash.get(LEFT_OUT, {})):
        terminalreporter.write_line(f"LEFT OUT: {sentence}", yellow=True, bold=True)


def _sentences(left_out: dict[str, int]) -> list[str]:
    return [
        f"{count} {'test' if count == 1 else 'tests'} on a real Slurm, for want of {names}; "
        f"get them with: {packages.install_command(names.split(', '))}"
        for names, count in left_out.items()
    ]


@pytest.fixture(scope="module")
def start_cluster() -> Iterator[Callable[..., PrivateCluster]]:
    """Starts private clusters (`start_cluster(layout)`) in short directories of their own, and removes them at the module's end."""
    clusters: list[PrivateCluster] = []
    # /tmp and not pytest's own directory: the paths of unix sockets end at 107 bytes.
    root = Path(tempfile.mkdtemp(prefix="private-slurm-", dir="/tmp"))

    def start(chosen: layout.Layout | None = None) -> PrivateCluster:
        cluster = PrivateCluster(root / str(len(clusters)))
        clusters.append(cluster)
        cluster.start(chosen or layout.pretended())
        return cluster

    yield start
    for cluster in clusters:
        cluster.remove()
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., PrivateCluster]) -> Iterator[PrivateCluster]:
    """A private cluster of three nodes with fake GPUs, up for the module's tests; `SLURM_CONF` names it."""
    started = start_cluster()
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(started.configuration)
    yield started
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before
