"""What `scontrol update` changes on a job, in its words, and whether it really did: every update is read back."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.config.errors import UserError
from pipeline.config.resources import Resources
from slurm.client import slurm_commands, slurm_queries
from slurm.client.job_output import Job
from slurm.client.slurm_values import parse_ranges

MAX_TRIES = 30


class Made(NamedTuple):
    """What an update came to: scontrol's attributes that it really changed, and all of it in words."""

    attributes: list[str]
    sentence: str


def resource_updates(before: Resources, after: Resources, wanted: Collection[str], *, is_array: bool) -> dict[str, str]:
    """scontrol's attributes and values for the fields `wanted` of `after`. Raises `UserError` for the throttle of what is no array.

    One that is as `before` is among them: a task may have been changed alone, and `make` asks Slurm what it has.
    """
    if "max_parallel" in wanted and after.max_parallel != before.max_parallel and not is_array:
        raise UserError("max_parallel is the throttle of an array, and this is a single job")
    gpus = f"gpu:{after.gpu_type}:{after.gpus}" if after.gpu_type else f"gpu:{after.gpus}"
    all_updates = {
        "partition": ("Partition", str(after.partition)),
        "node": ("ReqNodeList", after.node or ""),
        "timeout_min": ("TimeLimit", str(after.timeout_min)),
        "gpus": ("Gres", gpus),
        "mem_gb": ("MinMemoryNode", str(round((after.mem_gb or 0) * 1024))),
        "max_parallel": ("ArrayTaskThrottle", str(after.max_parallel or 0)),
    }
    if not is_array:
        del all_updates["max_parallel"]
    # Slurm has no word for "as by default" of these; where they were something else, a new submission says it.
    unsaid = {key for key in ("partition", "mem_gb") if getattr(after, key) is None}
    return dict(update for key, update in all_updates.items() if key in wanted and key not in unsaid)


def queue_updates(queue: Mapping[str, Any], dependency: str | None) -> dict[str, str]:
    """The same for `priority`, `nice` and `after`; `dependency` is what `after` comes to in Slurm's words."""
    updates = {}
    for key, attribute in (("priority", "Priority"), ("nice", "Nice")):
        if key in queue:
            value = queue[key]
            if not isinstance(value, int) or isinstance(value, bool):
                raise UserError(f"{key} is {value!r}, expected a whole number")
            updates[attribute] = str(value)
    if "after" in queue:
        updates["Dependency"] = dependency or ""
    return updates


def make(name: str, updates: Mapping[str, str], *, is_running: bool, waits_for: Sequence[str] = ()) -> Made:
    """Makes those of the updates that are not so already, as `update` does, and says what was done.

    waits_for : the runs that the dependency among the updates is on.
    """
    array, _, tasks = name.partition("_")
    concerned = [job for job in slurm_queries.job_details(array) if _is_concerned(job, tasks)]
    so_already = [
        attribute
        for attribute, value in updates.items()
        if attribute not in ("Priority", "Dependency") and concerned and all(read_back(job, attribute) == value for job in concerned)
    ]
    new = {attribute: value for attribute, value in updates.items() if attribute not in so_already}
    update(name, new, is_running=is_running)
    told = [in_words(attribute, value, waits_for) for attribute, value in new.items()]
    told += [f"{in_words(attribute, updates[attribute], waits_for)} already" for attribute in so_already]
    return Made(list(new), f"{name}: {', '.join(told) or 'as it was'}")


def in_words(attribute: str, value: str, waits_for: Sequence[str] = ()) -> str:
    """One of scontrol's attributes with its value: `time limit 12 min`, `waits for nothing`."""
    if attribute == "Gres":
        _, *kind, count = value.split(":")
        return f"gpus {count}" + (f" of type {kind[0]}" if kind else "")
    if attribute == "MinMemoryNode":
        return f"memory {int(value) / 1024:g} GB"
    if attribute == "ArrayTaskThrottle":
        return f"{value} of its tasks at once" if value != "0" else "any number of its tasks at once"
    if attribute == "ReqNodeList":
        return f"node {value}" if value else "any node"
    if attribute == "Dependency":
        return f"waits for {', '.join(waits_for)}" if value and waits_for else "waits for nothing"
    return {"TimeLimit": f"time limit {value} min"}.get(attribute, f"{attribute.lower()} {value}")


def update(name: str, updates: Mapping[str, str], *, is_running: bool) -> None:
    """Makes the updates in one call, so that the job can't start between two of them, and reads each back.

    Raises `UserError` where Slurm refuses, or accepts and does something else.
    """
    array, _, tasks = name.partition("_")
    throttle = {key: value for key, value in updates.items() if key == "ArrayTaskThrottle"}  # of an array, not of its tasks
    for concerned, made in ((array, throttle), (name, {k: v for k, v in updates.items() if k not in throttle})):
        if made:
            _scontrol_update(concerned, made, is_running=is_running)
    for job in slurm_queries.job_details(array):
        for attribute, value in updates.items():
            shown = read_back(job, attribute)
            if shown is not None and _is_concerned(job, tasks) and not _same(attribute, shown, value):
                raise UserError(f"Slurm accepted {attribute}={value} for {job.id}, but shows {shown or 'nothing'}: the change was not made")


def _scontrol_update(name: str, updates: Mapping[str, str], *, is_running: bool) -> None:
    command = ("scontrol", "update", f"jobid={name}", *(f"{attribute}={value}" for attribute, value in updates.items()))
    try:
        _run_again_while_refused(command)
    except slurm_commands.CommandFailed as error:
        if is_running and "TimeLimit" in updates and "denied" in error.stderr:
            raise UserError(
                f"{name} is running: its time limit can be lowered; to raise it takes an administrator of the cluster"
            ) from error
        raise


def _run_again_while_refused(command: Sequence[str]) -> None:
    """Slurm 26.05 without slurmdbd refuses a new partition every other time, as "temporarily unavailable", and changes nothing then.

    Its controller takes an errno that is left over from reading the request for that of its search for the job's account.
    """
    for _ in range(MAX_TRIES - 1):
        try:
            slurm_commands.run(*command)
            return
        except slurm_commands.CommandFailed as error:
            if "temporarily unavailable" not in error.stderr:
                raise
            time.sleep(0.1)
    slurm_commands.run(*command)


def _is_concerned(job: Job, tasks: str) -> bool:
    """Whether the job is among the tasks `[1-3,7]` of its array and has not ended; scontrol shows the waiting ones as one."""
    own = job.id.partition("_")[2]
    return not job.is_final and (not tasks or not own or bool(set(parse_ranges(own)) & set(parse_ranges(tasks))))


def read_back(job: Job, attribute: str) -> str | None:
    """What Slurm shows for the attribute; None where it has no field that would tell."""
    shown = {
        "Partition": job.partition,
        "ReqNodeList": job.required_nodes,
        "TimeLimit": "" if job.limit_s is None else str(job.limit_s // 60),
        "Gres": job.gpus,
        "MinMemoryNode": "" if job.mem_mb is None else str(job.mem_mb),
        "ArrayTaskThrottle": str(job.throttle),
        "Nice": str(job.nice),
        "Dependency": job.dependency,
        "Priority": str(job.priority),
    }
    return shown.get(attribute)


def _same(attribute: str, shown: str, value: str) -> bool:
    if attribute == "Dependency":  # shown as afterok:1042(unfulfilled); what is fulfilled already is not shown
        return not shown if not value else all(shown_id in value for shown_id in _dependency_ids(shown))
    return shown == value


def _dependency_ids(text: str) -> list[str]:
    return [part.partition("(")[0].partition("_")[0] for term in text.split(",") for part in term.split(":")[1:]]
