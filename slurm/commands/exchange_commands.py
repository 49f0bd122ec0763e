"""`crosscoder export`: a trained crosscoder in the files of other libraries."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.config.errors import UserError
from slurm.record.printable import print


class Layout(StrEnum):
    """Whose files are written."""

    sae_lens = "sae_lens"
    dictionary_learning = "dictionary_learning"
    safetensors = "safetensors"


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("export")(export)


def export(
    reference: Annotated[str, typer.Argument(metavar="RUN", help="A run of train, or one of its checkpoints.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory for the files and their model card.")],
    to: Annotated[Layout, typer.Option("--to", help="The library that reads the files; safetensors: plain tensors.")],
    license: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the weights, as the hub abbreviates it (apache-2.0); for the card.")
    ] = None,
) -> None:
    """Write a trained crosscoder as other libraries read it, with a model card; results of its newest evaluation stand on the card."""
    import subprocess
    import sys

    from pipeline.config.site_file import load_site
    from slurm.record.run_reference import find
    from slurm.watching.feature_store import newest_of

    runs = load_site().runs
    trained = Path(reference).expanduser().absolute()
    if not (trained / "crosscoder.json").exists():
        named = find(reference, runs)
        if named.run.stage not in ("train", "sweep"):
            raise UserError(f"{named.reference} is a run of {named.run.stage}, which leaves no crosscoder; name a run of train")
        if len(named.tasks) > 1:
            raise UserError(f"{named.reference} has tasks 0 to {len(named.tasks) - 1}; name one: {named.reference}/tasks/0")
        trained = named.run.path if named.task is None else named.run.task_directory(named.task)
    command = [sys.executable, "-m", "pipeline.exchange.export_crosscoder", str(trained), str(directory.expanduser()), "--to", to.value]
    evaluation = newest_of("evaluate", trained, runs)
    command += [] if evaluation is None else ["--evaluation", str(evaluation.path)]
    command += [] if license is None else ["--license", license]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        print(done.stderr, end="", file=sys.stderr)
        raise SystemExit(done.returncode)
