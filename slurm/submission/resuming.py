"""Goes on with a run in its own directory, or makes a new run from an old one's frozen record."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.config import load
from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from pipeline.config.stage import StageConfig
from slurm.execution import executor, waves
from slurm.execution.frozen_code import check_startable
from slurm.record import backlog
from slurm.record.activity import is_busy, one_submission_at_a_time
from slurm.record.printable import print
from slurm.record.run_directory import AT_A_TERMINAL, RunDirectory, list_runs
from slurm.record.run_reference import Named
from slurm.record.text_table import number_of
from slurm.submission import dry_run, freezing, preflight
from slurm.submission.chain_resuming import Chain
from slurm.submission.run_fields import with_runs_found

Row = dict[str, Any]


class Resumption(NamedTuple):
    """What resuming a run would do."""

    run: RunDirectory
    tasks: list[int]
    """Those to be queued again."""
    behind: list[RunDirectory]
    """The runs that need it and came to rest for it, in the order in which they can be resumed."""

    @property
    def has_queue(self) -> bool:
        """Whether a queue takes the tasks, and not the terminal of whoever resumes them."""
        return self.run.job()["executor"] not in AT_A_TERMINAL


def plan(named: Named, site: Site) -> Resumption:
    """What resuming `named`, a run or one task of it, would do; changes nothing. The caller holds `one_submission_at_a_time`.

    Raises `UserError` when all has finished, or when a task is queued or being worked on: one at a time.
    """
    check_startable(named.run)
    left = _unfinished(named)
    chain = Chain(site.runs)
    chain.check_needed(named.run)
    return Resumption(named.run, left, chain.behind(named.run))


def resume(named: Named, site: Site) -> Row:
    """Queues again what of `named` has not finished, and says what was queued; or works on it here if that is how it was started."""
    with one_submission_at_a_time(site.runs):
        planned = plan(named, site)
        if planned.has_queue:
            return _queue_again(planned, site)
    from slurm.submission.foreground import run_frozen_here

    print(f"run {planned.run.path}", flush=True)
    raise SystemExit(run_frozen_here(planned.run, planned.tasks))


def _queue_again(planned: Resumption, site: Site) -> Row:
    run = planned.run
    for task in planned.tasks:
        (run.task_directory(task) / "result.json").unlink(missing_ok=True)
    entries = executor.launch(run, planned.tasks)
    waves.queue_first(site.runs)
    row = {"stage": run.stage, "name": run.job()["name"], "run": str(run.path), "jobs": [str(entry["id"]) for entry in entries]}
    row |= {"tasks": [task for entry in entries for task in entry["tasks"]], "num_tasks": run.num_tasks}
    row |= {"not_queued": waiting} if (waiting := backlog.in_words(run)) else {}
    return row | {"resume_next": [other.reference for other in planned.behind]}


def as_lines(row: Row) -> list[str]:
    """What `resume` queued, for a terminal."""
    lines = [f"run {row['run']}", f"job {' '.join(row['jobs'])}: {len(row['tasks'])} of {number_of(row['num_tasks'], 'task')}"]
    return [*lines, *([row["not_queued"]] if "not_queued" in row else []), *dry_run.resume_next(row)]


def _unfinished(named: Named) -> list[int]:
    run = named.run
    left = [task for task in named.tasks if run.task_state(task) != "finished"]
    if not left:
        again = f"; `crosscoder rerun {run.reference}` does it again, as a new run" if named.task is None else ""
        raise UserError(f"{named.reference} has finished{again}{_others_unfinished(run)}")
    if busy := [task for task in left if is_busy(run, task)]:
        held = ", ".join(f"task {task}" for task in busy[:5]) if run.num_tasks > 1 else "it"
        raise UserError(f"{run.reference}: {held} is {_where(run, busy[0])}; wait for it, or cancel it first")
    return left


def _others_unfinished(run: RunDirectory) -> str:
    """What else could be meant, where the newest run of a name has finished: the newest of that name that has not and is at rest."""
    others = [other for other in reversed(list_runs(run.path.parents[2], run.stage, run.path.parent.name)) if other != run]
    left = next((other for other in others if other.state() in ("failed", "stopped", "cancelled")), None)
    return f"; {left.reference} has not ({left.state()}): `crosscoder submit --resume {left.reference}` goes on with it" if left else ""


def _where(run: RunDirectory, task: int) -> str:
    job_id = run.job_of_task(task)
    return f"queued or being worked on as job {job_id}" if job_id else "being worked on by a process that was started here"


def check_again(origin: RunDirectory, changes: Sequence[str], executor_name: str, site: Site) -> tuple[StageConfig, str | None]:
    """The configuration that a run made again from `origin` would have, and the name of the cluster that can run it, if Slurm is to."""
    if origin.stage == "sweep":
        raise UserError(
            f"{origin.reference} is a sweep, which can't be run again as it was: `crosscoder sweep` with its file makes a new one, "
            f"`crosscoder submit {origin.path}/tasks/0/config.yaml` runs one task of it again"
        )
    values = origin.config_values()
    for change in changes:
        load.set_value(values, change, where=origin.reference)
    config = load.from_values(values, where=origin.reference, site=site, frozen=origin.config_values())
    config = with_runs_found(config, site.runs, origin.reference)
    return config, preflight.check([(origin.reference, config)]) if executor_name == "slurm" else None


def freeze_again(origin: RunDirectory, changes: Sequence[str], executor_name: str, site: Site) -> RunDirectory:
    """A new run with the configuration and the frozen code of `origin`, its inputs checked to be the same; not queued yet."""
    check_startable(origin)
    config, cluster = check_again(origin, changes, executor_name, site)
    return freezing.Freezer(site, executor=executor_name).freeze(config, where=origin.reference, code_of=origin, cluster=cluster)


def rerun(origin: RunDirectory, changes: Sequence[str], executor_name: str, site: Site) -> None:
    """Makes a run again (see `freeze_again`), and queues it or works on it here."""
    with one_submission_at_a_time(site.runs):
        run = freeze_again(origin, changes, executor_name, site)
        print(f"run {run.path}", flush=True)
        if executor_name not in AT_A_TERMINAL:
            entries = executor.launch(run, range(run.num_tasks))
            print(f"job {' '.join(str(entry['id']) for entry in entries)}", flush=True)
            if waiting := backlog.in_words(run):
                print(waiting, flush=True)
            return
    from slurm.submission.foreground import run_frozen_here

    raise SystemExit(run_frozen_here(run, range(run.num_tasks)))
