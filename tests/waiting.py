"""How tests wait for other processes: until something holds, or until patience ends with a sentence."""

import time
from collections.abc import Callable

from slurm.record.run_directory import RunDirectory

PATIENCE_SECONDS = 60.0


def wait_until(holds: Callable[[], object], what: str, *, patience_seconds: float = PATIENCE_SECONDS, poll_seconds: float = 0.05) -> None:
    """Returns once `holds()` is true; fails with `what` was waited for when `patience_seconds` are over."""
    deadline = time.monotonic() + patience_seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {patience_seconds} s"
        time.sleep(poll_seconds)


def finished(run: RunDirectory) -> bool:
    return run.state() == "finished"


def at_step(run: RunDirectory, step: int) -> bool:
    progress = run.progress()
    return progress is not None and progress["step"] >= step
