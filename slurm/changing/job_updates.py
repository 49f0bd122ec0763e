"""What `scontrol update` changes on a job, in its words, and whether it really did: every update is read back."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.errors import UserError
from pipeline.config.resources import Resources
from slurm.client import slurm_commands, slurm_queries
from slurm.client.job_output import Job
from slurm.watching.jobs import parse_ranges

MAX_TRIES = 30


def resource_updates(before: Resources, after: Resources, *, is_array: bool) -> dict[str, str]:
    """scontrol's attributes and values for what differs. Raises `UserError` for the throttle of what is no array."""
    if after.max_parallel != before.max_parallel and not is_array:
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
    return dict(update for key, update in all_updates.items() if getattr(before, key) != getattr(after, key))


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
