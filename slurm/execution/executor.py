"""Hands a frozen run to what will run it: this process, a process through submitit, or Slurm through submitit.

The executor's own folder, `submitit/` in the run directory, holds what submitit needs; nothing in it is read back. The
truth about a run is in its run directory.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.errors import UserError
from pipeline.config.resources import Resources
from pipeline.config.schema import build
from slurm.client import slurm_commands, slurm_queries
from slurm.execution.frozen_task import FrozenTask
from slurm.execution.submission_environment import clean_environment, detached, time_limit, variables_after
from slurm.record.run_directory import Json, RunDirectory, list_runs

SUBMITIT_FOLDER = "submitit"
"""Without %a: submitit fails on it after sbatch has succeeded. Without %j: it would make a folder for each array element."""

REQUEUE_AFTER_EARLY_SIGNAL = (
    """trap 'case $? in 138|140|143) scontrol -o show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING && """
    """scontrol requeue "$SLURM_JOB_ID";; esac' EXIT"""
)
"""For a job whose program a signal to stop (USR1, USR2, TERM) ended before it could block them: a preempted job that ends by
itself in its grace time is failed for Slurm 22.05, and not requeued."""

LOCAL_TIMEOUT_MIN = 60.0 * 24 * 365
"""submitit's local controller counts from the submission, waiting included; `LocalQueue` keeps the time limit itself."""


def launch(run: RunDirectory, tasks: Sequence[int]) -> list[Json]:
    """Submits `tasks` of a frozen run to its executor and records the jobs; gives the entries added to job.json.

    A run that waits for others (`after`) is told to. Raises `UserError` with what the queue said when it refuses.
    """
    job = run.job()
    launcher = {"local": _launch_local, "slurm": _launch_slurm}.get(job["executor"])
    if launcher is None:
        raise UserError(f"{run.reference} is of executor {job['executor']}, which has no queue")
    entries = []
    for entry in launcher(run, list(tasks), job):
        job = run.job()
        job["jobs"].append(entry)
        run.write_job(job)
        entries.append(entry)
    return entries


# -- local --------------------------------------------------------------------------------------------------------


def _launch_local(run: RunDirectory, tasks: list[int], job: Json) -> Iterator[Json]:
    """One process of submitit's local executor, which works on the tasks `max_parallel` (default 1) at a time.

    submitit would start all tasks of an array at once.
    """
    import submitit

    from slurm.execution.local_queue import LocalQueue

    resources = build(Resources, job["resources"], f"{run.path / 'job.json'}: resources")
    if resources.nodes > 1:
        raise UserError(f"resources.nodes is {resources.nodes}, but the local executor has this machine alone; use 1, or --executor slurm")
    parents = [str(parent) for parent in job["after"]]
    work = LocalQueue(str(run.path), tasks, resources.max_parallel or 1, parents, 60.0 * resources.timeout_min)
    variables = variables_after(job["setup"]) | frozen_variables(run)
    with clean_environment(variables), detached(run.path / SUBMITIT_FOLDER / "controller_log.out"):
        executor = submitit.LocalExecutor(folder=run.path / SUBMITIT_FOLDER)
        executor.update_parameters(
            timeout_min=LOCAL_TIMEOUT_MIN,
            gpus_per_node=resources.gpus,
            tasks_per_node=resources.tasks_per_node,
            stderr_to_stdout=True,
        )
        submitted = executor.submit(work)
    yield {"id": str(submitted.job_id), "tasks": tasks, "array": False, "submitted": time.time(), "sbatch": None}


def frozen_variables(run: RunDirectory) -> dict[str, str]:
    """What makes Python import the frozen code, an editable install and the current directory notwithstanding.

    PYTHONSAFEPATH keeps the current directory out of `sys.path`, where it would come before PYTHONPATH.
    """
    others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and not (Path(part) / "pipeline").is_dir()]
    return {"PYTHONPATH": os.pathsep.join([str(run.code), *others]), "PYTHONSAFEPATH": "1"}


def signal_delay_s(timeout_min: int) -> int:
    """How long before its time limit a job is told to save: a tenth of the limit, from 10 s to 3 minutes.

    Slurm may be a minute early; with more than that before a limit of a few minutes a job would be stopped as it starts.
    """
    return max(10, min(180, timeout_min * 6))


# -- Slurm --------------------------------------------------------------------------------------------------------


def _launch_slurm(run: RunDirectory, tasks: list[int], job: Json) -> Iterator[Json]:
    """One `sbatch` for all tasks; several where MaxArraySize is lower than their number."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    size = min(len(tasks), max_array_size()) if len(tasks) > 1 else 1
    for first in range(0, len(tasks), size):
        chunk = tasks[first : first + size]
        with clean_environment({}):
            executor = slurm_executor(run, job)  # a new one each time: submitit can't unset a parameter
            try:
                with time_limit(slurm_commands.TIMEOUT_S):
                    submitted = executor.submit_array([FrozenTask(str(run.path), task) for task in chunk])
            except (FailedJobError, FailedSubmissionError, OSError) as error:
                raise UserError(_refusal(run, error, tasks[first:])) from error
        array_id = str(submitted[0].job_id).partition("_")[0]
        text = (run.path / SUBMITIT_FOLDER / f"{array_id}_submission.sh").read_text(encoding="utf-8")
        yield {"id": array_id, "tasks": chunk, "array": len(chunk) > 1, "submitted": time.time(), "sbatch": text}


def slurm_executor(run: RunDirectory, job: Json) -> Any:
    """submitit's executor with every parameter of the run's job."""
    import submitit

    resources = build(Resources, job["resources"], f"{run.path / 'job.json'}: resources")
    if not slurm_commands.is_installed("srun"):
        raise UserError("Slurm is not installed on this machine (no srun on PATH); use --executor local, or submit from a login node")
    executor = submitit.SlurmExecutor(folder=run.path / SUBMITIT_FOLDER, python=_python(run))
    executor.update_parameters(**slurm_parameters(run, job, resources))
    return executor


def _python(run: RunDirectory) -> str:
    """The shell words that start Python in a job: the interpreter that submits, with early signals kept for the worker."""
    starter = run.code / "slurm" / "execution" / "start_with_signals_kept.py"
    return shlex.join([sys.executable, "-I", "-S", str(starter), sys.executable])


def slurm_parameters(run: RunDirectory, job: Json, resources: Resources) -> dict[str, Any]:
    """submitit's parameters for a job of this run; those that are None are left to the cluster."""
    frozen = [f"export {name}={shlex.quote(value)}" for name, value in frozen_variables(run).items()]
    gpus = f"gpu:{resources.gpu_type}:{resources.gpus}" if resources.gpu_type else f"gpu:{resources.gpus}"
    return {
        "job_name": f"{job['stage']}-{job['name']}",
        "comment": json.dumps({"run": run.reference, "directory": str(run.path)}, separators=(",", ":")),
        "wckey": None,  # submitit's default names one that sites which check them don't know
        "time": resources.timeout_min,
        "signal_delay_s": signal_delay_s(resources.timeout_min),
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks_per_node,
        "cpus_per_task": resources.cpus,
        "mem": f"{round(resources.mem_gb * 1024)}M" if resources.mem_gb else None,
        "gres": gpus if resources.gpus else None,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "nodelist": resources.node,
        "dependency": dependency([RunDirectory(Path(path)) for path in job["after"]]),
        "array_parallelism": resources.max_parallel or resources.array_tasks,
        "stderr_to_stdout": True,
        "setup": ["set -e", *job["setup"], *frozen, REQUEUE_AFTER_EARLY_SIGNAL],
        # srun of Slurm 22.05 and 23.02 does not read SLURM_CPUS_PER_TASK; a process that dies must end the others, which wait for it
        "srun_args": [f"--cpus-per-task={resources.cpus}", "--kill-on-bad-exit=1"],
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", "chdir": str(run.path)},
    }


def dependency(parents: Sequence[RunDirectory]) -> str | None:
    """Slurm's dependency on what of `parents` has not finished; None if all has.

    Raises `UserError` for a parent that Slurm can't wait for.
    """
    ids: list[str] = []
    for parent in parents:
        job = parent.job()
        waiting = [task for task in range(job["num_tasks"]) if (parent.result(task) or {}).get("status") != "finished"]
        if not waiting:
            continue
        known = [entry["id"] for entry in job["jobs"] if set(entry["tasks"]) & set(waiting)]
        if job["executor"] != "slurm" or not known:
            raise UserError(
                f"{parent.reference} has not finished and is no job of Slurm, so a job can't wait for it; finish or submit it first"
            )
        ids += [str(known[-1])] if len(known) == 1 or job["num_tasks"] == 1 else [str(identity) for identity in known]
    return "afterok:" + ":".join(dict.fromkeys(ids)) if ids else None


def let_wait_again(parent: RunDirectory) -> list[str]:
    """Makes the queued jobs that wait for `parent` wait for its newest jobs; gives their ids."""
    moved = []
    for child in list_runs(parent.path.parents[2]):
        job = child.job()
        if str(parent.path) not in job["after"] or job["executor"] != "slurm" or not job["jobs"]:
            continue
        wanted = dependency([RunDirectory(Path(path)) for path in job["after"]])
        for entry in job["jobs"] if wanted else []:
            state = slurm_commands.run("squeue", "-h", "-t", "pending", "-j", str(entry["id"]), "-o", "%T")
            if state.strip():
                slurm_commands.run("scontrol", "update", f"jobid={entry['id']}", f"dependency={wanted}")
                moved.append(str(entry["id"]))
    return moved


def submission_text(run: RunDirectory) -> str:
    """The sbatch script that submitting the run would write, without the array line that submitit adds."""
    with clean_environment({}):
        executor = slurm_executor(run, run.job())
        return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def max_array_size() -> int:
    """How many tasks one array may have; indices end one below MaxArraySize."""
    return int(slurm_queries.configuration().get("MaxArraySize") or 1001)


def _refusal(run: RunDirectory, error: Exception, left: list[int]) -> str:
    cause = error.__cause__
    code = f" exited {cause.returncode}" if isinstance(cause, subprocess.CalledProcessError) else ""
    said = str(cause if isinstance(cause, TimeoutError) else error).replace("sbatch: error: ", "").strip()
    kept = ""
    if run.job()["jobs"]:
        kept = f"; {len(left)} of its tasks are not queued: mend it and run `crosscoder submit --resume {run.reference}`"
    return f'sbatch{code}: "{said}"; accounts you may use: sacctmgr show assoc user=$USER; partitions: sinfo{kept}'
