"""`crosscoder run`, `submit` and `rerun`: start a stage here, in a process of its own, or in Slurm."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.config import load, yaml_file
from pipeline.config.errors import UserError
from pipeline.config.site_file import Site, load_site
from pipeline.config.stage import StageConfig
from slurm.record.printable import print

if TYPE_CHECKING:
    from slurm.record.run_reference import Named
    from slurm.submission.freezing import Planned


class Executor(StrEnum):
    """Where a submitted run works."""

    slurm = "slurm"
    local = "local"
    debug = "debug"


ConfigArgument = Annotated[list[str], typer.Argument(metavar="CONFIG... [KEY=VALUE...]", help="Configuration files, then changes to them.")]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("run")(run)
    app.command("submit")(submit)
    app.command("rerun")(rerun)


def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A configuration file.")],
    changes: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it.")] = None,
) -> None:
    """Run the stage that CONFIG names, in this process. Ctrl-C saves and stops; twice, it ends at once."""
    from slurm.submission import input_preflight
    from slurm.submission.foreground import run_here
    from slurm.submission.freezing import Freezer

    site = load_site()
    if others := [argument for argument in changes or [] if "=" not in argument]:
        raise UserError(f"{others[0]} is no key=value, and `run` takes one configuration; `submit --executor debug` takes more")
    parsed = parse_configs([config, *(changes or [])], site)
    input_preflight.check(parsed, site.runs)
    planned = Freezer(site, executor="run").plan(parsed, again=True)
    run_here(planned)


def submit(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="CONFIG... [KEY=VALUE...]", help="Configurations, then changes.")] = None,
    executor: Annotated[
        Executor | None, typer.Option(help="slurm; local: a process of its own; debug: this process.", show_default="slurm")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    node: Annotated[str | None, typer.Option(help="Run on this node and no other, in Slurm.")] = None,
    after: Annotated[list[str] | None, typer.Option(metavar="RUN", help="A run to wait for; may be given several times.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with a run, or one task of it: queue again what has not finished.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Run stages whose output is there already, too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be queued, and what differs from the last run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Freeze a run and queue it. Several configurations are a chain: each waits for what it reads, in whatever order they are given.

    In a chain, `train.seed=1` changes the configuration of that stage, `seed=1` all of them.
    """
    from slurm.execution import waves
    from slurm.record.activity import one_submission_at_a_time
    from slurm.record.run_reference import find
    from slurm.submission import chain_order, input_preflight, model_preflight
    from slurm.submission.chain_resuming import Chain
    from slurm.submission.foreground import run_here
    from slurm.submission.freezing import Freezer, outputs_of

    if resume is not None:
        others = {"a configuration": arguments, "--executor": executor, "--partition": partition, "--node": node, "--after": after}
        if given := [name for name, value in (others | {"--again": again}).items() if value]:
            raise typer.BadParameter(f"--resume goes on with the run as it was frozen: give it without {', '.join(given)}")
        _resume(resume, dry_run=dry_run, as_json=as_json)
        return
    if not arguments:
        raise typer.BadParameter("name a configuration, for example configs/demo/train.yaml")
    executor, chosen = executor or Executor.slurm, {"partition": partition, "node": node}
    check_executor(executor, chosen | {"after": after}, prints_json=as_json and not dry_run)
    site = load_site()
    given = [f"resources.{key}={value}" for key, value in chosen.items() if value is not None]
    parsed, moved = chain_order.in_order(parse_configs([*arguments, *given], site), site.runs)
    if moved:
        print("\n".join(moved), file=sys.stderr)
    parents = [find(reference, site.runs).whole("--after") for reference in dict.fromkeys(after or [])]
    Chain(site.runs).check_can_finish(parents, executor.value)
    pending = [path for run in parents for path in (*outputs_of(run), run.path, run.path.parent)]
    input_preflight.check(parsed, site.runs, pending)
    for notice in [*model_preflight.notices([config for _, config in parsed]), *input_preflight.notices(parsed, pending)]:
        print(notice, file=sys.stderr)
    cluster = check_queue(parsed) if executor is Executor.slurm else None
    freezer = Freezer(site, executor=executor.value)
    with one_submission_at_a_time(site.runs):
        planned = freezer.plan(parsed, after=parents, again=again, cluster=cluster)
        if dry_run:
            show_dry_run(planned, site, as_json=as_json)
        elif executor is not Executor.debug:
            waves.queue_first(site.runs)
            queue(planned, as_json=as_json)
    if executor is Executor.debug and not dry_run:
        run_here(planned)


def check_executor(executor: Executor, given: dict[str, Any], *, prints_json: bool) -> None:
    """Refuses the options in `given` that `executor` would not heed, and JSON among what a stage prints."""
    unheeded = {Executor.slurm: (), Executor.local: ("partition", "node"), Executor.debug: ("partition", "node", "after")}[executor]
    if names := [f"--{name}" for name in unheeded if given.get(name)]:
        why = "works here and now" if executor is Executor.debug else "works on this machine"
        raise typer.BadParameter(f"--executor {executor.value} {why}: give it without {', '.join(names)}")
    if prints_json and executor is Executor.debug:
        raise typer.BadParameter("--executor debug prints what its stages print: give it without --json")


def _resume(reference: str, *, dry_run: bool, as_json: bool) -> None:
    from slurm.commands.command_line import print_json
    from slurm.record.activity import one_submission_at_a_time
    from slurm.record.run_directory import AT_A_TERMINAL
    from slurm.record.run_reference import find
    from slurm.submission import dry_run as dry_runs
    from slurm.submission import resuming

    site = load_site()
    named = find(reference, site.runs)
    if dry_run:
        with one_submission_at_a_time(site.runs):
            planned = resuming.plan(named, site)
        row = dry_runs.describe_again(*planned)
        lines = dry_runs.again_as_lines(row)
    else:
        if as_json and named.run.job()["executor"] in AT_A_TERMINAL:
            raise typer.BadParameter(f"{named.run.reference} goes on at this terminal, and prints what its stage prints: leave --json out")
        row = resuming.resume(named, site)
        lines = resuming.as_lines(row)
    print_json([row]) if as_json else print("\n".join(lines), flush=True)


def rerun(
    reference: Annotated[str, typer.Argument(metavar="RUN", help="A run: path, stage/name, id or job id.")],
    changes: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to its configuration.")] = None,
    executor: Annotated[Executor | None, typer.Option(help="Default: the run's own.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be queued, and what differs from RUN.")] = False,
) -> None:
    """Run a run again from its frozen code and configuration, as a new run; the same hardware gives the same bytes."""
    from slurm.record.activity import one_submission_at_a_time
    from slurm.record.run_reference import Named, find
    from slurm.submission import resuming
    from slurm.submission.freezing import Planned

    site = load_site()
    named = find(reference, site.runs)
    if named.task is not None and named.run.stage == "sweep":
        raise UserError(f"{named.reference} is one task; `crosscoder submit {named.record.path}/config.yaml` makes a run of its own of it")
    origin = named.whole("rerun")
    name = executor.value if executor else origin.job()["executor"]
    if not dry_run:
        resuming.rerun(origin, changes or [], name, site)
        return
    with one_submission_at_a_time(site.runs):
        run = resuming.freeze_again(origin, changes or [], name, site)
        show_dry_run([Planned(run.config(), run, None, [])], site, against=Named(origin))


# -- configurations -----------------------------------------------------------------------------------------------


def parse_configs(arguments: Sequence[str], site: Site) -> list[tuple[str, StageConfig]]:
    """Each configuration file among `arguments` with the changes among them laid over it, and its name for messages."""
    from slurm.submission.run_fields import with_runs_found

    files = [argument for argument in arguments if "=" not in argument]
    changes = [argument for argument in arguments if "=" in argument]
    if not files:
        raise UserError("name a configuration file, for example configs/demo/train.yaml")
    for change in changes:
        stage, dot, _ = change.partition("=")[0].partition(".")
        if dot and stage in load.STAGES and all(yaml_file.read(Path(file)).get("stage") != stage for file in files):
            raise UserError(f"the change {change!r} is for the stage {stage}, which none of the configurations is of")
    stages = {file: str(yaml_file.read(Path(file)).get("stage")) for file in files}
    _check_belonging(stages, changes)
    loaded = [(file, load.load(Path(file), _changes_for(stages[file], changes), site)) for file in files]
    return [(file, with_runs_found(config, site.runs, file)) for file, config in loaded]


def _check_belonging(stages: dict[str, str], changes: Sequence[str]) -> None:
    """Raises `UserError` for a change to all stages of a chain that only some of them have, and says how to write it."""
    keys = {stage: load.config_class(stage).model_fields for stage in stages.values() if stage in load.STAGES}
    for change in changes:
        first = change.partition("=")[0].partition(".")[0]
        having = [stage for stage in keys if first in keys[stage]]
        lacking = [file for file, stage in stages.items() if stage in keys and stage not in having]
        if first not in load.STAGES and having and lacking:
            one = " or ".join(f"`{stage}.{change}`" for stage in having)
            raise UserError(f"{lacking[0]}: {first} is not a setting of {stages[lacking[0]]}; write {one}, which changes that stage alone")


def _changes_for(stage: str, changes: Sequence[str]) -> list[str]:
    """Those of `changes` that concern `stage`: `train.seed=1` only train, `seed=1` every stage."""
    chosen = []
    for change in changes:
        first, dot, rest = change.partition(".")
        if dot and first in load.STAGES and "=" not in first:
            if first == stage:
                chosen.append(rest)
        else:
            chosen.append(change)
    return chosen


def check_queue(parsed: Sequence[tuple[str, StageConfig]]) -> str:
    """The cluster's name, once what the configurations ask of it is found possible; raises `UserError` otherwise."""
    from slurm.submission import preflight

    return preflight.check(parsed)


# -- what becomes of a plan -----------------------------------------------------------------------------------------


def queue(planned: "Sequence[Planned]", *, as_json: bool = False) -> None:
    """Submits the planned runs and prints run directory and job id of each.

    If the queue refuses one, it and those after it are deleted, unless some of its tasks are queued already.
    """
    from slurm.commands.command_line import print_json
    from slurm.execution import executor
    from slurm.record import backlog, snapshot

    rows: list[dict[str, Any]] = []
    for position, item in enumerate(planned):
        if item.run is None:
            rows.append({"stage": item.config.stage, "name": item.config.name, "skipped": item.skipped})
        else:
            try:
                entries = executor.launch(item.run, list(range(item.run.num_tasks)))
            except BaseException:
                for rest in planned[position:]:
                    if rest.run is not None and not rest.run.job()["jobs"] and not backlog.tasks_of(rest.run):
                        snapshot.remove(rest.run.path)
                raise
            identities = [entry["id"] for entry in entries]
            rows.append({"stage": item.config.stage, "name": item.config.name, "run": str(item.run.path), "jobs": identities})
            rows[-1] |= {"not_queued": waiting} if (waiting := backlog.in_words(item.run)) else {}
        if not as_json:
            _print_row(rows[-1])
    if as_json:
        print_json(rows)


def _print_row(row: dict[str, Any]) -> None:
    if "skipped" in row:
        print(f"{row['stage']} {row['name']}: skipped; {row['skipped']}")
        return
    print(f"run {row['run']}", *([f"job {' '.join(map(str, row['jobs']))}"] if row["jobs"] else []), sep="\n")
    if "not_queued" in row:
        print(row["not_queued"])
    sys.stdout.flush()


def show_dry_run(
    planned: "Sequence[Planned]", site: Site, *, against: "Named | None" = None, as_json: bool = False, heading: Sequence[str] = ()
) -> None:
    """Prints what would be queued, what differs from the last run of its name and the sbatch scripts, then deletes the plan.

    against : compare with this run instead.
    heading : lines that stand before all others.
    """
    from slurm.commands.command_line import print_json
    from slurm.record import snapshot
    from slurm.submission import dry_run

    try:
        rows = dry_run.describe(planned, site.runs, against=against)
    finally:
        for item in planned:
            if item.run is not None:
                snapshot.remove(item.run.path)
    if as_json:
        print_json(rows)
    else:
        print("\n".join([*heading, *dry_run.as_lines(rows)]))
