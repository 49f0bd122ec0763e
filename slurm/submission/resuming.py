"""Goes on with a run in its own directory, or makes a new run from an old one's frozen record."""

from collections.abc import Sequence

from pipeline.config import load
from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.execution import executor, waves
from slurm.execution.frozen_code import check_startable
from slurm.record import backlog
from slurm.record.activity import is_busy, one_submission_at_a_time
from slurm.record.printable import print
from slurm.record.run_directory import RunDirectory
from slurm.record.text_table import number_of
from slurm.submission import freezing
from slurm.submission.chain_resuming import Chain


def resume(run: RunDirectory, site: Site) -> None:
    """Queues again what of `run` has not finished, or works on it here if that is how it was started.

    Raises `UserError` when all has finished, or when a task is queued or being worked on: one at a time.
    """
    check_startable(run)
    with one_submission_at_a_time(site.runs):
        left = _unfinished(run)
        chain = Chain(site.runs)
        chain.check_needed(run)
        behind = chain.behind(run)
        if run.job()["executor"] not in ("run", "debug"):
            for task in left:
                (run.task_directory(task) / "result.json").unlink(missing_ok=True)
            entries = executor.launch(run, left)
            waves.queue_first(site.runs)
            ids = " ".join(str(entry["id"]) for entry in entries)
            num_queued = sum(len(entry["tasks"]) for entry in entries)
            print(f"run {run.path}\njob {ids}: {num_queued} of {number_of(run.num_tasks, 'task')}", flush=True)
            if waiting := backlog.in_words(run):
                print(waiting, flush=True)
            if behind:
                print("what needs it did not run; resume that too, in this order:", *map(_command, behind), sep="\n", flush=True)
            return
    from slurm.submission.foreground import run_frozen_here

    print(f"run {run.path}", flush=True)
    raise SystemExit(run_frozen_here(run, left))


def _command(run: RunDirectory) -> str:
    return f"  crosscoder submit --resume {run.reference}"


def _unfinished(run: RunDirectory) -> list[int]:
    job = run.job()
    left = [task for task in range(job["num_tasks"]) if run.task_state(task) != "finished"]
    if not left:
        raise UserError(f"{run.reference} has finished; `crosscoder rerun {run.reference}` does it again, as a new run")
    if busy := [task for task in left if is_busy(run, task)]:
        held = ", ".join(f"task {task}" for task in busy[:5]) if job["num_tasks"] > 1 else "it"
        raise UserError(f"{run.reference}: {held} is {_where(run, busy[0])}; wait for it, or cancel it first")
    return left


def _where(run: RunDirectory, task: int) -> str:
    job_id = run.job_of_task(task)
    return f"queued or being worked on as job {job_id}" if job_id else "being worked on by a process that was started here"


def freeze_again(origin: RunDirectory, changes: Sequence[str], executor_name: str, site: Site) -> RunDirectory:
    """A new run with the configuration and the frozen code of `origin`, its inputs checked to be the same; not queued yet."""
    if origin.stage == "sweep":
        raise UserError(
            f"{origin.reference} is a sweep, which can't be run again as it was: `crosscoder sweep` with its file makes a new one, "
            f"`crosscoder submit {origin.path}/tasks/0/config.yaml` runs one task of it again"
        )
    values = origin.config_values()
    for change in changes:
        load.set_value(values, change, where=origin.reference)
    config = load.from_values(values, where=origin.reference, site=site, frozen=origin.config_values())
    return freezing.Freezer(site, executor=executor_name).freeze(config, where=origin.reference, code_of=origin)


def rerun(origin: RunDirectory, changes: Sequence[str], executor_name: str, site: Site) -> None:
    """Makes a run again (see `freeze_again`), and queues it or works on it here."""
    check_startable(origin)
    with one_submission_at_a_time(site.runs):
        run = freeze_again(origin, changes, executor_name, site)
        print(f"run {run.path}", flush=True)
        if executor_name not in ("run", "debug"):
            entries = executor.launch(run, range(run.num_tasks))
            print(f"job {' '.join(str(entry['id']) for entry in entries)}", flush=True)
            if waiting := backlog.in_words(run):
                print(waiting, flush=True)
            return
    from slurm.submission.foreground import run_frozen_here

    raise SystemExit(run_frozen_here(run, range(run.num_tasks)))
