"""`crosscoder show`, `logs`, `compare`, `verify` and `clean`: read what runs and data sets recorded."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.config.errors import UserError
from pipeline.config.site_file import load_site
from slurm.record.printable import print, printable_log

TaskArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run: path, stage/name (its newest), id or job id; or one task: 1042_3, RUN/tasks/3.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

POLL_SECONDS = 0.5


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("show")(show)
    app.command("logs")(logs)
    app.command("compare")(compare)
    app.command("verify")(verify)
    app.command("clean")(clean)
    app.command("config")(config)


def show(
    reference: TaskArgument,
    whole_config: Annotated[bool, typer.Option("--config", help="All settings, not only those that differ from their defaults.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Of an evaluation: all its tables, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how a run stands and what came out of it, its settings, attempts and changes, and what it was made from."""
    from slurm.commands.command_line import print_json
    from slurm.record.record_view import as_text, as_values
    from slurm.record.run_reference import find
    from slurm.watching.job_listing import standing_of

    if everything and as_json:
        raise UserError("--all prints tables, which metrics.json of the run holds as JSON; leave --all or --json out")
    run, task = find(reference, load_site().runs)
    standing = standing_of(run)
    if as_json:
        print_json(as_values(run, standing, task=task))
        return
    print(as_text(run, standing, whole_config=whole_config, task=task))
    if everything:
        path = (run.path if run.num_tasks > 1 and task is None else run.task_directory(task or 0)) / "tables.txt"
        if not path.exists():
            raise UserError(f"{path} does not exist: tables are what finished runs of evaluate have; leave --all out")
        print("", path.read_text(encoding="utf-8").rstrip("\n"), sep="\n")


def logs(
    reference: TaskArgument,
    task: Annotated[int | None, typer.Option(help="Of a run that is divided: which task.", show_default="0", min=0)] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the task ends.")] = False,
    lines: Annotated[int | None, typer.Option("--lines", "-n", help="Only so many last lines.", min=0)] = None,
) -> None:
    """Print what a run's task printed, all attempts in order."""
    from slurm.record.run_reference import find

    run, named = find(reference, load_site().runs)
    if named is not None and task is not None:
        raise typer.BadParameter(f"{reference} names task {named} already; leave --task out")
    if task is not None and task >= run.num_tasks:
        has = f"tasks 0 to {run.num_tasks - 1}" if run.num_tasks > 1 else "one task, 0"
        raise UserError(f"{run.reference} has {has}, not {task}")
    if named is None and task is None and run.num_tasks > 1:
        print(f"task 0 of {run.reference}, which has {run.num_tasks}; --task chooses another", file=sys.stderr)
    task = named if named is not None else task or 0
    offsets: dict[Path, int] = {}
    text = _news(run, task, offsets, follow=follow)
    if lines is not None:
        text = "".join(line + "\n" for line in text.removesuffix("\n").split("\n")[-lines:] if lines and text)
    print(text, end="", flush=True)
    while follow and run.task_state(task) in ("queued", "running"):
        time.sleep(POLL_SECONDS)
        print(_news(run, task, offsets, follow=True), end="", flush=True)
    print(_news(run, task, offsets), end="", flush=True)
    if not any(offsets.values()) and not follow:
        print(f"{run.reference} has printed nothing yet; it is {run.task_state(task)}", file=sys.stderr)


def _news(run: Any, task: int, offsets: dict[Path, int], *, follow: bool = False) -> str:
    """What the task's logs hold beyond `offsets`, which are moved on. `follow`: without a last line that may be written on."""
    text = ""
    for path in run.log_files(task) or run.start_files():
        with open(path, "rb") as file:
            file.seek(offsets.get(path, 0))
            news = file.read()
            news = news[: news.rfind(b"\n") + 1] if follow else news
            text += printable_log(news.decode(errors="replace"))
            offsets[path] = offsets.get(path, 0) + len(news)
    return text


def compare(first: TaskArgument, second: TaskArgument, as_json: JsonOption = False) -> None:
    """Show what differs between two runs, or tasks: settings, code, environment, inputs, results."""
    from slurm.commands.command_line import print_json
    from slurm.record.comparison import as_text, compare_runs
    from slurm.record.run_reference import find

    runs = load_site().runs
    one, other = find(first, runs), find(second, runs)
    if one == other:
        raise UserError(f"{first} and {second} both name {one.reference}; name two runs, or two tasks, such as {one.run.reference}/tasks/0")
    differences = compare_runs(one, other)
    if as_json:
        paths = [str(named.run.path if named.task is None else named.run.task_directory(named.task)) for named in (one, other)]
        print_json({"first": paths[0], "second": paths[1], "differences": differences})
        return
    print(as_text(one, other, differences))


def verify(path: Annotated[str, typer.Argument(metavar="PATH", help="A data set, or a run.")], as_json: JsonOption = False) -> None:
    """Rehash a data set or a run, and name what is damaged. Exits with 1 if something is."""
    from slurm.commands.command_line import print_json
    from slurm.record.verification import verify as verify_path

    checked, damages, is_all = verify_path(path, load_site().runs)
    if as_json:
        print_json({"checked": checked, "damages": damages})
    else:
        print("\n".join(damages) or f"{'whole' if is_all else 'no damage found'}: {', '.join(checked)}")
    if damages:
        raise SystemExit(1)


def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete what no run needs any more: frozen code of runs that were deleted, and hashes of models' files that are gone."""
    from pipeline.run import byte_size
    from slurm.commands.command_line import print_json
    from slurm.record.activity import one_submission_at_a_time
    from slurm.record.text_table import number_of
    from slurm.submission import cleaning

    runs = load_site().runs
    with one_submission_at_a_time(runs):
        found = cleaning.leftovers(runs)
        own = [leftover for leftover in found if leftover.is_own]
        if not dry_run:
            cleaning.delete(own)
    if as_json:
        print_json([{"path": str(leftover.path), "bytes": leftover.num_bytes} for leftover in own])
        return
    size = byte_size(sum(leftover.num_bytes for leftover in own))
    print(f"{'would delete' if dry_run else 'deleted'} {number_of(len(own), 'file')} that no run under {runs} needs, {size}")
    if others := len(found) - len(own):
        print(f"{number_of(others, 'more is', 'more are')} of other users, who can clean up what is theirs")


def config(
    stage: Annotated[
        str | None, typer.Argument(metavar="STAGE", help="tokenize, count, cache, train, ...; all if left out.", show_default=False)
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As a page; that of all stages is docs/settings.md.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the settings of a stage: what each key takes, its default, and what it means."""
    import difflib

    from pipeline.config import reference
    from pipeline.config.load import STAGES
    from slurm.commands.command_line import print_json

    if as_markdown and as_json:
        raise UserError("--markdown and --json are two forms of the same; give one of them")
    if stage is not None and stage not in STAGES:
        near = difflib.get_close_matches(stage, STAGES, n=1)
        raise UserError(f"{stage} is not a stage; " + (f"did you mean `{near[0]}`?" if near else f"stages are {', '.join(STAGES)}"))
    stages = list(STAGES) if stage is None else [stage]
    if as_markdown:
        print(reference.as_markdown(stages), end="")
    elif as_json:
        print_json({name: [group.as_json() for group in reference.groups_of(name)] for name in stages})
    else:
        print("\n\n".join(reference.as_text(name) for name in stages))
