"""What a job asks of the cluster. Zero means none of a thing; `None` means the site file's or the cluster's default."""

from typing import Annotated

from pydantic import Field

from pipeline.config.schema import Config, Count, PositiveCount


class Resources(Config):
    """Of one task of a stage, unless the field says otherwise."""

    nodes: PositiveCount = 1
    """Machines of one task; no stage takes more than one yet."""
    tasks_per_node: PositiveCount = 1
    """Processes a machine; more than one form a torch.distributed group, which no stage takes yet."""
    gpus: Count = 0
    """GPUs a machine; no stage works on more than one yet."""
    gpu_type: str | None = None
    """Slurm's name of the GPU type (`h200`); None takes any."""
    cpus: PositiveCount = 1
    """CPU cores a process."""
    mem_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory a machine, in GiB; None takes the cluster's default."""
    timeout_min: PositiveCount = 60
    """Time limit, in minutes."""
    partition: str | None = None
    """Slurm's partition; None takes the cluster's default."""
    account: str | None = None
    """Who the time is charged to; None takes your default account."""
    qos: str | None = None
    """Slurm's quality of service; None takes the partition's or the account's."""
    constraint: str | None = None
    """Node features, in Slurm's syntax."""
    node: str | None = None
    """A node by name; the job runs there and nowhere else."""
    array_tasks: PositiveCount = 1
    """Into how many tasks of one job array the stage is divided (tokenize: source files, cache: slices)."""
    max_parallel: PositiveCount | None = None
    """At most so many tasks of the array run at once; None means no throttle in Slurm, and what the cores allow on this machine."""
