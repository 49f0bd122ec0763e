"""`crosscoder sweep` and `crosscoder results`: one array over varied fields, and what came of it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.config.site_file import load_site
from slurm.commands.run_commands import Executor, check_executor, show_dry_run
from slurm.record.printable import print

if TYPE_CHECKING:
    from slurm.record.run_directory import RunDirectory


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("sweep")(sweep)
    app.command("results")(results)


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep's file, for example configs/sweeps/demo-decoder-norm.yaml.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to every task; name=NAME renames the sweep.")
    ] = None,
    executor: Annotated[
        Executor, typer.Option(help="slurm; local: processes of this machine, as its cores allow; debug: this process, one task at a time.")
    ] = Executor.slurm,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all that a submission does, list the tasks, queue nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Freeze a sweep and queue it as one array, a directory a task."""
    from slurm.commands.command_line import print_json
    from slurm.record import backlog
    from slurm.record.activity import one_submission_at_a_time
    from slurm.record.text_table import number_of
    from slurm.submission import input_preflight, model_preflight, preflight
    from slurm.submission import sweep as sweeps
    from slurm.submission.foreground import run_here
    from slurm.submission.freezing import Freezer, Planned

    check_executor(executor, {}, prints_json=as_json and not dry_run)
    site = load_site()
    read = sweeps.read_sweep(file, changes or [], site)
    sweeps.check_inputs_are_there(read, file, site.runs)
    input_preflight.check([(f"{file}: task {number}", config) for number, config in enumerate(read.stage_configs)], site.runs)
    limits = input_preflight.notices([(str(file), config) for config in read.stage_configs])
    for notice in [*model_preflight.notices(read.stage_configs), *limits]:
        print(notice, file=sys.stderr)
    cluster = preflight.check([(str(file), read.stage_configs[0])]) if executor is Executor.slurm else None
    with one_submission_at_a_time(site.runs):
        run = sweeps.freeze_sweep(read, Freezer(site, executor=executor.value), where=str(file), cluster=cluster)
        planned = [Planned(read.stage_configs[0], run, None, [])]
        if dry_run:
            tasks = [f"task {number}: {sweeps.describe(member)}" for number, member in enumerate(read.members)]
            show_dry_run(planned, site, as_json=as_json, heading=tasks)
            return
        if executor is not Executor.debug:
            _queue(run, site.runs)
    if executor is Executor.debug:
        run_here(planned)
        return
    identities, waiting = [entry["id"] for entry in run.job()["jobs"]], backlog.in_words(run)
    if as_json:
        row = {"stage": "sweep", "name": read.config.name, "run": str(run.path), "jobs": identities, "tasks": run.num_tasks}
        print_json(row | ({"not_queued": waiting} if waiting else {}))
        return
    print(f"run {run.path}\njob {' '.join(map(str, identities))}: {number_of(run.num_tasks, 'task')}")
    if waiting:
        print(waiting)


def _queue(run: "RunDirectory", runs: Path) -> None:
    """Queues the tasks; nothing stays of a run of which the queue took none."""
    from slurm.execution import executor, waves
    from slurm.record import backlog, snapshot

    waves.queue_first(runs)
    try:
        executor.launch(run, range(run.num_tasks))
    except BaseException:
        if not run.job()["jobs"] and not backlog.tasks_of(run):
            snapshot.remove(run.path)
        raise


def results(
    reference: Annotated[str, typer.Argument(metavar="RUN", help="A sweep's run: path, sweep/name (its newest), id or job id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Collect a sweep's results as far as they are there, best first: a table, results.csv and results.png."""
    from slurm.commands.command_line import print_json, print_lines, terminal_width
    from slurm.record.run_reference import find
    from slurm.submission import sweep_results
    from slurm.watching import job_listing, sweep_figure, sweep_table

    run = find(reference, load_site().runs).whole("results")
    rows = sweep_results.gather(run, {task: state for task, (state, _) in job_listing.standing_of(run).items()})
    values = run.config_values()
    metric, maximize, wished = values["metric"], values["maximize"], values.get("columns", [])
    varied = sweep_results.varied_fields(values["members"])
    sweep_results.write_csv(rows, run.path / "results.csv")
    picture = run.path / "results.png"
    drawn = metric is not None and sweep_figure.draw(rows, varied, metric, picture, title=run.reference, maximize=maximize, columns=wished)
    if as_json:
        print_json(rows)
        return
    table = sweep_table.table(rows, varied, sweep_table.result_columns(rows, varied, metric, wished), terminal_width())
    print_lines([sweep_table.summary(run.reference, rows, metric, maximize=maximize), "", *table.lines, ""])
    if table.left_out:
        print(f"no room for {', '.join(table.left_out)}; results.csv has all columns")
    print(run.path / "results.csv", *([picture] if drawn else []), sep="\n")
