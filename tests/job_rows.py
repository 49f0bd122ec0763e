"""Jobs as squeue gives them, tasks as run directories give them, and their rows: for tests of the listing."""

from typing import Any

from slurm.client.job_output import Job
from slurm.watching import jobs
from slurm.watching.jobs import Row, Task

NOW = 1_795_424_000.0


def job(job_id: str = "1042", state: str = "RUNNING", **fields: Any) -> Job:
    running = {"nodes": "n1", "limit_s": 3600, "elapsed_s": 600, "started": NOW - 600} if state == "RUNNING" else {}
    return Job(job_id, state, **{"partition": "main", "priority": 7, **running, **fields})


def task(job_id: str | None = "1042", file_state: str = "queued", **fields: Any) -> Task:
    plain = {"run": "train/demo/20261123-091530-k3f9", "stage": "train", "name": "demo", "task": 0, "num_tasks": 1, "executor": "slurm"}
    return Task(**{**plain, "job_id": job_id, "file_state": file_state, **fields})


def beat(**fields: Any) -> dict[str, Any]:
    plain = {"phase": "train", "step": 250, "total": 1000, "unit": "steps", "rate": 0.5, "seconds_left": 1500.0, "time": NOW - 2}
    return {**plain, "started": NOW - 590, "note": "", **fields}


def only(*arguments: Any, **keywords: Any) -> Row:
    (row,) = jobs.join(*arguments, now=NOW, **keywords)
    return row
