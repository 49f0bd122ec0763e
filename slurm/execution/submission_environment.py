"""What surrounds a submission through submitit: the environment that it starts from, its terminal, a limit to its time."""

import contextlib
import io
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pipeline import records
from pipeline.config.errors import UserError
from slurm.client import slurm_commands

SETUP_TIMEOUT_S = 120.0
SHELLS_OWN = ("_", "SHLVL", "PWD", "OLDPWD")
"""Variables that every shell sets for itself."""


@contextlib.contextmanager
def clean_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The environment that a submission starts from: without the caller's Slurm variables, with `variables` set.

    A hang-up of the terminal is ignored meanwhile, and so by a process started here, which outlives this one. What
    submitit prints of a failing command is swallowed: the error that it raises holds it too.
    """
    former = dict(os.environ)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    clean = {k: v for k, v in slurm_commands.environment(former).items() if not k.startswith("SUBMITIT_")}
    os.environ.clear()
    os.environ.update(clean | dict(variables))
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.environ.clear()
        os.environ.update(former)
        signal.signal(signal.SIGHUP, hang_up)


def variables_after(setup: Sequence[str]) -> dict[str, str]:
    """What the site's shell lines set or change in the environment: all of them that a process started here can be given.

    Raises `UserError` where one of them fails, as a job of Slurm would.
    """
    if not setup:
        return {}
    before = slurm_commands.environment()
    script = "\n".join(["set -e", "exec 3>&1 1>&2", *setup, "exec env -0 >&3"])
    try:
        done = subprocess.run(["bash", "-c", script], env=before, capture_output=True, timeout=SETUP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the site's setup lines did not end within {SETUP_TIMEOUT_S:g} s: {'; '.join(setup)}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() or "it printed nothing"
        raise UserError(f'the site\'s setup lines exited {done.returncode}: "{said}"; lines: {"; ".join(setup)}')
    pairs = (entry.partition("=") for entry in done.stdout.decode(errors="surrogateescape").split("\0") if entry)
    return {name: value for name, _, value in pairs if before.get(name) != value and name not in SHELLS_OWN}


@contextlib.contextmanager
def detached(log: Path) -> Iterator[None]:
    """A process started in the block reads nothing and prints to `log`: one that outlives this must not hold its pipes open."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(descriptor) for descriptor in range(3)]
    with open(os.devnull, "rb") as nothing, records.open_to_append(log) as file:
        for source, descriptor in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(source.fileno(), descriptor)
    try:
        yield
    finally:
        for descriptor, original in enumerate(kept):
            os.dup2(original, descriptor)
            os.close(original)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` in the block when it takes longer: submitit, which waits for sbatch without a limit, then kills it."""

    def expire(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"no answer within {seconds:g} s; is the controller up?")

    former = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
