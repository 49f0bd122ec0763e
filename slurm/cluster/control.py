"""`crosscoder cluster start|stop|status`: the private cluster as a feature, for a workstation that has no queue."""

import os
import socket
from dataclasses import replace
from pathlib import Path

from pipeline.config.errors import UserError
from slurm.client import slurm_commands
from slurm.cluster import configuration, hardware, layout
from slurm.cluster.daemons import PrivateCluster


def start(
    directory: Path,
    *,
    pretend: bool = False,
    accounting: bool = False,
    fresh: bool = False,
) -> str:
    """Starts a queue over this machine's cores, memory and GPUs, and tells how to use it.

    `pretend` offers three nodes with five fake GPUs instead: to try things out. `fresh` forgets what an earlier one had queued.
    One that is taken up again has the nodes that it had, for which its queue was made.
    """
    cluster = PrivateCluster(directory)
    goes_on = not (fresh or pretend) and _pretended(cluster)
    chosen = layout.pretended() if pretend or goes_on else hardware.workstation()
    seconds = cluster.start(replace(chosen, accounting=accounting), fresh=fresh)
    offers = "\n".join(f"#   {_offer(node)}" for node in chosen.nodes)
    waiting = cluster.command("squeue", "-h", "-o", "%i").split()
    kept = f"\n# {_jobs(len(waiting))} of its last time {'is' if len(waiting) == 1 else 'are'} queued" if waiting else ""
    kept += "\n# its nodes are pretended ones, as before; --fresh forgets them with the queue, for this machine's own" if goes_on else ""
    told = "".join(f"\n# {sentence}" for sentence in _who_can_reach_it())
    return f"# up in {seconds:.2f} s, in {cluster.directory}:\n{offers}{kept}{told}\nexport SLURM_CONF={cluster.configuration}"


def stop(directory: Path) -> str:
    """Ends the cluster and every process of its jobs. The queue is kept for the next start."""
    cluster = PrivateCluster(directory)
    if not cluster.pids():
        cluster.stop()
        return f"# no cluster runs in {cluster.directory}"
    running = cluster.command("squeue", "-h", "-t", "running", "-o", "%i").split() if cluster.is_running() else []
    seconds = cluster.stop()
    was = "was" if len(running) == 1 else "were"
    stopped = f"; {_jobs(len(running), 'running ')} {was} ended and will be requeued at the next start" if running else ""
    return f"# down in {seconds:.2f} s{stopped}"


def status(directory: Path) -> str:
    """Which daemons live, since what configuration, and what is queued. Raises `UserError` where none runs."""
    cluster = PrivateCluster(directory)
    pids = cluster.pids()
    if "slurmctld" not in pids:
        raise UserError(f"no cluster runs in {cluster.directory}; `crosscoder cluster start` starts one")
    queue = cluster.command("squeue", "-h", "-o", "%T").split()
    counts = ", ".join(f"{queue.count(state)} {state.lower()}" for state in sorted(set(queue))) or "empty"
    daemons = ", ".join(f"{name} {pid}" for name, pid in pids.items())
    return f"# up in {cluster.directory}: {daemons}\n# queue: {counts}\nexport SLURM_CONF={cluster.configuration}"


def _who_can_reach_it() -> list[str]:
    """What the owner should know of who can use the cluster, where that is not himself alone, as an ordinary user."""
    told = []
    if os.getuid() == 0:
        told.append("started by root: every job runs as root, and nobody but root can submit; start it as yourself unless you need that")
    if (address := hardware.address_of_name()) != configuration.ADDRESS:
        name = socket.gethostname()
        told.append(
            f"its daemons listen on every address of this machine, since {name} stands for {address or 'none'}; the cluster's key keeps "
            f"others out all the same; with `{configuration.ADDRESS} {name}` in /etc/hosts, in place of any other, no port is open"
        )
    return told


def _pretended(cluster: PrivateCluster) -> bool:
    """Whether the cluster was stopped with its queue kept, and offered more than its machine has."""
    if slurm_commands.stopped_private_cluster(cluster.directory) is None:
        return False
    return configuration.PRETENDS in cluster.configuration.read_text(encoding="utf-8").splitlines()


def _jobs(count: int, kind: str = "") -> str:
    return f"{count} {kind}{'job' if count == 1 else 'jobs'}"


def _offer(node: layout.Node) -> str:
    types = list(dict.fromkeys(gpu.type for gpu in node.gpus))
    gpus = ", ".join(f"{sum(gpu.type == kind for gpu in node.gpus)} x {kind}" for kind in types) or "no GPU"
    return f"{node.name}: {node.cpus} cores, {node.mem_mb / 1024:.0f} GiB, {gpus}"
