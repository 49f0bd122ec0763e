"""Trains a toy crosscoder in processes that are killed, for `test_train_resume.py`.

`python killed_training.py DIRECTORY VARIANT HOW STEP HOW STEP ...` trains DIRECTORY/whole without interruption, then
DIRECTORY/interrupted: one start for each pair, in a forked process that meets its end HOW after STEP steps of its own
(`term`: SIGTERM; `kill`: SIGKILL; `kill-saving`: SIGKILL inside its STEP-th checkpoint or snapshot), and a last one to the end.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what the first optimizer of a process imports: a second that the forked processes need not spend each
from toy_activations import MemorySource, random_activations, train_config

from pipeline.activations.source import ActivationBatch
from pipeline.crosscoder import checkpoint_files
from pipeline.crosscoder.trainer import Trainer
from pipeline.run import Run, Stopped


class DeadlySource(MemorySource):
    """Sends its own process a signal before it gives batch `last + 1`."""

    def __init__(self, signal_number: int, last: int) -> None:
        super().__init__(random_activations(300))
        self.signal_number, self.left = signal_number, last

    def batches(self, **place: int) -> Iterator[ActivationBatch]:
        for batch in super().batches(**place):
            if self.left == 0:
                os.kill(os.getpid(), self.signal_number)
            self.left -= 1
            yield batch


# A snapshot at the step of every checkpoint.
CHECKPOINTS = {"every_tokens": 160, "every_minutes": None, "keep": 3, "history": {"kind": "every_tokens", "tokens": 160}}


def kill_inside_checkpoint(number: int) -> None:
    """The process dies when all files of its `number`-th checkpoint or snapshot are written and only the rename is missing."""
    rename, left = os.rename, [number]

    def dying_rename(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    checkpoint_files.os.rename = dying_rename  # type: ignore[attr-defined]


def start(directory: Path, variant: str, how: str, step: int) -> None:
    source: MemorySource = MemorySource(random_activations(300))
    if how in ("kill", "term"):
        source = DeadlySource(signal.SIGKILL if how == "kill" else signal.SIGTERM, step)
    elif how == "kill-saving":
        kill_inside_checkpoint(step)
    run = Run(directory, stage="train")
    signal.signal(signal.SIGTERM, lambda number, frame: run.request_stop("SIGTERM"))
    try:
        Trainer(train_config(variant, checkpoints=CHECKPOINTS), source, run, torch.device("cpu")).train()
    except Stopped:
        print("stopped")


def main(directory: Path, variant: str, ends: list[tuple[str, int]]) -> None:
    starts = [("whole", "end", 0), *(("interrupted", how, step) for how, step in ends), ("interrupted", "end", 0)]
    for name, how, step in starts:
        process = os.fork()
        if process == 0:
            torch.set_num_threads(1)
            start(directory / name, variant, how, step)
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(process, 0)
        print(name, how, step, "was killed" if os.WIFSIGNALED(status) else f"exited {os.WEXITSTATUS(status)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], list(zip(sys.argv[3::2], map(int, sys.argv[4::2]), strict=True)))
