"""Changes to what is queued: by scontrol where Slurm really does it, else by a new submission from the frozen record.

What Slurm 22.05 was seen to do with `scontrol update` decides the way: a GPU type is accepted and added to the old one, so
that the job never starts; `Gres=gpu:0` is accepted and has no effect; a count of GPUs, partition, node, time limit, memory,
nice, dependency and throttle are really changed. Every change is read back.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import load, yaml_file
from pipeline.config.errors import UserError
from pipeline.config.resources import Resources
from pipeline.config.schema import build
from pipeline.config.site_file import Site
from slurm.changing import job_control, job_updates
from slurm.changing.job_control import Target
from slurm.client import slurm_commands, slurm_queries
from slurm.client.job_output import Job
from slurm.execution import dependencies, executor
from slurm.record import run_directory
from slurm.record.run_directory import RunDirectory
from slurm.record.run_reference import find
from slurm.submission import preflight, refreezing

ALIASES = {"time": "timeout_min", "timeout": "timeout_min", "mem": "mem_gb", "memory": "mem_gb", "throttle": "max_parallel"}
ALIASES |= {"dependency": "after"}

BY_SCONTROL = ("partition", "node", "timeout_min", "gpus", "mem_gb", "max_parallel")
"""Fields of `resources` that scontrol changes on a waiting job."""

QUEUE_ONLY = ("priority", "nice", "after")
"""What belongs to the queue and to no configuration."""


class Request(NamedTuple):
    """A command's changes: to the resources, to the place in the queue, and to the configuration."""

    resources: dict[str, Any]
    queue: dict[str, Any]
    settings: list[str]


def parse(changes: Sequence[str]) -> Request:
    """The `key=value` of a command, sorted by what they change. Raises `UserError` for one of another form."""
    resources: dict[str, Any] = {}
    queue: dict[str, Any] = {}
    settings: list[str] = []
    for change in changes:
        key, equals, text = change.partition("=")
        key = ALIASES.get(key, key).removeprefix("resources.")
        if not equals or not key:
            raise UserError(f"the change {change!r} is not of the form key=value, for example partition=short or resources.gpus=2")
        if key in QUEUE_ONLY:
            queue[key] = yaml_file.parse(text, key)
        elif key in Resources.model_fields:
            resources[key] = yaml_file.parse(text, key)
        else:
            settings.append(change)
    if not changes:
        raise UserError("name a change, for example partition=short, timeout_min=120 or learning_rate=1e-3")
    return Request(resources, queue, settings)


def change(reference: str, changes: Sequence[str], site: Site) -> list[str]:
    """Makes the changes to the waiting job or run `reference`; gives a sentence for each thing done.

    Raises `UserError` where a change is impossible, having changed nothing, or where Slurm did not do what it accepted.
    """
    request = parse(changes)
    target = job_control.find_targets([reference], site, slurm_queries.my_jobs())[0]
    if target.is_local:
        raise UserError(f"{reference} is run by the local executor, which takes no changes; cancel it and submit it again")
    if target.run is None:
        return _change_foreign(target, request, site)
    waiting, running = _parts(target)
    before = build(Resources, target.run.job()["resources"], f"{target.run.path / 'job.json'}: resources")
    after = build(Resources, {**before.model_dump(mode="json"), **request.resources}, reference)
    if after.gpu_type is not None and after.gpus == 0 and "gpu_type" in request.resources:
        raise UserError(f"{target.run.reference} has no gpus; give gpus=1 too")
    _check_used(target.run, after)
    anew = needs_new_submission(before, after, request)
    if anew:
        _check_is_for_all(target, request, reference)
        _check_all_wait(target, running, anew, request)
        if after != before:
            _check_possible(after)
        return _submit_anew(target.run, target.ids, waiting, after, request, site)
    _check_running(request, waiting, running)
    if set(request.resources) - {"max_parallel"}:
        _check_possible(after)
    return _by_scontrol(target, waiting, running, before, after, request, site)


def needs_new_submission(before: Resources, after: Resources, request: Request) -> list[str]:
    """The changes that scontrol can't make, or that Slurm accepts and then ignores or gets stuck on."""
    changed = [key for key in Resources.model_fields if getattr(before, key) != getattr(after, key)]
    anew = [key for key in changed if key not in BY_SCONTROL]
    if "gpus" in changed and after.gpus == 0:
        anew.append("gpus")
    anew += [key for key in ("partition", "mem_gb") if key in changed and getattr(after, key) is None]
    return anew + [setting.partition("=")[0] for setting in request.settings]


def _parts(target: Target) -> tuple[list[Job], list[Job]]:
    """The target's jobs that wait, and those that run."""
    queue = {job.id: job for job in slurm_queries.my_jobs()}
    found = [queue[job_id] for job_id in target.ids if job_id in queue]
    return [job for job in found if not job.is_running and not job.is_final], [job for job in found if job.is_running]


# -- what can't be done -----------------------------------------------------------------------------------------------


def _check_possible(resources: Resources) -> None:
    """Raises `UserError` where no partition or node of the cluster has what `resources` asks for."""
    partitions = {record["PartitionName"]: record for record in slurm_queries.partitions()}
    if faults := preflight.faults_of(resources, partitions, slurm_queries.all_nodes()):
        raise UserError("; ".join(f"resources.{fault}" for fault in faults))


def _check_used(run: RunDirectory, resources: Resources) -> None:
    """Raises `UserError` where the run's stage would not use what `resources` asks for; a sweep's tasks are an array of whole runs."""
    stage, of_task = run.stage, resources
    if stage == "sweep":
        stage, of_task = run.record_of_task(0).stage, resources.model_copy(update={"array_tasks": 1})
    if stage in load.STAGES and (faults := load.config_class(stage).unused(of_task)):
        raise UserError("; ".join(f"resources.{fault}" for fault in faults))


def _check_is_for_all(target: Target, request: Request, reference: str) -> None:
    """Raises `UserError` for settings that one frozen record holds for other tasks too, or that a sweep holds for each task apart."""
    assert target.run is not None
    run, keys = target.run, ", ".join(setting.partition("=")[0] for setting in request.settings)
    if run.stage == "sweep":
        raise UserError(f"{run.reference} is a sweep, which can't be frozen again; cancel it and submit its file with the change")
    others = [task for task in range(run.num_tasks) if run.job_of_task(task) not in target.ids]
    if keys and not target.is_whole and any(run.task_state(task) in ("queued", "new") for task in others):
        raise UserError(f"{reference} is a part of {run.reference}, whose tasks share one configuration: change {keys} of the whole run")


def _check_all_wait(target: Target, running: Sequence[Job], keys: Sequence[str], request: Request) -> None:
    """Raises `UserError` for what a new submission alone could change, of a job that runs; says what does change it."""
    if not running:
        return
    names, run = ", ".join(job_control.slurm_names([job.id for job in running])), target.run
    assert run is not None
    way = f"cancel it (it saves first), and change it once `crosscoder submit --resume {run.reference}` has queued it again and it waits"
    if request.settings:
        way = f"`crosscoder rerun {run.reference} {' '.join(request.settings)}` makes a new run with it"
    raise UserError(f"{names} is running on {running[0].nodes}: {', '.join(keys)} can't be changed under it; {way}")


def _check_running(request: Request, waiting: Sequence[Job], running: Sequence[Job]) -> None:
    """A running job's time limit can change, the throttle of its array, and nothing else."""
    keys = [key for key in [*request.resources, *request.queue] if key not in ("timeout_min", "max_parallel")]
    if running and not waiting and keys:
        raise UserError(
            f"{running[0].id} is running on {running[0].nodes} since {running[0].elapsed_s} s: Slurm can't change {', '.join(keys)} of a "
            "running job; only its time limit (down; up takes an administrator). Cancel it and submit it again with the change: it resumes"
        )


# -- by scontrol ------------------------------------------------------------------------------------------------------


def _by_scontrol(
    target: Target, waiting: list[Job], running: list[Job], before: Resources, after: Resources, request: Request, site: Site
) -> list[str]:
    assert target.run is not None
    is_array = any(job.array_id for job in [*waiting, *running])
    parents = _parents(request, site)
    updates = job_updates.resource_updates(before, after, request.resources, is_array=is_array)
    updates |= job_updates.queue_updates(request.queue, dependencies.dependency(parents) if parents is not None else None)
    names, waited_for = _update_names(target, waiting, running), [parent.reference for parent in parents or []]
    done = [job_updates.make(name, updates, is_running=not waiting, waits_for=waited_for) for name in names]
    left = [f"{', '.join(job_control.slurm_names([j.id for j in running]))}: runs already, unchanged"] if running and waiting else []
    if names and not any(made.attributes for made in done):
        return [made.sentence for made in done] + left
    job = target.run.job()
    changed = {key: [job["resources"].get(key), value] for key, value in request.resources.items()}
    concerned = [task for task in range(target.run.num_tasks) if target.run.job_of_task(task) in set(target.ids)]
    others = [task for task in range(target.run.num_tasks) if task not in concerned]
    # Of tasks that ended, or wait outside the queue, the record tells what they are queued with next.
    is_whole = not any(target.run.task_state(task) in ("queued", "running") for task in others)
    if is_whole or not waiting:
        job["resources"] |= {key: getattr(after, key) for key in request.resources}
    if parents is not None:
        changed["after"] = [job["after"], [str(parent.path) for parent in parents]]
        job["after"] = changed["after"][1]
    target.run.write_job(job)
    of = {} if is_whole else {"tasks": concerned}
    job_control.note_change(target.run, {**of, **changed, **{k: v for k, v in request.queue.items() if k != "after"}}, how="scontrol")
    later = [] if names else [f"{target.run.reference}: changed; it is not queued yet, and will be as changed"]
    return [made.sentence for made in done] + left + later


def _update_names(target: Target, waiting: Sequence[Job], running: Sequence[Job]) -> list[str]:
    """What to name to scontrol: of an array the tasks that wait; the running ones only where nothing waits."""
    return job_control.slurm_names([job.id for job in (waiting or running)])


def _parents(request: Request, site: Site) -> list[RunDirectory] | None:
    """The runs that `after=` names; None where it is not given, no run for null."""
    if "after" not in request.queue:
        return None
    value = request.queue["after"]
    names = value if isinstance(value, list) else [] if value is None else [value]
    return [find(str(name), site.runs).whole("after") for name in names]


def _change_foreign(target: Target, request: Request, site: Site) -> list[str]:
    """A job that is no run: what scontrol does, and no more."""
    name = job_control.slurm_names(target.ids)[0]
    keys = [key for key in request.resources if key not in BY_SCONTROL] + [setting.partition("=")[0] for setting in request.settings]
    if keys:
        raise UserError(f"job {name} belongs to no run here, so it can't be submitted anew, which {', '.join(keys)} would take")
    waiting, running = _parts(target)
    _check_running(request, waiting, running)
    before = build(Resources, {"max_parallel": 1}, name)
    after = build(Resources, {**before.model_dump(mode="json"), **request.resources}, name)
    is_array = any(job.array_id for job in [*waiting, *running])
    updates = job_updates.resource_updates(before, after, request.resources, is_array=is_array)
    parents = _parents(request, site)
    updates |= job_updates.queue_updates(request.queue, dependencies.dependency(parents) if parents else None)
    parts, waited_for = _update_names(target, waiting, running), [parent.reference for parent in parents or []]
    return [job_updates.make(part, updates, is_running=not waiting, waits_for=waited_for).sentence for part in parts]


# -- by a new submission ----------------------------------------------------------------------------------------------


def _submit_anew(
    run: RunDirectory, ids: Sequence[str], waiting: Sequence[Job], after: Resources, request: Request, site: Site
) -> list[str]:
    """Holds the old jobs, submits the same tasks again as changed, lets dependants wait for the new ones, cancels the old.

    If the new submission is refused, record and old jobs are as they were.
    """
    if "after" in request.queue:
        raise UserError("`after` can't be changed together with what takes a new submission; use two commands")
    tasks = [task for task in range(run.num_tasks) if run.job_of_task(task) in set(ids)]
    names = job_control.slurm_names(ids)
    if not names:
        record = refreezing.refreeze(run, request.settings, after, site)
        refreezing.discard(run)
        job_control.note_change(run, {**record, **request.queue}, how="not queued yet")
        return [f"{run.reference}: changed; it is not queued yet, and will be as changed"]
    was_held = all(job.priority == 0 for job in waiting)
    known = {str(entry["id"]) for entry in run.job()["jobs"]}
    for name in names:
        slurm_commands.run("scontrol", "uhold", name)
    try:
        record = refreezing.refreeze(run, request.settings, after, site)
        entries = executor.launch(run, tasks, may_wait=False)
    except BaseException:
        _cancel_new(run, known)
        refreezing.restore(run)
        if not was_held:
            for name in names:
                slurm_commands.run("scontrol", "release", name)
        raise
    refreezing.discard(run)
    new_ids = [str(entry["id"]) for entry in entries]
    for new_id in new_ids:
        job_updates.update(new_id, job_updates.queue_updates(request.queue, None), is_running=False)
        if was_held:
            slurm_commands.run("scontrol", "uhold", new_id)
    dependants = _redirect_dependants(run, site)
    slurm_commands.run("scancel", *names)
    how = f"{', '.join(names)} submitted anew as {', '.join(new_ids)}"
    job_control.note_change(run, {**record, **request.queue, "dependants": dependants}, how=how)
    told = f"; {', '.join(dependants)} wait for the new one" if dependants else ""
    return [f"{', '.join(names)} cancelled, {run.reference} submitted anew as {', '.join(new_ids)}{told}"]


def _cancel_new(run: RunDirectory, known: set[str]) -> None:
    """Cancels what a submission that failed half-way had queued already."""
    if new := [str(entry["id"]) for entry in run.job()["jobs"] if str(entry["id"]) not in known]:
        slurm_commands.run("scancel", *new)


def _redirect_dependants(run: RunDirectory, site: Site) -> list[str]:
    """Lets each waiting job that depends on `run` depend on its newest jobs; gives the dependants' ids."""
    waiting = {job.array_id or job.id for job in slurm_queries.my_jobs() if job.state == "PENDING"}
    redirected = []
    for other in run_directory.list_runs(site.runs):
        job = other.job()
        if str(run.path) not in job["after"]:
            continue
        for entry in job["jobs"]:
            if str(entry["id"]) in waiting:
                wanted = dependencies.dependency([RunDirectory(Path(path)) for path in job["after"]])
                job_updates.update(str(entry["id"]), {"Dependency": wanted or ""}, is_running=False)
                redirected.append(str(entry["id"]))
    return redirected
