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
    reference: Annotated[str, typer.Argument(metavar="RUN", help="A run of train, evaluate or features, or a task of a sweep.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.html", help="Where to.", show_default="report.html in the run directory")
    ] = None,
    inside: Annotated[
        int, typer.Option(min=0, help="So many features are whole in the page itself; the others are read from a folder beside it.")
    ] = MOST_INSIDE,
) -> None:
    """Write a page with the verdict, curves and features of a trained crosscoder; it needs no server."""
    from pipeline.config.site_file import load_site
    from slurm.reporting import page, run_page, words
    from slurm.reporting.subject import find_subject

    subject = find_subject(reference, load_site().runs)
    path = (output or subject.directory / "report.html").absolute()

    def said(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            sys.stderr.write(f"\rfeatures: {done} of {total} parts{end}")

    page.write(path, run_page.html(subject, path, most_inside=inside), subject.store, said)
    print(*words.three_sentences(subject, str(path)), sep="\n")
