"""Why a job waits, or how it ended, in words. Pure functions."""

import re
import time
from collections.abc import Sequence

from slurm.client.job_output import Job

# Slurm's reasons (`man squeue`, JOB REASON CODES), those that a person meets. {} is replaced by the job's id.
WORDS = {
    "Priority": "jobs of higher priority come first",
    "Resources": "waits for nodes to become free",
    "JobHeldUser": "held by you; `crosscoder release {}` frees it",
    "JobHeldAdmin": "held by an administrator, who alone can release it",
    "JobArrayTaskLimit": "waits for other tasks of its array (the throttle)",
    "Licenses": "waits for a license",
    "Reservation": "waits for its reservation to begin",
    "ReqNodeNotAvail": "the node that it asks for is not available now",
    "NodeDown": "a node that it needs is down",
    "BadConstraints": "no node has what it asks for: it will never start; change it or cancel it",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is closed",
    "PartitionNodeLimit": "asks for more nodes than its partition allows",
    "PartitionTimeLimit": "asks for more time than its partition allows: it will never start; change it or cancel it",
    "PartitionConfig": "asks for more than its partition allows: it will never start; change it or cancel it",
    "InvalidAccount": "its account is not valid here",
    "InvalidQOS": "its qos is not valid here",
    # "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions": no code, a sentence.
    "Nodes_required_for_job_are_DOWN": "the nodes that it asks for are down, drained, or kept for jobs of partitions that come first",
    "Cleaning": "is being cleaned up after a requeue",
    "NonZeroExitCode": "its process ended with an error",
    "JobLaunchFailure": "could not be launched on its node",
    "TimeLimit": "reached its time limit",
    "OutOfMemory": "used more memory than it asked for",
    "NodeFail": "its node failed",
    "SystemFailure": "Slurm failed",
    "InactiveLimit": "was inactive for too long",
    "Prolog": "its node is being prepared",
    "launch_failed_requeued_held": "could not be launched, and is held; `crosscoder release {}` tries again",
    "job_requeued_in_held_state": "requeued and held; `crosscoder release {}` frees it",
}

# How a state reads where Slurm gives no reason, or none that says more.
STATE_WORDS = {
    "CANCELLED": "was cancelled",
    "TIMEOUT": "reached its time limit",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "used more memory than it asked for",
    "PREEMPTED": "was pushed aside by a job of higher priority",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "reached its deadline",
    "REQUEUED": "goes back to the queue",
    "REQUEUE_HOLD": "requeued and held; `crosscoder release {}` frees it",
    "SPECIAL_EXIT": "held after a special exit code",
    "SUSPENDED": "is suspended",
    "CONFIGURING": "its nodes are being made ready",
}


def in_words(job: Job, waits_for: Sequence[str] = ()) -> str:
    """Why `job` is in its state; empty where there is nothing to say. `waits_for` names the runs that it depends on."""
    if job.state == "COMPLETING":
        return "is ending"
    others = ", ".join(waits_for) or _ids_in(job.dependency) or "another job"
    if job.reason == "DependencyNeverSatisfied":
        if job.is_final:
            return f"it needed {others}, which failed or was cancelled"
        return f"needs {others}, which failed or was cancelled: it will never start; cancel it"
    if job.state == "CANCELLED":  # the reason is still that for which it waited
        return STATE_WORDS["CANCELLED"]
    if job.reason == "Dependency":
        return f"waits for {others}"
    if job.reason == "BeginTime":
        return "waits until " + (time.strftime("%H:%M:%S", time.localtime(job.started)) if job.started else "its time has come")
    if job.reason.startswith("AssocGrp") or job.reason.startswith("AssocMax") or "QOS" in job.reason[:4]:
        return f"a limit of your account or qos is reached ({job.reason})"
    if signal := re.fullmatch(r"RaisedSignal:(\d+)\((.*)\)", job.reason):
        return f"its process was ended by signal {signal[1]} ({signal[2]})"
    key = job.reason.replace(" ", "_").partition(",")[0].strip("()")
    for text in (WORDS.get(key), STATE_WORDS.get(job.state) if not job.reason or key == "None" else None):
        if text:
            return text.format(job.id)
    return job.reason or STATE_WORDS.get(job.state, "").format(job.id)


def _ids_in(dependency: str) -> str:
    """The job ids of `afterok:1042(unfulfilled),afterany:1043`."""
    parts = [part.partition("(")[0] for term in dependency.split(",") for part in term.split(":")[1:]]
    return ", ".join(dict.fromkeys(part for part in parts if part))
