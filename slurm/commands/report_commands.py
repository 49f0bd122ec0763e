"""`crosscoder report`: a page about a trained crosscoder, to open in a browser or to send to somebody."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from slurm.record.printable import print

MOST_INSIDE = 128


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("report")(report)


def report(
    references: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Runs of train, evaluate, features or generate; sweeps; several: side by side."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.html", help="Where to.", show_default="report.html in the run directory")
    ] = None,
    inside: Annotated[
        int, typer.Option(min=0, help="So many features are whole in the page itself; the others are read from a folder beside it.")
    ] = MOST_INSIDE,
) -> None:
    """Write a page with the verdict, curves and features of a trained crosscoder, or with several side by side; it needs no server."""
    from pipeline.config.site_file import load_site
    from slurm.record.run_reference import find

    runs = load_site().runs
    named = find(references[0], runs)
    if len(references) == 1 and (named.run.stage != "sweep" or named.task is not None):
        _one(references[0], runs, output, inside)
    else:
        _several(references, runs, output)


def _one(reference: str, runs: Path, output: Path | None, inside: int) -> None:
    from slurm.reporting import page, run_page, words
    from slurm.reporting.subject import find_subject

    subject = find_subject(reference, runs)
    path = (output or subject.directory / "report.html").absolute()
    page.check_place(path)

    def said(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            sys.stderr.write(f"\rfeatures: {done} of {total} parts{end}")

    page.write(path, run_page.html(subject, path, most_inside=inside), subject.store, said)
    print(*words.three_sentences(subject, str(path)), sep="\n")


def _several(references: list[str], runs: Path, output: Path | None) -> None:
    from pipeline.config.errors import UserError
    from slurm.record.run_reference import find
    from slurm.reporting import compared, compared_page, page

    if output is None and len(references) > 1:
        raise UserError(f"a page of {len(references)} runs belongs to none of them: say where it goes, with --output FILE.html")
    members = compared.gather(references, runs)
    path = (output or find(references[0], runs).run.path / "report.html").absolute()
    page.check_place(path)
    title = find(references[0], runs).reference if len(references) == 1 else ", ".join(member.label for member in members)
    page.write(path, compared_page.html(members, path, title), None, lambda done, total: None)
    print(*compared_page.sentences(members, compared.measure_of(members)), f"Look at it in a browser: {path}", sep="\n")
