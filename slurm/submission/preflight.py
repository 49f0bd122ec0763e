"""Looks on the login node at whether this cluster can run what a configuration asks for, before anything is queued."""

from collections.abc import Sequence

from pipeline.config.errors import UserError
from pipeline.config.resources import Resources
from pipeline.config.stage import StageConfig
from slurm.client import slurm_queries, slurm_values
from slurm.client.node_output import Node

DOWN_STATES = frozenset({"DOWN", "DRAIN", "DRAINED", "FAIL", "INVAL", "FUTURE"})


def check(parsed: Sequence[tuple[str, StageConfig]]) -> str:
    """The cluster's name. Raises `UserError` with each reason why a job of `parsed` could never start."""
    settings = slurm_queries.configuration()
    partitions = {record["PartitionName"]: record for record in slurm_queries.partitions()}
    nodes = slurm_queries.all_nodes()
    faults = [f"{where}: resources.{fault}" for where, config in parsed for fault in faults_of(config.resources, partitions, nodes)]
    if faults:
        raise UserError("\n".join(faults))
    return settings.get("ClusterName", "")


def faults_of(resources: Resources, partitions: dict[str, dict[str, str]], nodes: Sequence[Node]) -> list[str]:
    """What the cluster can't give, one phrase each: field, what was asked, what there is."""
    if resources.partition is None:
        chosen = [name for name, record in partitions.items() if record.get("Default") == "YES"]
    else:
        chosen = resources.partition.split(",")
    faults = [f"partition is {name}, but this cluster has {', '.join(partitions)}" for name in chosen if name not in partitions]
    if faults or not chosen:
        return faults or [f"partition is not given and the cluster has no default; name one of {', '.join(partitions)}"]
    limits = [slurm_values.seconds(partitions[name].get("MaxTime", "")) for name in chosen]
    known = [limit for limit in limits if limit is not None]
    if len(known) == len(limits) and resources.timeout_min * 60 > max(known):
        faults.append(f"timeout_min is {resources.timeout_min}, but jobs in {', '.join(chosen)} may take {max(known) // 60} minutes")
    there = [node for node in nodes if set(node.partitions) & set(chosen)]
    return faults + _node_faults(resources, there, ", ".join(chosen))


def _node_faults(resources: Resources, nodes: Sequence[Node], where: str) -> list[str]:
    if resources.node is not None:
        nodes = [node for node in nodes if node.name == resources.node]
        if not nodes:
            return [f"node is {resources.node}, but partition {where} has no such node; `crosscoder accelerators` lists them"]
        if DOWN_STATES & set(nodes[0].states):
            reason = f" ({nodes[0].reason})" if nodes[0].reason else ""
            return [f"node is {resources.node}, but that node is {'+'.join(nodes[0].states).lower()}{reason}; choose another"]
    faults = []
    gpus = [_gpus(node, resources.gpu_type) for node in nodes]
    kind = f"{resources.gpu_type} GPUs" if resources.gpu_type else "GPUs"
    if resources.gpus and sum(count >= resources.gpus for count in gpus) < resources.nodes:
        offered = sorted({f"{count.total} x {name} on {node.name}" for node in nodes for name, count in node.gpus.items()})
        faults.append(
            f"gpus is {resources.gpus} ({kind} on each of {resources.nodes} nodes), but {where} has {', '.join(offered) or 'no GPU'}"
        )
    cpus = resources.cpus * resources.tasks_per_node
    if nodes and cpus > max(node.cpus for node in nodes):
        most_cpus = max(node.cpus for node in nodes)
        faults.append(f"cpus is {resources.cpus} for {resources.tasks_per_node} processes, but nodes of {where} have {most_cpus} cores")
    if nodes and resources.mem_gb and resources.mem_gb * 1024 > max(node.mem_mb for node in nodes):
        most = max(node.mem_mb for node in nodes) / 1024
        faults.append(f"mem_gb is {resources.mem_gb:g}, but nodes of {where} have {most:.1f}")
    if resources.nodes > len(nodes):
        faults.append(f"nodes is {resources.nodes}, but {where} has {len(nodes)}")
    return faults


def _gpus(node: Node, gpu_type: str | None) -> int:
    return sum(count.total for name, count in node.gpus.items() if gpu_type is None or name == gpu_type)
