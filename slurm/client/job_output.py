"""Jobs as squeue, scontrol and sacct print them, in every version from 22.05 on, as one plain record. Pure functions."""

import re
import time
from typing import Any, NamedTuple

from slurm.client.slurm_values import SEPARATOR, json_rows, megabytes, moment, number, parse_records, present, seconds

JOB_FIELDS = ("%i", "%T", "%r", "%N", "%P", "%l", "%M", "%b", "%Q", "%S", "%V", "%E", "%F", "%A", "%j", "%k")
JOB_FORMAT = SEPARATOR.join(JOB_FIELDS)
SACCT_FIELDS = ("JobID", "State", "ExitCode", "NodeList", "Elapsed", "Start", "End", "Timelimit", "Partition", "JobName", "Comment")

FINAL_STATES = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"}
    | {"SPECIAL_EXIT", "LAUNCH_FAILED"}
)
"""PREEMPTED among them: a preempted job that is requeued reads PENDING or REQUEUED instead."""

# A JSON state from 23.11 on is a base state and flags; squeue's text shows the first of these flags, else the base state.
STATE_FLAGS = (
    *("COMPLETING", "STAGE_OUT", "CONFIGURING", "RESIZING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"),
    *("STOPPED", "REVOKED", "RESV_DEL_HOLD", "SIGNALING"),
)


class Job(NamedTuple):
    """One job, or one task of an array. Times are seconds since 1970, None where Slurm has none."""

    id: str
    """`1042`, or `1042_3` for a task of an array."""
    state: str
    reason: str = ""
    """Why it waits or how it ended, in Slurm's word; empty for none."""
    nodes: str = ""
    partition: str = ""
    limit_s: int | None = None
    elapsed_s: int = 0
    gpus: str = ""
    """As asked for, a node: `gpu:h200:1`."""
    priority: int = 0
    """0: held."""
    started: float | None = None
    """Of a waiting job: when Slurm expects it to start."""
    submitted: float | None = None
    dependency: str = ""
    array_id: str = ""
    raw_id: str = ""
    """The number that this task has for itself; `1042_3` may be 1046."""
    name: str = ""
    comment: str = ""
    requested: str = ""
    """All that it asks for, as trackable resources: `cpu=1,mem=1000M,node=1`. From here on: only where one job was asked for."""
    required_nodes: str = ""
    mem_mb: int | None = None
    """A machine; None where it is given by core."""
    nice: int = 0
    throttle: int = 0
    """At most so many tasks of the array at once; 0: no throttle."""
    num_restarts: int = 0

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def is_running(self) -> bool:
        return self.state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "CONFIGURING", "STAGE_OUT")


def job_state(value: Any) -> str:
    """A job's state in squeue's word, from a string (`CANCELLED by 1000`, `CANCELLED+`) or a list with flags."""
    if isinstance(value, list):
        words = [job_state(word) for word in value]
        return next((flag for flag in STATE_FLAGS if flag in words), words[0] if words else "UNKNOWN")
    match = re.match(r"[A-Z_]+", str(value).strip().upper())
    return match[0] if match else "UNKNOWN"


def parse_squeue(text: str) -> list[Job]:
    """The jobs in what `squeue -h -r -o JOB_FORMAT` printed."""
    jobs = []
    for line in text.splitlines():
        words = line.split(SEPARATOR)
        if len(words) != len(JOB_FIELDS):
            continue  # the rest of a comment with line breaks
        job_id, state, reason, nodes, partition, limit, elapsed, gres, priority, start, submit, after, array, raw, name, comment = words
        jobs.append(
            Job(
                id=job_id,
                state=job_state(state),
                reason=present(reason),
                nodes=present(nodes),
                partition=partition,
                limit_s=seconds(limit),
                elapsed_s=seconds(elapsed) or 0,
                gpus=present(gres).removeprefix("gres:").removeprefix("gres/"),
                priority=number(priority) or 0,
                started=moment(start),
                submitted=moment(submit),
                dependency=present(after),
                array_id=array if "_" in job_id else "",
                raw_id=raw,
                name=name,
                comment=present(comment),
            )
        )
    return jobs


def parse_jobs_json(text: str) -> list[Job]:
    """The jobs in what `squeue --json` or `scontrol show job --json` printed. Raises `UserError` if it is not such JSON."""
    return [_job_of_json(entry) for entry in json_rows(text, "jobs", "squeue --json")]


def _job_of_json(entry: dict[str, Any]) -> Job:
    raw = str(number(entry.get("job_id")) or "")
    array, task = number(entry.get("array_job_id")) or 0, number(entry.get("array_task_id"))
    folded = present(entry.get("array_task_string"))
    job_id = f"{array}_{task}" if array and task is not None else f"{array}_[{folded}]" if array and folded else raw
    state = job_state(entry.get("job_state"))
    start, end = number(entry.get("start_time")), number(entry.get("end_time"))
    limit_min = number(entry.get("time_limit"))
    until = end if state in FINAL_STATES and end else time.time()
    return Job(
        id=job_id,
        state=state,
        reason=present(entry.get("state_reason")),
        nodes=present(entry.get("nodes")),
        partition=present(entry.get("partition")),
        limit_s=None if limit_min is None else limit_min * 60,
        elapsed_s=max(0, int(until - start)) if start and state != "PENDING" else 0,
        gpus=present(entry.get("tres_per_node")).removeprefix("gres:").removeprefix("gres/"),
        priority=number(entry.get("priority")) or 0,
        started=float(start) if start else None,
        submitted=number(entry.get("submit_time")),
        dependency=present(entry.get("dependency")),
        array_id=str(array) if array else "",
        raw_id=raw,
        name=present(entry.get("name")),
        comment=_comment(entry.get("comment")),
        requested=present(entry.get("tres_req_str")),
        required_nodes=present(entry.get("required_nodes")),
        mem_mb=number(entry.get("memory_per_node")),
        nice=number(entry.get("nice")) or 0,
        throttle=number(entry.get("array_max_tasks")) or 0,
        num_restarts=number(entry.get("restart_cnt")) or 0,
    )


def _comment(value: Any) -> str:
    # sacct --json, and newer job records, hold {"administrator": "", "job": "...", "system": ""}.
    return present(value.get("job")) if isinstance(value, dict) else present(value)


def parse_scontrol(text: str) -> list[Job]:
    """The jobs in what `scontrol -o show job` printed: of an array, each task that is apart and the rest as one."""
    return [_job_of_record(record) for record in parse_records(text) if "JobId" in record]


def _job_of_record(record: dict[str, str]) -> Job:
    array, task = record.get("ArrayJobId", ""), record.get("ArrayTaskId", "")
    job_id = record["JobId"] if not array else f"{array}_{task}" if task.isdigit() else f"{array}_[{task}]"
    state = job_state(record.get("JobState", "UNKNOWN"))
    return Job(
        id=job_id,
        state=state,
        reason=record.get("Reason", ""),
        nodes=record.get("NodeList", ""),
        partition=record.get("Partition", ""),
        limit_s=seconds(record.get("TimeLimit", "")),
        elapsed_s=0 if state == "PENDING" else seconds(record.get("RunTime", "")) or 0,
        gpus=record.get("TresPerNode", "").removeprefix("gres:").removeprefix("gres/"),
        priority=number(record.get("Priority")) or 0,
        started=moment(record.get("StartTime", "")),
        submitted=moment(record.get("SubmitTime", "")),
        dependency=record.get("Dependency", ""),
        array_id=array,
        raw_id=record["JobId"],
        name=record.get("JobName", ""),
        comment=record.get("Comment", ""),
        requested=record.get("ReqTRES") or record.get("TRES", ""),  # TRES before 23.02
        required_nodes=record.get("ReqNodeList", ""),
        mem_mb=megabytes(record.get("MinMemoryNode", "")),
        nice=number(record.get("Nice")) or 0,
        throttle=number(record.get("ArrayTaskThrottle")) or 0,
        num_restarts=number(record.get("Restarts")) or 0,
    )


def parse_sacct(text: str) -> list[Job]:
    """The jobs in what `sacct -X -n -P -o SACCT_FIELDS` with our separator printed; of a requeued job the newest run."""
    newest: dict[str, Job] = {}
    for line in text.splitlines():
        words = line.split(SEPARATOR)
        if len(words) != len(SACCT_FIELDS):
            continue
        job_id, state, exit_code, nodes, elapsed, start, _, limit, partition, name, comment = words
        code, _, killed_by = exit_code.partition(":")
        reason = f"ended by signal {killed_by}" if killed_by not in ("", "0") else f"exit code {code}"
        job = Job(
            id=job_id,
            state=job_state(state),
            reason=reason if job_state(state) == "FAILED" else "",
            nodes="" if nodes == "None assigned" else nodes,
            partition=partition,
            limit_s=seconds(limit),
            elapsed_s=seconds(elapsed) or 0,
            started=moment(start),
            array_id=job_id.partition("_")[0] if "_" in job_id else "",
            name=name,
            comment=comment,
        )
        known = newest.get(job_id)
        if known is None or (job.started or float("inf")) >= (known.started or float("inf")):
            newest[job_id] = job
    return list(newest.values())
