"""`crosscoder export` and `import`: trained crosscoders in the files of other libraries."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.config.errors import UserError
from slurm.record.printable import print

CONTEXTS = 64
"""A generation of the stream, of which an import tries a crosscoder on the first positions: a small one, since all of it is computed."""


class Layout(StrEnum):
    """Whose files are written."""

    sae_lens = "sae_lens"
    dictionary_learning = "dictionary_learning"
    safetensors = "safetensors"


class Origin(StrEnum):
    """Whose files are read."""

    sae_lens = "sae_lens"
    dictionary_learning = "dictionary_learning"
    ckkissane = "ckkissane"
    safetensors = "safetensors"


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("export")(export)
    app.command("import")(import_)


def export(
    reference: Annotated[str, typer.Argument(metavar="RUN", help="A run of train, or one of its checkpoints.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory for the files and their model card.")],
    to: Annotated[Layout, typer.Option("--to", help="The library that reads the files; safetensors: plain tensors.")],
    license: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the weights, as the hub abbreviates it (apache-2.0); for the card.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload the files to this repository on the Hugging Face hub, too.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository a private one, if it is made.")] = False,
) -> None:
    """Write a trained crosscoder as other libraries read it, with a model card; results of its newest evaluation stand on the card."""
    import re
    import subprocess
    import sys

    from pipeline.config.site_file import load_site
    from slurm.record.run_reference import find
    from slurm.watching.feature_store import newest_of

    if push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", push_to_hub):
        raise UserError(f"--push-to-hub is {push_to_hub!r}, expected a repository on the hub: user or organization, a slash and a name")
    runs = load_site().runs
    trained = Path(reference).expanduser().absolute()
    if not (trained / "crosscoder.json").exists():
        named = find(reference, runs)
        if named.run.stage not in ("train", "sweep", "import"):
            raise UserError(f"{named.reference} is a run of {named.run.stage}, which leaves no crosscoder; name a run of train")
        if len(named.tasks) > 1:
            raise UserError(f"{named.reference} has tasks 0 to {len(named.tasks) - 1}; name one: {named.reference}/tasks/0")
        trained = named.run.path if named.task is None else named.run.task_directory(named.task)
    if private and push_to_hub is None:
        raise typer.BadParameter("--private says how --push-to-hub makes a repository: give both, or none")
    command = [sys.executable, "-m", "pipeline.exchange.export_crosscoder", str(trained), str(directory.expanduser()), "--to", to.value]
    evaluation = newest_of("evaluate", trained, runs)
    command += [] if evaluation is None else ["--evaluation", str(evaluation.path)]
    command += [] if license is None else ["--license", license]
    command += [] if push_to_hub is None else ["--push-to-hub", push_to_hub, *(["--private"] if private else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, end="", flush=True)
    print(done.stderr, end="", file=sys.stderr)  # warnings too
    if done.returncode:
        raise SystemExit(done.returncode)


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The directory of the files, or the file of weights.")],
    layout: Annotated[Origin, typer.Option("--from", help="Whose files they are.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Further settings: `crosscoder config import` lists them.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Of the run: `import/NAME` stands for the crosscoder.")] = "imported",
    language_model: Annotated[
        str | None, typer.Option("--language-model", metavar="MODEL", help="Whose activations it reads: a directory, or a name on the hub.")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option("--layer", help="A layer that it reads; as often as there are, in the crosscoder's order.")
    ] = None,
    tokens: Annotated[Path | None, typer.Option("--tokens", metavar="DIR", help="The token set on which it is tried.")] = None,
) -> None:
    """Take a crosscoder from another library's files into a run that evaluate and features read: crosscoder=import/NAME."""
    from pipeline.config import load
    from pipeline.config.site_file import load_site
    from slurm.submission import input_preflight
    from slurm.submission.foreground import run_here
    from slurm.submission.freezing import Freezer

    site, where = load_site(), "crosscoder import"
    streamed = {"language_model": language_model and {"model": language_model}, "layers": layers, "tokens": tokens and str(tokens)}
    activations = {key: value for key, value in streamed.items() if value}
    values: dict[str, Any] = {"stage": "import", "name": name, "path": str(path.expanduser()), "layout": layout.value}
    values |= {"activations": {"kind": "stream", "contexts_per_generation": CONTEXTS, **activations}} if activations else {}
    for change in changes or []:
        load.set_value(values, change, where=where)
    config = load.from_values(values, where=where, site=site)
    input_preflight.check([(where, config)], site.runs)
    run_here(Freezer(site, executor="run").plan([(where, config)], again=True))
