"""Nodes and their GPUs as sinfo and scontrol print them, in every version from 22.05 on. Pure functions."""

from typing import Any, NamedTuple

from slurm.client.slurm_values import SEPARATOR, gpu_counts, json_rows, number, present

NODE_FIELDS = ("NodeList", "Partition", "StateComplete", "CPUsState", "Gres", "GresUsed", "Memory", "AllocMem", "Features", "Reason")
NODE_FORMAT = ",".join(f"{field}:{SEPARATOR}" for field in NODE_FIELDS)


class GpuCount(NamedTuple):
    total: int
    used: int


class Node(NamedTuple):
    """One node. `states` are its base state and flags in capitals, in Slurm's order."""

    name: str
    states: tuple[str, ...]
    partitions: tuple[str, ...] = ()
    gpus: dict[str, GpuCount] = {}
    """By type; the type of one that has none in Slurm's configuration is `gpu`."""
    cpus: int = 0
    cpus_used: int = 0
    mem_mb: int = 0
    mem_used_mb: int = 0
    features: str = ""
    reason: str = ""

    @property
    def takes_jobs(self) -> bool:
        """Whether what is free on the node can be had."""
        return not UNUSABLE & set(self.states)


UNUSABLE = frozenset(
    {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "INVAL", "INVALID", "INVALID_REG", "NOT_RESPONDING", "UNKNOWN", "ERROR"}
    | {"MAINT", "MAINTENANCE", "RESERVED", "FUTURE", "BLOCKED", "PERFCTRS", "EXTERNAL"}
    | {"POWER_DOWN", "POWERING_DOWN", "REBOOT", "REBOOT_ISSUED", "REBOOT_REQUESTED"}
)

# What the last character of a node state in sinfo's text means.
STATE_MARKS = {"*": "NOT_RESPONDING", "$": "MAINT", "@": "REBOOT", "^": "REBOOT_ISSUED", "!": "POWER_DOWN", "%": "POWERING_DOWN"}
STATE_MARKS |= {"~": "POWERED_DOWN", "#": "POWERING_UP", "-": "PLANNED"}


def node_states(value: Any, flags: Any = ()) -> tuple[str, ...]:
    """A node's states from text (`mixed`, `drained*`, `IDLE+DRAIN`), or from a list, with `state_flags` where they are apart."""
    texts = [*(value if isinstance(value, list) else [value]), *(flags or [])]
    states: list[str] = []
    for text in texts:
        for word in str(text).strip().upper().split("+"):
            marks = [STATE_MARKS[mark] for mark in word if mark in STATE_MARKS]
            states += [word.rstrip("".join(STATE_MARKS)), *marks]
    return tuple(dict.fromkeys(state for state in states if state))


def parse_sinfo(text: str) -> list[Node]:
    """The nodes in what `sinfo -h -N -O NODE_FORMAT` printed, a row a node and partition; each node once, by name."""
    nodes: list[Node] = []
    for line in text.splitlines():
        words = [present(word) for word in line.split(SEPARATOR)]
        if len(words) < len(NODE_FIELDS):
            continue
        name, partition, state, cpus, gres, gres_used, mem, mem_used, features, reason = words[: len(NODE_FIELDS)]
        cpus_used, _, _, cpus_total = ([number(part) or 0 for part in cpus.split("/")] + [0] * 4)[:4]
        nodes.append(
            Node(
                name=name,
                states=node_states(state),
                partitions=(partition.rstrip("*"),),
                gpus=_gpus(gres, gres_used),
                cpus=cpus_total,
                cpus_used=cpus_used,
                mem_mb=number(mem) or 0,
                mem_used_mb=number(mem_used) or 0,
                features=features,
                reason=reason,
            )
        )
    return _merged(nodes)


def parse_nodes_json(text: str) -> list[Node]:
    """The nodes in what `sinfo -N --json` printed, in any version. Raises `UserError` if it is not such JSON."""
    rows = json_rows(text, "sinfo", "sinfo --json", "nodes")
    return _merged(
        [node for row in rows for node in (_nodes_of_group(row) if isinstance(row.get("nodes"), dict) else [_node_of_json(row)])]
    )


def _node_of_json(entry: dict[str, Any]) -> Node:
    """22.05's `nodes[]`, which `scontrol show node --json` of every later version has too."""
    return Node(
        name=str(entry.get("name", "")),
        states=node_states(entry.get("state", "UNKNOWN"), entry.get("state_flags")),
        partitions=tuple(entry.get("partitions") or ()),
        gpus=_gpus(entry.get("gres"), entry.get("gres_used")),
        cpus=number(entry.get("cpus")) or 0,
        cpus_used=number(entry.get("alloc_cpus")) or 0,
        mem_mb=number(entry.get("real_memory")) or 0,
        mem_used_mb=number(entry.get("alloc_memory")) or 0,
        features=_features(entry.get("features")),
        reason=present(entry.get("reason")),
    )


def _nodes_of_group(row: dict[str, Any]) -> list[Node]:
    """A row of `sinfo[]` (23.02 and later): nodes that are alike; with `-N` one."""
    gres, cpus, memory = row.get("gres") or {}, row.get("cpus") or {}, row.get("memory") or {}
    names = (row.get("nodes") or {}).get("nodes") or []
    partition = row.get("partition") or {}
    name_of_partition = partition.get("name", "") if isinstance(partition, dict) else str(partition)
    return [
        Node(
            name=name,
            states=node_states((row.get("node") or {}).get("state", "UNKNOWN")),
            partitions=(name_of_partition,) if name_of_partition else (),
            gpus=_gpus(gres.get("total"), gres.get("used")),
            cpus=(number(cpus.get("total")) or 0) // len(names),
            cpus_used=(number(cpus.get("allocated")) or 0) // len(names),
            mem_mb=number(memory.get("maximum")) or 0,
            mem_used_mb=number(memory.get("allocated")) or 0,
            features=_features((row.get("features") or {}).get("total")),
            reason=_reason(row.get("reason")),
        )
        for name in names
    ]


def _features(value: Any) -> str:
    return ",".join(str(word) for word in value) if isinstance(value, list) else present(value)


def _reason(value: Any) -> str:
    return present(value.get("description")) if isinstance(value, dict) else present(value)


def _gpus(gres: str | None, gres_used: str | None) -> dict[str, GpuCount]:
    total, used = gpu_counts(gres), gpu_counts(gres_used)
    if "gpu" in used and "gpu" not in total and len(total) == 1:  # a node whose use is told without the type
        used = {next(iter(total)): sum(used.values())}
    return {kind: GpuCount(count, used.get(kind, 0)) for kind, count in total.items()}


def _merged(nodes: list[Node]) -> list[Node]:
    """Each node once, with all partitions that it was listed under."""
    merged: dict[str, Node] = {}
    for node in nodes:
        known = merged.get(node.name)
        partitions = (*known.partitions, *node.partitions) if known else node.partitions
        merged[node.name] = node._replace(partitions=tuple(dict.fromkeys(partitions)))
    return list(merged.values())
