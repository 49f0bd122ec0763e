"""`python -m slurm` and the console command `crosscoder`. Imports nothing at its top, so that Ctrl-C is heeded from the first moment."""

import sys

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended: 128 and the number of SIGINT, as shells have it."""


def main() -> None:
    """Runs the command line; Ctrl-C, while it is still being imported too, ends it with one line."""
    try:
        from slurm.commands.command_line import main as run_command_line

        run_command_line()
    except KeyboardInterrupt:
        _end()
    except SystemExit as end:  # typer ends a command so that was interrupted, and says nothing
        if end.code != INTERRUPTED:
            raise
        _end()


def _end() -> None:
    sys.stderr.write("crosscoder: interrupted\n")
    raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
