"""The `crosscoder` command line, put together from the modules that hold its commands.

A module with commands has a `register(app)` that adds its functions with `app.command()(function)`; to plug one in, add
its name to `COMMAND_MODULES`. Such a module imports only what is cheap at its top (no torch, transformers, submitit,
numpy, rich) and the rest inside its functions: every command pays for all of them before it starts.
"""

import importlib
import json
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

from pipeline.config.errors import UserError, sentence_of
from slurm.commands.application import App
from slurm.execution.terminal import print_any_letter
from slurm.record.printable import cleaned, print, printable_json

if TYPE_CHECKING:
    from rich.text import Text

COMMAND_MODULES = (
    "slurm.commands.run_commands",
    "slurm.commands.record_commands",
    "slurm.commands.sweep_commands",
    "slurm.commands.watching_commands",
    "slurm.commands.changing_commands",
    "slurm.commands.feature_commands",
    "slurm.commands.exchange_commands",
    "slurm.commands.report_commands",
    "slurm.commands.generation_commands",
)


def build_app() -> typer.Typer:
    """The application with every command registered."""
    app = App(
        name="crosscoder",
        help="Train crosscoders on a Slurm cluster or one workstation: run, submit, watch and compare stages.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for module in COMMAND_MODULES:
        importlib.import_module(module).register(app)
    return app


def main() -> None:
    """Runs the command line. Exit code 0: done; 1: the user's input, said in one sentence; 2: wrong usage."""
    print_any_letter()
    try:
        build_app()()
    except UserError as error:
        print(f"crosscoder: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            _drop_output()
            raise SystemExit(0) from None
        if (sentence := sentence_of(error)) is None:
            raise
        print(f"crosscoder: {sentence}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _drop_output()


def _drop_output() -> None:
    """Nobody reads on (`crosscoder logs RUN | head`): what is left goes nowhere, and Python's last flush does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: Any) -> None:
    """Prints `value` as indented JSON: what `--json` gives."""
    print(printable_json(json.dumps(value, indent=1, ensure_ascii=False, default=str)))


def terminal_width() -> int | None:
    """Columns of the terminal, or what `COLUMNS` says; None where output goes to a file or a pipe: a row is a line there."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() or os.environ.get("COLUMNS") else None


def print_lines(lines: "Iterable[str | Text]") -> None:
    """Prints each line as it is but for control characters, never broken; colors only where output is a terminal."""
    from rich.console import Console

    console = Console()
    for line in lines:
        console.print(cleaned(line), no_wrap=True, overflow="ignore", crop=False, highlight=False, markup=False, soft_wrap=True)
