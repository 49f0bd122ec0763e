"""The same jobs and nodes as the JSON of Slurm 22.05 to 26.05 tells them.

Constructed from SchedMD's documentation of each version's fields, not recorded: only 22.05 was at hand to record from (its
shapes are those of `squeue --json` and `sinfo --json` of a live 22.05.8, cut to the fields that matter, and the live tests
read the real thing). What changed when:

    22.05  openapi v0.0.38   strings for states, null for unset numbers, `sinfo --json` lists `nodes`
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

VERSIONS = ("22.05", "23.02", "23.11", "24.05", "24.11", "25.05", "25.11", "26.05")
PARSERS = dict(zip(VERSIONS[1:], range(39, 46), strict=True))

Json = dict[str, Any]


def release(version: str) -> int:
    return int(version.replace(".", ""))


def unset(version: str) -> Any:
    return None if version == "22.05" else {"set": False, "infinite": False, "number": 0}


def integer(version: str, value: int | None) -> Any:
    """An integer that may be unset."""
    if version == "22.05" or value is None:
        return value if version == "22.05" else unset(version)
    return {"set": True, "infinite": False, "number": value}


def infinite(version: str) -> Any:
    return None if version == "22.05" else {"set": False, "infinite": True, "number": 0}


def moment(version: str, value: int) -> Any:
    return value if release(version) < 2311 else {"set": True, "infinite": False, "number": value}


def state(version: str, *states: str) -> Any:
    return list(states) if release(version) >= 2311 else states[0]


def meta(version: str) -> Json:
    if version == "22.05":
        return {"plugin": {"type": "openapi/v0.0.38", "name": "Slurm OpenAPI v0.0.38"}}
    return {"plugin": {"type": "", "data_parser": f"data_parser/v0.0.{PARSERS[version]}"}}


def job(version: str, **fields: Any) -> Json:
    """A job record with the keys that every version has, `fields` laid over them."""
    empty: Json = {
        "account": "",
        "array_job_id": 0 if version == "22.05" else integer(version, 0),
        "array_task_id": unset(version),
        "array_max_tasks": integer(version, 0),
        "array_task_string": "",
        "comment": "",
        "dependency": "",
        "memory_per_node": unset(version),
        "memory_per_cpu": integer(version, 1000),
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
            time_limit=integer(version, 60),
            priority=integer(version, 4_294_901_759),
            tres_per_node="gres:gpu:h200:2" if release(version) < 2411 else "gres/gpu:h200:2",
            comment='{"run":"a|b"}',
            memory_per_node=integer(version, 4096),
            required_nodes="n1",
            restart_cnt=2,
        ),
        job(
            version,
            job_id=1043,
            job_state=state(version, "CANCELLED"),
            state_reason="DependencyNeverSatisfied",
            dependency="afterok:1041(failed)",
            time_limit=infinite(version),
            priority=integer(version, 0),
            submit_time=moment(version, 1_755_290_001),
        ),
        job(
            version,
            job_id=1047,
            array_job_id=integer(version, 1044),
            array_task_id=integer(version, 0),
            array_max_tasks=integer(version, 1),
            job_state=state(version, "COMPLETED", "COMPLETING") if release(version) >= 2311 else "COMPLETING",
            nodes="n[1-2]",
            start_time=moment(version, 1_755_290_346),
            end_time=moment(version, 1_755_290_356),
            time_limit=integer(version, 10),
            priority=integer(version, 7),
        ),
        job(
            version,
            job_id=1044,
            array_job_id=integer(version, 1044),
            array_max_tasks=integer(version, 1),
            array_task_string="1-3%1",
            job_state=state(version, "PENDING"),
            state_reason="JobArrayTaskLimit",
            time_limit=integer(version, 10),
            priority=integer(version, 7),
        ),
    ]
    return json.dumps({"meta": meta(version), "jobs": jobs, "warnings": [], "errors": []})


def sinfo(version: str) -> str:
    """What `sinfo -N --json` tells: n1 half used in two partitions, n2 drained, n3 silent, c1 without a GPU."""
    nodes = [
        ("n1", ["MIXED"], ["main", "low"], "gpu:h200:2(S:0-1)", "gpu:h200:1(IDX:0)", ""),
        ("n2", ["IDLE", "DRAIN"], ["main"], "gpu:a100:4", "gpu:a100:0(IDX:N/A)", "bad fan"),
        ("n3", ["DOWN", "NOT_RESPONDING"], ["main"], "gpu:a100:1,shard:8", "gpu:a100:0(IDX:N/A),shard:0(0/8)", "Not responding"),
        ("c1", ["IDLE"], ["cpu"], "", "gpu:0" if version != "22.05" else "", ""),
    ]
    if version == "22.05":
        rows = [_node_of_2205(*node) for node in nodes]
        return json.dumps({"meta": meta(version), "errors": [], "nodes": rows})
    rows = [_group(version, *node, partition=partition) for node in nodes for partition in node[2]]
    return json.dumps({"meta": meta(version), "sinfo": rows, "warnings": [], "errors": []})


def _node_of_2205(name: str, states: list[str], partitions: list[str], gres: str, used: str, reason: str) -> Json:
    return {
        "name": name,
        "state": states[0].lower(),
        "state_flags": states[1:],
        "partitions": partitions,
        "gres": gres,
        "gres_used": used,
        "cpus": 64,
        "alloc_cpus": 8,
        "idle_cpus": 56,
        "real_memory": 512_000,
        "alloc_memory": 16_000,
        "free_memory": -2,
        "features": "",
        "reason": reason,
    }


def _group(version: str, name: str, states: list[str], partitions: list[str], gres: str, used: str, reason: str, *, partition: str) -> Json:
    return {
        "cluster": "big",
        "node": {"state": states},
        "nodes": {"allocated": 0, "idle": 1, "other": 0, "total": 1, "hostnames": [], "addresses": [], "nodes": [name]},
        "cpus": {"allocated": 8, "idle": 56, "other": 0, "total": 64, "minimum": 64, "maximum": 64},
        "memory": {"minimum": 512_000, "maximum": 512_000, "free": {"minimum": integer(version, 9)}, "allocated": 16_000},
        "gres": {"total": gres, "used": used},
        "features": {"total": "", "active": ""},
        "reason": reason if release(version) < 2411 else {"description": reason} if reason else "",
        "partition": {"name": partition, "nodes": {"total": 3}, "maximums": {"time": infinite(version)}},
    }
