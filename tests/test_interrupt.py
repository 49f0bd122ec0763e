"""Ctrl-C ends a command with one line and the exit code of shells, from its first import on."""

import os
import signal
import subprocess
import sys

import pytest

from slurm.__main__ import main
from slurm.submission import foreground

WHILE_IMPORTING = """
import signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from slurm.__main__ import main
sys.argv = ["crosscoder", "jobs"]
main()
"""


@pytest.mark.parametrize("name", ["slurm.commands.command_line", "typer", "slurm.watching.job_table"])
def test_ctrl_c_during_an_import_is_one_line(name: str) -> None:
    command = [sys.executable, "-c", WHILE_IMPORTING.format(name=name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, "crosscoder: interrupted\n")


def test_another_end_of_a_command_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["crosscoder", "no-such-command"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "interrupted" not in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_run_that_goes_on_at_a_terminal_keeps_ctrl_c_until_it_can_save(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: is_terminal)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    says = "import signal, sys; sys.exit(3 if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set()) else 0)"
    with foreground._started([sys.executable, "-c", says], os.environ) as process:
        assert process.wait() == (3 if is_terminal else 0)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before
