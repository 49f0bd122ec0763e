"""A job of Slurm as submitit submits it: the parameters of its sbatch script, and what its shell does when it ends."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from pipeline.config.errors import UserError
from pipeline.config.resources import Resources
from pipeline.config.schema import build
from slurm.client import slurm_commands, slurm_queries
from slurm.execution.dependencies import dependency
from slurm.execution.frozen_code import frozen_variables
from slurm.execution.submission_environment import clean_environment
from slurm.record import backlog
from slurm.record.run_directory import SETUP, Json, RunDirectory

SUBMITIT_FOLDER = "submitit"
"""Without %a: submitit fails on it after sbatch has succeeded. Without %j: it would make a folder for each array element."""

END_OF_JOB = """end_of_job() {{
  case $? in 138|140|143) ended_by_signal=1 ;; 137) ended_by_signal=$told_to_stop ;; *) ended_by_signal= ;; esac
  set +e
  trap '' TERM USR1 USR2
  if [ -n "$ended_by_signal" ] && scontrol -o show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  if [ -e {backlog} ]; then {waves}; fi
}}
trap end_of_job EXIT
told_to_stop=
trap told_to_stop=1 TERM USR1 USR2"""
"""The shell outlives a signal to stop that reaches it too (`scancel --full`; a node's shutdown sends SIGTERM to every process): else the
job would be over before its program has saved and asked to be requeued. An srun that gets SIGTERM kills its program at once (137).

Requeues a job whose program was ended so, or by a signal to stop before it could block them: a preempted job that ends by itself
in its grace time is failed for Slurm 22.05, and not requeued. Then queues what had no room before: from the shell, since that
outlives a worker that is killed."""


def slurm_executor(run: RunDirectory, job: Json, *, planned: bool = False) -> Any:
    """submitit's executor with every parameter of the run's job. `planned`: of a job that is only shown (see `dependency`)."""
    import submitit

    resources = build(Resources, job["resources"], f"{run.path / 'job.json'}: resources")
    if not slurm_commands.is_installed("srun"):
        raise UserError("Slurm is not installed on this machine (no srun on PATH); use --executor local, or submit from a login node")
    check_path(run)
    slurm_commands.check_configuration()
    make_submitit_folder(run)
    executor = submitit.SlurmExecutor(folder=run.path / SUBMITIT_FOLDER, python=_python(run))
    executor.update_parameters(**slurm_parameters(run, job, resources, planned=planned))
    return executor


def make_submitit_folder(run: RunDirectory) -> None:
    """Makes the folder of submitit's files, which hold the site's setup lines, for the owner alone."""
    (run.path / SUBMITIT_FOLDER).mkdir(mode=0o700, exist_ok=True)


def check_path(run: RunDirectory) -> None:
    """Raises `UserError` for a path that would be another's in the job: of `%a` submitit learns after sbatch has succeeded."""
    if "%" in str(run.path):
        raise UserError(f"{run.path} has a % in its path, which Slurm and submitit replace by job numbers; use a root of runs without")


def _python(run: RunDirectory) -> str:
    """The shell words that start Python in a job: the interpreter that submits, with early signals kept for the worker."""
    starter = run.code / "slurm" / "execution" / "start_with_signals_kept.py"
    return shlex.join([sys.executable, "-I", "-S", str(starter), sys.executable])


def _end_of_job(run: RunDirectory) -> str:
    root = backlog.root_of(run)
    variables = [f"{name}={value}" for name, value in frozen_variables(run).items()]
    waves = shlex.join(["env", *variables, sys.executable, "-m", "slurm.execution.waves", str(root)])
    if not (run.code / "slurm" / "execution" / "waves.py").is_file():
        waves = ":"  # frozen before there was a backlog
    return END_OF_JOB.format(backlog=shlex.quote(str(root / backlog.FILE)), waves=waves)


def slurm_parameters(run: RunDirectory, job: Json, resources: Resources, *, planned: bool = False) -> dict[str, Any]:
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
        "dependency": dependency([RunDirectory(Path(path)) for path in job["after"]], planned=planned),
        "array_parallelism": resources.max_parallel or resources.array_tasks,
        "stderr_to_stdout": True,
        "setup": ["set -e", _end_of_job(run), *run.setup(), *frozen],
        # srun of Slurm 22.05 and 23.02 does not read SLURM_CPUS_PER_TASK; a process that dies must end the others, which wait for it
        "srun_args": [f"--cpus-per-task={resources.cpus}", "--kill-on-bad-exit=1"],
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", "chdir": str(run.path)},
    }


def signal_delay_s(timeout_min: int) -> int:
    """How long before its time limit a job is told to save: a tenth of the limit, from 10 s to 3 minutes.

    Slurm may be a minute early; with more than that before a limit of a few minutes a job would be stopped as it starts.
    """
    return max(10, min(180, timeout_min * 6))


def submission_text(run: RunDirectory) -> str:
    """The sbatch script that submitting the run would write, without the array line that submitit adds."""
    with clean_environment({}):
        executor = slurm_executor(run, run.job(), planned=True)
        return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def recorded_text(run: RunDirectory, text: str) -> str:
    """The script `text` as job.json keeps it, which others may read: without the site's setup lines."""
    setup = "\n".join(run.setup())
    return text.replace(f"\n{setup}\n", f"\n# the lines of {SETUP} ...\n", 1) if setup else text


def max_array_size() -> int:
    """How many tasks one array may have; indices end one below MaxArraySize."""
    return int(slurm_queries.configuration().get("MaxArraySize") or 1001)
