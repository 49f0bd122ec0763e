"""`crosscoder jobs`, `accelerators`, `doctor`, `watch` and `cluster`: what there is and how it goes."""

from pathlib import Path
from typing import Annotated

import typer

from slurm.commands.application import App
from slurm.record.printable import print

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(jobs)
    app.command()(watch)
    app.command()(accelerators)
    app.command()(doctor)
    cluster = App(no_args_is_help=True, help="A private Slurm over this machine's cores and GPUs: a queue without an administrator.")
    cluster.command("start")(cluster_start)
    cluster.command("stop")(cluster_stop)
    cluster.command("status")(cluster_status)
    app.add_typer(cluster, name="cluster")


def jobs(
    wanted: Annotated[
        list[str] | None,
        typer.Argument(metavar="WORD", help="Only these: a stage, a name, stage/name, an id, a job id, or 1042_3."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that ever ended too, not only the newest.")] = False,
    as_json: AsJson = False,
) -> None:
    """My queued and running jobs: stage, state and why, node, time, progress, rate, expected end; and those that ended lately."""
    from pipeline.config.site_file import load_site
    from slurm.commands.command_line import print_json, print_lines, terminal_width
    from slurm.watching import job_listing, job_table

    gathered = job_listing.gather(load_site(), wanted=wanted or (), everything=everything)
    rows = gathered.rows()
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    if wanted and not rows:
        print(f"no job and no run is called {' or '.join(wanted)}; `crosscoder jobs --all` lists all there are")
        return
    most_ended = None if everything else job_table.MOST_ENDED
    print_lines(job_table.table(rows, width=terminal_width(), most_ended=most_ended, num_older=gathered.num_older))


def watch(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="Show the last lines of the log of this run, or task, too.")] = None,
    interval: Annotated[float, typer.Option(min=1.0, help="Seconds between two looks; one squeue each.")] = 5.0,
) -> None:
    """My jobs, refreshed, and the last lines of a log. q or Ctrl-C ends it; the jobs go on."""
    from pipeline.config.site_file import load_site
    from slurm.watching import watch as watching

    watching.watch(load_site(), run, interval_s=interval)


def accelerators(as_json: AsJson = False) -> None:
    """GPUs by type, memory, total, used and free, on every node of every partition and on the site file's other machines."""
    from pipeline.config.site_file import load_site
    from slurm.commands.command_line import print_json, print_lines, terminal_width
    from slurm.watching import accelerators as listing

    try:
        rows = listing.gather(load_site())
    except listing.NoAccelerators as nothing:
        print_json([]) if as_json else print(nothing)
        return
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    print_lines(listing.table(rows, terminal_width()))


def doctor(as_json: AsJson = False) -> None:
    """Where data and runs lie, what this cluster will do to a job (preemption, limits, requeue, accounting), and what it means."""
    from rich.text import Text

    from pipeline.config.site_file import load_site
    from slurm.commands.command_line import print_json, print_lines, terminal_width
    from slurm.watching import doctor as examination

    findings = examination.gather(load_site())
    if as_json:
        print_json([finding._asdict() for finding in findings])
        return
    rows = examination.table(findings, terminal_width())
    print_lines(Text(line, style="yellow" if finding.is_concern else "") for finding, lines in rows for line in lines)


Directory = Annotated[Path | None, typer.Option(help="Where the cluster keeps its files.", show_default=".cluster in the clone")]


def cluster_start(
    directory: Directory = None,
    pretend: Annotated[bool, typer.Option("--pretend", help="Three nodes with five fake GPUs, to try things out.")] = False,
    accounting: Annotated[bool, typer.Option("--accounting", help="Keep finished jobs in a database, for sacct.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier one in this directory had queued.")] = False,
) -> None:
    """Start a queue over this machine's cores, memory and GPUs. This clone's commands then find it by themselves."""
    from slurm.client import slurm_commands
    from slurm.cluster import control

    print(control.start(directory or slurm_commands.private_cluster(), pretend=pretend, accounting=accounting, fresh=fresh))


def cluster_stop(directory: Directory = None) -> None:
    """End the queue and every job's processes. What is queued stays queued for the next start."""
    from slurm.client import slurm_commands
    from slurm.cluster import control

    print(control.stop(directory or slurm_commands.private_cluster()))


def cluster_status(directory: Directory = None) -> None:
    """Whether the queue is up, and the line that lets Slurm's own commands find it."""
    from slurm.client import slurm_commands
    from slurm.cluster import control

    print(control.status(directory or slurm_commands.private_cluster()))
