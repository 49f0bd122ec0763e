"""What a job runs: take up one task of a frozen run, check that nothing changed since, run the stage, record the end.

`python -m slurm.execution.worker DIRECTORY [TASK]`, with `code/` of the run directory first on `PYTHONPATH`, is a whole job; the
executors start the same through submitit. Whatever happens, the run directory tells: a line in attempts.jsonl when the
task is taken up and when it is left, and result.json when it ends by itself, sealed (see `slurm.record.seal`) if it finished.
"""

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pipeline
from pipeline import records
from pipeline.config import load
from pipeline.config.errors import UserError, sentence_of
from pipeline.config.pretrained import at_commits
from pipeline.config.stage import StageConfig
from pipeline.run import Run, Stopped, duration
from slurm.execution import job_process
from slurm.execution.requeue import go_on_later, place
from slurm.execution.terminal import OutputThatMayBeLost, logged_to, print_any_letter
from slurm.record import environment, run_inputs, seal, snapshot
from slurm.record.holder import Holder
from slurm.record.known_hashes import KnownHashes
from slurm.record.output_writer import only_writer
from slurm.record.printable import print
from slurm.record.run_directory import RunDirectory, append_line

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
USER_ERROR_CODE, CRASH_CODE, STOPPED_CODE = 1, 70, 75
"""Exit codes of a task: the user's input; an error of the program (EX_SOFTWARE); stopped, to be continued (EX_TEMPFAIL)."""


class Ending(NamedTuple):
    """How an attempt ended."""

    status: str
    exit_code: int
    error: str | None = None
    result: dict[str, Any] | None = None


def work(directory: Path, task: int = 0, *, frozen: bool = True, interactive: bool = False) -> int:
    """Runs one task of the run in `directory` and gives the exit code; 0 if it had finished before.

    frozen : check that the code running is the run's `code/`. False where a run was frozen by this very process.
    interactive : Ctrl-C asks the stage to save and stop, a second one ends it at once.
    """
    run = RunDirectory(directory)
    here = run.task_directory(task)
    result = run.result(task)
    if result is not None and result["status"] == "finished":
        print(f"{run.reference} task {task} finished before; nothing to do", flush=True)
        return 0
    process = job_process.this_process()
    try:
        with Holder(here, job=process.job, restart=process.restart):
            return _attempt(run, task, process, frozen=frozen, interactive=interactive)
    except (UserError, OSError) as error:  # somebody else holds it, or the disk is too full for the record of the attempt
        sentence = str(error) if isinstance(error, UserError) else sentence_of(error)
        if sentence is None:
            raise
        print(f"crosscoder: {sentence}", file=sys.stderr, flush=True)
        return USER_ERROR_CODE


def _attempt(run: RunDirectory, task: int, process: job_process.Process, *, frozen: bool, interactive: bool) -> int:
    here = run.task_directory(task)
    started = time.time()
    identity = {"job": process.job, "restart": process.restart}
    begin = {"event": "start", "time": started, **identity, "host": socket.gethostname(), "pid": os.getpid(), **environment.gpus()}
    view = _view(run, task, here)
    with _stop_on_signals(view, interactive=interactive), threads_say_what_can_be_mended():
        append_line(here / "attempts.jsonl", {**begin, "place": place(run.progress(task))})
        for name in ("result.json", seal.SEAL):  # in this order: what has a result is sealed
            (here / name).unlink(missing_ok=True)
        ending = _guarded(lambda: _run_stage(run, task, view, frozen=frozen))
        if ending.status == "stopped":
            ending = _failure_beside(here, identity) or ending
        if ending.status == "stopped":
            view.say(f"stopped after {duration(time.time() - started)}: {ending.error}; what was done is saved")
        record = {"status": ending.status, "started": started, "ended": time.time(), **identity}
        record |= {"error": ending.error, "result": ending.result}
        if ending.status == "finished":
            record["seal"] = seal.FORMAT
            seal.write(run, task, record)
        records.write_json(here / "result.json", record)
        next_step = "stays as it is"
        if ending.status == "stopped":
            with _children_ignore_signals():
                next_step = go_on_later(run, task, process)
                records.write_json(here / "result.json", record | {"next": next_step})
            view.say(next_step)
        append_line(here / "attempts.jsonl", {"event": "end", "time": time.time(), **identity, "status": ending.status, "next": next_step})
    return ending.exit_code


def _guarded(stage: Callable[[], dict[str, Any]]) -> Ending:
    """Calls `stage` and says how it ended; an error goes to the log, a user's in one sentence, any other with its traceback."""
    try:
        return Ending("finished", 0, result=stage())
    except Stopped as stopped:
        return Ending("stopped", STOPPED_CODE, error=str(stopped))
    except Exception as error:
        sentence = str(error) if isinstance(error, UserError) else sentence_of(error) if isinstance(error, OSError) else None
        if sentence is not None:
            print(f"crosscoder: {sentence}", file=sys.stderr, flush=True)
            return Ending("failed", USER_ERROR_CODE, error=sentence)
        traceback.print_exc()
        sys.stderr.flush()
        return Ending("failed", CRASH_CODE, error=f"{type(error).__name__}: {error}")


def _view(run: RunDirectory, task: int, directory: Path) -> Run:
    """What the stage gets. A sweep's tasks are whole stages; another run's divide one."""
    record = run.record_of_task(task)
    place = (0, 1) if run.stage == "sweep" else (task, run.num_tasks)
    return Run(directory, stage=record.stage, task=place[0], num_tasks=place[1], shared=record.path if place[1] > 1 else None)


def _run_stage(run: RunDirectory, task: int, view: Run, *, frozen: bool) -> dict[str, Any]:
    record = run.record_of_task(task)
    config = check_frozen(run, record, frozen=frozen)
    inputs = run_inputs.check_all(run_inputs.bind_commits(record.inputs()), KnownHashes(run.path.parents[2]).hash_file)
    seeded = view.directory / "inputs.json"
    before = records.read_json(seeded) if seeded.exists() else {}
    records.write_json(seeded, {**inputs, **{field: entry for field, entry in before.items() if field not in inputs}})
    view.check_stop()
    program = importlib.import_module(load.STAGES[config.stage].program)
    with only_writer(config.outputs().values(), run, job_process.this_process().job):
        result: dict[str, Any] = program.run(at_commits(config, run_inputs.commits(inputs)), view)
    return result


def check_frozen(run: RunDirectory, record: RunDirectory, *, frozen: bool = True) -> StageConfig:
    """The configuration in `record`, once it, code and environment are found as they were recorded.

    Raises `UserError` naming exactly what differs.
    """
    if frozen:
        imported = Path(pipeline.__file__).resolve()
        if not imported.is_relative_to(run.code.resolve()):
            raise UserError(
                f"{run.reference} runs {imported.parents[1]} instead of its frozen {run.code}: check PYTHONPATH in the site's setup lines"
            )
        snapshot.check(run.path)
        environment.check(records.read_json(run.path / "environment.json"))
    path = record.path / "config.yaml"
    found, recorded = records.hash_file(path), record.job()["config_hash"]
    if found != recorded:
        raise UserError(
            f"{path} was changed after it was frozen (hash {found[:12]}, recorded {recorded[:12]}); change a queued run with "
            "`crosscoder change`, or submit a new one"
        )
    return record.config()


@contextmanager
def _stop_on_signals(view: Run, *, interactive: bool) -> Iterator[None]:
    """While the block runs, the stop signals ask the stage to save and stop; afterwards the former handlers are back.

    Installed inside the job's function, so they replace submitit's, which ignore SIGTERM: all that a preemption, a
    requeue or a node's shutdown sends on a stock cluster.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        view.request_stop(signal.Signals(number).name if number != signal.SIGINT else "Ctrl-C")

    numbers = (*STOP_SIGNALS, signal.SIGINT) if interactive else STOP_SIGNALS
    former = {number: signal.signal(number, ask) for number in numbers}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # blocked until here by `slurm.execution.start_with_signals_kept`
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def threads_say_what_can_be_mended() -> Iterator[None]:
    """While the block runs, a full disk that a thread meets is one sentence; TensorBoard's dies of it, and the stage hears of that."""
    former = threading.excepthook

    def say(failure: threading.ExceptHookArgs) -> None:
        sentence = sentence_of(failure.exc_value) if isinstance(failure.exc_value, OSError) else None
        if sentence is None:
            former(failure)
        else:
            print(f"crosscoder: {sentence}", file=sys.stderr, flush=True)

    threading.excepthook = say
    try:
        yield
    finally:
        threading.excepthook = former


@contextmanager
def _children_ignore_signals() -> Iterator[None]:
    """Lets scontrol and sbatch finish: Slurm sends its SIGTERM, more than once, to every process of a step it ends.

    A program inherits which signals are ignored.
    """
    former = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def work_logged(directory: Path, task: int) -> int:
    """`work`, with all that this process and its children print going to the task's own log."""
    here = RunDirectory(directory).task_directory(task)
    print_any_letter()
    process = job_process.this_process()
    name = process.job + (f"-rank{process.rank}" if process.rank else "")
    with _printing_to(here / "log" / f"{name}.log"):
        job_process.join_group(process, here)
        return work_beside(directory, task, process) if process.rank else work(directory, task)


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Appends to `path` what goes to stdout and stderr, below Python too, while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with records.open_to_append(path) as file:
        _point_output_to(file.fileno(), file.fileno())
    try:
        with contextlib.redirect_stdout(OutputThatMayBeLost(sys.stdout)), contextlib.redirect_stderr(OutputThatMayBeLost(sys.stderr)):
            yield
    finally:
        _point_output_to(*kept)
        for descriptor in kept:
            os.close(descriptor)


def _point_output_to(output: int, errors: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(output, 1)
    os.dup2(errors, 2)


def work_beside(directory: Path, task: int, process: job_process.Process) -> int:
    """Runs the stage as one of the further processes of a multi-process task; the process of rank 0 keeps the records."""
    run = RunDirectory(directory)
    here = run.task_directory(task) / "ranks" / str(process.rank)
    view = _view(run, task, here)
    with _stop_on_signals(view, interactive=False):
        ending = _guarded(lambda: _run_stage(run, task, view, frozen=True))
    if ending.status == "failed":
        records.write_json(here / "failure.json", {"job": process.job, "restart": process.restart, "error": ending.error})
    return 0 if ending.status == "stopped" else ending.exit_code  # a failing exit would take rank 0 down before it has saved


def _failure_beside(here: Path, identity: dict[str, Any]) -> Ending | None:
    """The failure of another process of this task and attempt: why Slurm told this one to stop."""
    for path in sorted((here / "ranks").glob("*/failure.json")):
        failure = records.read_json(path)
        if {key: failure[key] for key in identity} == identity:
            return Ending("failed", CRASH_CODE, error=f"process {path.parent.name}: {failure['error']}")
    return None


def main() -> None:
    """`python -m slurm.execution.worker DIRECTORY [TASK]`: at a terminal, and into the task's log for such attempts."""
    directory, task = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with logged_to(RunDirectory(directory).task_directory(task) / "log" / "terminal.log"):
        code = work(directory, task, interactive=sys.stdin.isatty())
    raise SystemExit(code)


if __name__ == "__main__":
    main()
