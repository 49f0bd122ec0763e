"""What goes wrong on real clusters, done on purpose to a private one."""

import time

from slurm.client import processes, slurm_commands
from slurm.cluster.daemons import PrivateCluster

LAST_WORDS_S = 1.5
"""The controller reads answers once a second. One of a node that is declared down before that would bring it back into service
(seen in 24.11: and then the job on it counted twice)."""


def crash(cluster: PrivateCluster, node: str, *, declare: bool = True) -> None:
    """The node dies with all that it runs. `declare` tells the controller, which else finds out after SlurmdTimeout."""
    slurmd = [pid for name, pid in cluster.pids().items() if name == f"slurmd-{node}"]
    victims = [*slurmd, *processes.of_jobs(cluster.configuration, node=node)]
    processes.signal_all(victims)
    if declare:
        time.sleep(LAST_WORDS_S)
        cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=crashed")


def lose_contact(cluster: PrivateCluster, node: str) -> None:
    """The node's slurmd dies and its jobs run on: Slurm will run them a second time elsewhere."""
    processes.signal_all([cluster.pids()[f"slurmd-{node}"]])
    time.sleep(LAST_WORDS_S)


def revive(cluster: PrivateCluster, node: str) -> None:
    """The node is back and takes jobs."""
    cluster.start_node(node)
    try:
        cluster.command("scontrol", "update", f"nodename={node}", "state=resume")
    except slurm_commands.CommandFailed as error:
        if "Invalid node state" not in error.stderr:  # the daemon has registered already, and there is nothing to resume
            raise
