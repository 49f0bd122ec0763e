"""The same jobs and nodes as the JSON of those versions of Slurm tells them of which no recorded output is at hand.

Constructed from SchedMD's documentation of each version's fields; what 22.05, 24.11 and 26.05 really print is in
`slurm_outputs/` (`record_slurm_outputs.py` says how to add a version, whose shapes here are then not needed). What changed when:

    23.02  data_parser .39   unset numbers are {set, infinite, number}; sinfo groups rows under `sinfo`; node states are lists
    23.11  data_parser .40   job states are lists, may hold flags; times are {set, infinite, number}
    24.05  data_parser .41   job_resources.nodes is an object
    24.11  data_parser .42   null for absent objects
    25.05  data_parser .43   stdout_expanded
    25.11  data_parser .44
    26.05  data_parser .45
"""

import json
from typing import Any

PARSERS = {"23.02": 39, "23.11": 40, "24.05": 41, "25.05": 43, "25.11": 44}
VERSIONS = tuple(PARSERS)

Json = dict[str, Any]


def release(version: str) -> int:
    return int(version.replace(".", ""))


def unset() -> Any:
    return {"set": False, "infinite": False, "number": 0}


def integer(value: int | None) -> Any:
    """An integer that may be unset."""
    if value is None:
        return unset()
    return {"set": True, "infinite": False, "number": value}


def infinite() -> Any:
    return {"set": False, "infinite": True, "number": 0}


def moment(version: str, value: int) -> Any:
    return value if release(version) < 2311 else {"set": True, "infinite": False, "number": value}


def state(version: str, *states: str) -> Any:
    return list(states) if release(version) >= 2311 else states[0]


def meta(version: str) -> Json:
    return {"plugin": {"type": "", "data_parser": f"data_parser/v0.0.{PARSERS[version]}"}}


def job(version: str, **fields: Any) -> Json:
    """A job record with the keys that every version has, `fields` laid over them."""
    empty: Json = {
        "account": "",
        "array_job_id": integer(0),
        "array_task_id": unset(),
        "array_max_tasks": integer(0),
        "array_task_string": "",
        "comment": "",
        "dependency": "",
        "memory_per_node": unset(),
        "memory_per_cpu": integer(1000),
        "name": "train-demo",
        "nice": 0,
        "nodes": "",
        "partition": "main",
        "required_nodes": "",
        "restart_cnt": 0,
        "standard_output": "/runs/%j_0_log.out",
        "state_reason": "None",
        "submit_time": moment(version, 1_755_290_000),
        "start_time": moment(version, 0),
        "end_time": moment(version, 0),
        "tres_per_node": "",
        "tres_req_str": "cpu=1,mem=1000M,node=1,billing=1",
        "tres_alloc_str": "",
    }
    if release(version) >= 2411:
        empty["job_resources"] = None
    if release(version) >= 2505:
        empty["stdout_expanded"] = "/runs/1042_0_log.out"
    return {**empty, **fields}


def squeue(version: str) -> str:
    """A running job with a GPU, a job that ended, and an array of which one task runs and three wait."""
    jobs = [
        job(
            version,
            job_id=1042,
            job_state=state(version, "RUNNING"),
            nodes="n1",
            start_time=moment(version, 1_755_290_346),
            end_time=moment(version, 1_755_293_946),
            time_limit=integer(60),
            priority=integer(4_294_901_759),
            tres_per_node="gres:gpu:h200:2" if release(version) < 2411 else "gres/gpu:h200:2",
            comment='{"run":"a|b"}',
            memory_per_node=integer(4096),
            required_nodes="n1",
            restart_cnt=2,
        ),
        job(
            version,
            job_id=1043,
            job_state=state(version, "CANCELLED"),
            state_reason="DependencyNeverSatisfied",
            dependency="afterok:1041(failed)",
            time_limit=infinite(),
            priority=integer(0),
            submit_time=moment(version, 1_755_290_001),
        ),
        job(
            version,
            job_id=1047,
            array_job_id=integer(1044),
            array_task_id=integer(0),
            array_max_tasks=integer(1),
            job_state=state(version, "COMPLETED", "COMPLETING") if release(version) >= 2311 else "COMPLETING",
            nodes="n[1-2]",
            start_time=moment(version, 1_755_290_346),
            end_time=moment(version, 1_755_290_356),
            time_limit=integer(10),
            priority=integer(7),
        ),
        job(
            version,
            job_id=1044,
            array_job_id=integer(1044),
            array_max_tasks=integer(1),
            array_task_string="1-3%1",
            job_state=state(version, "PENDING"),
            state_reason="JobArrayTaskLimit",
            time_limit=integer(10),
            priority=integer(7),
        ),
    ]
    return json.dumps({"meta": meta(version), "jobs": jobs, "warnings": [], "errors": []})


def sinfo(version: str) -> str:
    """What `sinfo -N --json` tells: n1 half used in two partitions, n2 drained, n3 silent, c1 without a GPU."""
    nodes = [
        ("n1", ["MIXED"], ["main", "low"], "gpu:h200:2(S:0-1)", "gpu:h200:1(IDX:0)", ""),
        ("n2", ["IDLE", "DRAIN"], ["main"], "gpu:a100:4", "gpu:a100:0(IDX:N/A)", "bad fan"),
        ("n3", ["DOWN", "NOT_RESPONDING"], ["main"], "gpu:a100:1,shard:8", "gpu:a100:0(IDX:N/A),shard:0(0/8)", "Not responding"),
        ("c1", ["IDLE"], ["cpu"], "", "gpu:0", ""),
    ]
    rows = [_group(version, *node, partition=partition) for node in nodes for partition in node[2]]
    return json.dumps({"meta": meta(version), "sinfo": rows, "warnings": [], "errors": []})


def _group(version: str, name: str, states: list[str], partitions: list[str], gres: str, used: str, reason: str, *, partition: str) -> Json:
    return {
        "cluster": "big",
        "node": {"state": states},
        "nodes": {"allocated": 0, "idle": 1, "other": 0, "total": 1, "hostnames": [], "addresses": [], "nodes": [name]},
        "cpus": {"allocated": 8, "idle": 56, "other": 0, "total": 64, "minimum": 64, "maximum": 64},
        "memory": {"minimum": 512_000, "maximum": 512_000, "free": {"minimum": integer(9)}, "allocated": 16_000},
        "gres": {"total": gres, "used": used},
        "features": {"total": "", "active": ""},
        "reason": reason if release(version) < 2411 else {"description": reason} if reason else "",
        "partition": {"name": partition, "nodes": {"total": 3}, "maximums": {"time": infinite()}},
    }
