"""`crosscoder change`, `hold`, `release` and `cancel`: do something about what is queued or running."""

from typing import Annotated

import typer

from slurm.record.printable import print

JobsArgument = Annotated[list[str], typer.Argument(metavar="JOB...", help="Job ids, tasks (1042_3, 1042_[1-3]), or runs.")]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("change")(change)
    app.command("hold")(hold)
    app.command("release")(release)
    app.command("cancel")(cancel)


def change(
    job: Annotated[str, typer.Argument(metavar="JOB", help="A job id, a task (1042_3), or a run.")],
    changes: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="partition, node, timeout_min, gpus, mem_gb, ...")],
) -> None:
    """Change what is still queued.

    partition, node, timeout_min, gpus, mem_gb, max_parallel (an array's throttle), priority, nice and after (runs to wait
    for) change on the spot. gpu_type, cpus, other resources and any setting of the configuration (learning_rate=1e-3) are
    changed by a new submission of the same run; a running job takes its time limit only.
    """
    from pipeline.config.site_file import load_site
    from slurm.changing import change as changing
    from slurm.record.activity import one_submission_at_a_time

    site = load_site()
    with one_submission_at_a_time(site.runs):
        sentences = changing.change(job, changes, site)
    print("\n".join(sentences))


def hold(references: JobsArgument) -> None:
    """Keep waiting jobs from starting."""
    from pipeline.config.site_file import load_site
    from slurm.changing import job_control
    from slurm.client import slurm_queries

    for target in job_control.find_targets(references, load_site(), slurm_queries.my_jobs()):
        print(job_control.hold(target))


def release(references: JobsArgument) -> None:
    """Let held jobs start."""
    from pipeline.config.site_file import load_site
    from slurm.changing import job_control
    from slurm.client import slurm_queries

    for target in job_control.find_targets(references, load_site(), slurm_queries.my_jobs()):
        print(job_control.release(target))


def cancel(
    references: Annotated[list[str] | None, typer.Argument(metavar="JOB...", help="Job ids, tasks (1042_3, 1042_[1-3]), or runs.")] = None,
    all_mine: Annotated[bool, typer.Option("--all", help="Every job of mine.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """End running jobs, after they had their time to save, and take waiting ones out of the queue. Asks first."""
    from pipeline.config.site_file import load_site
    from slurm.changing import job_control
    from slurm.client import slurm_queries
    from slurm.record import backlog

    if bool(references) == all_mine:
        raise typer.BadParameter("name jobs or runs, or give --all")
    queue = slurm_queries.my_jobs_if_any() or []
    site = load_site()
    targets = job_control.all_targets(site, queue) if all_mine else job_control.find_targets(references or [], site, queue)
    if not targets:
        print("no job of yours is waiting or running")
        return
    states = {job.id: job.state.lower() for job in queue}
    for target in targets:
        counts = [states.get(job_id, "running") for job_id in target.ids]
        told = ", ".join(f"{counts.count(state)} {state}" for state in dict.fromkeys(counts))
        if target.run is not None and target.is_whole and (beyond := backlog.tasks_of(target.run)):
            told += f"{', ' if told else ''}{len(beyond)} not queued yet"
        print(f"{', '.join(job_control.slurm_names(target.ids))}  {target.run.reference if target.run else ''}  {told}")
    if not yes:
        typer.confirm("cancel these?", abort=True)
    for sentence in job_control.cancel(targets):
        print(sentence, flush=True)
