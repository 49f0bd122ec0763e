"""Questions to Slurm, each one call: my jobs, all nodes, the configuration, the partitions, one job in full."""

import os
from collections.abc import Sequence

from pipeline.config.errors import UserError
from slurm.client import job_output, node_output, slurm_commands, slurm_values
from slurm.client.job_output import Job
from slurm.client.node_output import Node

MAX_IDS_A_CALL = 500
"""Of sacct: a command line has an end."""


def my_jobs() -> list[Job]:
    """My jobs that Slurm's controller knows: waiting, running, and for a while (MinJobAge) finished. One call of squeue."""
    text = slurm_commands.run("squeue", "-h", "-r", "-a", "-t", "all", "-u", str(os.getuid()), "-o", job_output.JOB_FORMAT)
    return job_output.parse_squeue(text)


def my_jobs_if_any() -> list[Job] | None:
    """The same; None on a machine without Slurm, or that belongs to no cluster: runs of other executors are listed there."""
    if not slurm_commands.is_installed():
        return None
    try:
        return my_jobs()
    except slurm_commands.CommandFailed as error:
        if error.is_without_cluster:
            return None
        raise


def all_nodes() -> list[Node]:
    """Every node of every partition, hidden ones too."""
    try:
        return node_output.parse_nodes_json(slurm_commands.run("sinfo", "-a", "-N", "--json"))
    except slurm_commands.CommandMissing:
        raise
    except UserError:  # a Slurm that was built without JSON; a controller that is down fails again below
        return node_output.parse_sinfo(slurm_commands.run("sinfo", "-a", "-h", "-N", "-O", node_output.NODE_FORMAT))


def configuration() -> dict[str, str]:
    return slurm_values.parse_config(slurm_commands.run("scontrol", "show", "config"))


def partitions() -> list[dict[str, str]]:
    return slurm_values.parse_records(slurm_commands.run("scontrol", "-a", "-o", "show", "partition"))


def job_details(job_id: str) -> list[Job]:
    """The job `job_id` in full; of an array each task that is apart. Raises `UserError` where Slurm knows none of that id."""
    try:
        found = _details(job_id)
    except slurm_commands.CommandFailed as error:
        if "Invalid job id" not in error.stderr:
            raise
        found = []
    if not found:  # with --json it is no error
        raise UserError(f"Slurm knows no job {job_id}: it ended a while ago, or never was; `crosscoder jobs --all` lists yours")
    return found


def _details(job_id: str) -> list[Job]:
    # JSON, where scontrol has it (23.02 on): in its text a job's name or comment may look like another field.
    try:
        return job_output.parse_jobs_json(slurm_commands.run("scontrol", "show", "job", job_id, "--json"))
    except slurm_commands.CommandFailed as error:
        if "option" not in error.stderr and "json" not in error.stderr.lower():
            raise
    return job_output.parse_scontrol(slurm_commands.run("scontrol", "-o", "show", "job", job_id))


def has_accounting(settings: dict[str, str]) -> bool:
    """Whether sacct answers: without slurmdbd it only says that accounting is disabled."""
    return settings.get("AccountingStorageType", "").endswith("slurmdbd")


def finished_jobs(ids: Sequence[str]) -> list[Job]:
    """The jobs `ids` as accounting remembers them; of a requeued job its newest run. Needs `has_accounting`."""
    jobs: list[Job] = []
    for first in range(0, len(ids), MAX_IDS_A_CALL):
        some = ",".join(ids[first : first + MAX_IDS_A_CALL])
        fields = ",".join(job_output.SACCT_FIELDS)
        jobs += job_output.parse_sacct(
            slurm_commands.run("sacct", "-X", "-n", "-P", f"--delimiter={slurm_values.SEPARATOR}", "-D", "-j", some, "-o", fields)
        )
    return jobs
