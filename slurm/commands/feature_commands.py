"""`crosscoder features`: what a feature store holds; `crosscoder evolution`: how features came to be in training."""

import json
from typing import Annotated

import typer

from pipeline.config.errors import UserError
from slurm.record.printable import print, printable_json

MOST_ROWS = 30
"""Of a table, unless more are asked for."""


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("features")(features)
    app.command("evolution")(evolution)


def features(
    reference: Annotated[str, typer.Argument(metavar="RUN", help="A run of features; or of train: the newest made of it is taken.")],
    wanted: Annotated[list[int] | None, typer.Argument(metavar="FEATURE", help="Show these features; none: a table of all.")] = None,
    sort: Annotated[
        str | None,
        typer.Option(help="By density, activation, norm, layer-share, cosine, survival or feature.", show_default="density in a table"),
    ] = None,
    search: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only features that fire most on, or promote, a token with TEXT in it.")
    ] = None,
    most: Annotated[
        int | None, typer.Option("--most", "-n", min=1, help="So many features at most.", show_default="30 in a table, else all")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Print a JSON line for each example: feature, tokens, activation at each token.")
    ] = False,
) -> None:
    """Show a trained crosscoder's features: a table, or the layers, tokens, neighbors and contexts of some."""
    from pipeline.config.site_file import load_site
    from slurm.commands.command_line import print_json, print_lines, terminal_width
    from slurm.watching import feature_view
    from slurm.watching.feature_store import find_store

    if sort is not None and sort not in feature_view.SORTS:
        raise UserError(f"--sort is {sort!r}; features can be sorted by {', '.join(feature_view.SORTS)}")
    if as_json and as_jsonl:
        raise UserError("--json and --jsonl are two forms of the same; choose one")
    store = find_store(reference, load_site().runs)
    rows = store.features(wanted) if wanted else store.table([*feature_view.COLUMNS, *(["promoted"] if search is not None else [])])
    if search is not None:
        rows = feature_view.matching(rows, search)
    if sort is not None or not wanted:
        rows.sort(key=feature_view.SORTS[sort or ("feature" if as_jsonl else "density")])
    num_all, rows = len(rows), rows[:most]
    if as_jsonl:
        for row in rows:
            for context in store.contexts(row["feature"]):
                print(printable_json(json.dumps(feature_view.example(context), ensure_ascii=False)))
    elif as_json:
        print_json([row | {"contexts": store.contexts(row["feature"])} for row in rows] if wanted else rows)
    elif wanted:
        for number, row in enumerate(rows):
            lines = feature_view.feature_lines(store, row, store.contexts(row["feature"]), terminal_width())
            print_lines([*([""] if number else []), *lines])
    else:
        print_lines(feature_view.table(store, rows if most else rows[:MOST_ROWS], num_all=num_all, width=terminal_width()))


def evolution(
    reference: Annotated[str, typer.Argument(metavar="RUN", help="A run of train that keeps snapshots (checkpoints.history).")],
    wanted: Annotated[
        list[int] | None, typer.Argument(metavar="FEATURE", help="The course of these features; none: shares of all of them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how features changed from snapshot to snapshot of a training run: died, revived, rose, fell; and the shrinkage."""
    from pipeline.config.site_file import load_site
    from slurm.commands.command_line import print_json, print_lines, terminal_width
    from slurm.watching import evolution as view
    from slurm.watching.feature_history import check_features, find_history

    named, snapshots = find_history(reference, load_site().runs)
    check_features(wanted or [], snapshots)
    if wanted:
        courses = [view.feature_course(snapshots, feature) for feature in wanted]
        if as_json:
            print_json([row for rows in courses for row in rows])
            return
        for number, rows in enumerate(courses):
            print_lines([*([""] if number else []), *view.feature_table(rows, snapshots[-1].facts["layers"], terminal_width())])
        return
    course = view.course(snapshots)
    if as_json:
        print_json(course)
    else:
        print_lines(view.table(named, course, terminal_width()))
