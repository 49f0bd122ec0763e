"""What a private cluster consists of: nodes, GPUs, partitions, and how it treats jobs."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Gpu(NamedTuple):
    """One GPU of a node. `device` is its character device, or None for a fake one, which counts and is not there."""

    type: str
    device: str | None = None


class Node(NamedTuple):
    name: str
    cpus: int
    mem_mb: int
    gpus: tuple[Gpu, ...] = ()


class Partition(NamedTuple):
    """`tier` orders partitions: a job of a higher one preempts, by requeue, those of a lower one that is `preemptible`."""

    name: str
    tier: int
    max_time_min: int | None = None
    default_time_min: int | None = None
    max_nodes: int | None = None
    preemptible: bool = False
    grace_s: int = 0
    is_default: bool = False


@dataclass(frozen=True)
class Policy:
    """How the cluster treats jobs. The defaults suit a person's workstation; `for_tests` makes everything quick."""

    requeue_delay_s: int = 5
    """A requeued job waits so long and a second: the lifetime of its credential, 120 s in Slurm's own defaults."""
    kill_wait_s: int = 30
    """Between SIGTERM and SIGKILL."""
    node_timeout_s: int = 60
    """Until a silent node counts as down."""
    min_job_age_s: int = 300
    """How long squeue remembers a finished job."""
    warns_before_preemption: bool = True
    """A preempted job gets the signal it asked for (`--signal`), not only SIGTERM."""
    requeues: bool = True
    """Whether jobs may be requeued unless they say otherwise."""
    max_array_size: int = 1001
    """Array indices go up to one less."""
    max_jobs: int = 10_000


@dataclass(frozen=True)
class Layout:
    """All that is written into the cluster's configuration."""

    nodes: tuple[Node, ...]
    partitions: tuple[Partition, ...]
    policy: Policy = Policy()
    is_real_hardware: bool = True
    """Off: the nodes promise more cores, memory and GPUs than the machine has."""
    accounting: bool = False
    """Keep finished jobs in a database of the cluster's own (slurmdbd, MariaDB), for sacct."""
    extra_lines: tuple[str, ...] = field(default=())
    """Further lines of slurm.conf."""


PARTITIONS = (
    Partition("main", tier=10, is_default=True),
    Partition("low", tier=1, preemptible=True, grace_s=20),
    Partition("short", tier=5, max_time_min=60, default_time_min=10, max_nodes=1),
)
"""`main` for what should run, `low` for what may wait and be pushed aside, `short` for a quick look."""

TEST_POLICY = Policy(kill_wait_s=3, node_timeout_s=10)


def pretended(policy: Policy = TEST_POLICY, *, accounting: bool = False, extra_lines: tuple[str, ...] = ()) -> Layout:
    """Three nodes with five fake GPUs of two types, on whatever machine this is: what the tests run on."""
    h200, a100 = Gpu("h200"), Gpu("a100")
    nodes = (Node("n1", 8, 16_000, (h200, h200)), Node("n2", 8, 16_000, (h200, h200)), Node("n3", 8, 16_000, (a100,)))
    return Layout(nodes, PARTITIONS, policy, is_real_hardware=False, accounting=accounting, extra_lines=extra_lines)
