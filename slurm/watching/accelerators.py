"""Every GPU that a job could go to: by type, memory, total, used and free, on Slurm's nodes and on machines outside it."""

import re
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.client import slurm_commands, slurm_queries
from slurm.client.node_output import Node
from slurm.client.slurm_values import ranges
from slurm.cluster import hardware
from slurm.cluster.hardware import NvidiaGpu
from slurm.record.text_table import Column, lay_out
from slurm.watching import machines
from slurm.watching.machines import Machine

# GB as NVIDIA counts them, 2**30 bytes (an H200 of 141 GB shows 143,771 MiB). Only types that come in one size: an a100 or
# h100 comes in several. The site file's figures win.
KNOWN_MEMORY_GB = {
    "h200": 141.0,
    "l40s": 48.0,
    "l40": 48.0,
    "a40": 48.0,
    "a10": 24.0,
    "l4": 24.0,
    "t4": 16.0,
    "rtxa6000": 48.0,
    "rtx4090": 24.0,
}


MOST_ROWS = 30
"""Where there are more, nodes that read alike share a row."""
LONGEST_NAME = 30


class Row(NamedTuple):
    """GPUs of one type on one node."""

    node: str
    type: str
    memory_gb: float | None
    total: int
    used: int
    free: int
    """Total less used; 0 on a node that takes no jobs."""
    state: str
    partitions: list[str]
    note: str
    """Why the node is out of service, or why a machine gave no answer."""
    in_slurm: bool = True


def rows_of_nodes(nodes: Sequence[Node], memory_gb: Mapping[str, float]) -> list[Row]:
    """A row for each type of GPU of each of Slurm's nodes; a node without GPUs has none."""
    return [
        Row(
            node=node.name,
            type=kind,
            memory_gb=memory_gb.get(kind),
            total=count.total,
            used=count.used,
            free=max(0, count.total - count.used) if node.takes_jobs else 0,
            state="+".join(node.states).lower(),
            partitions=list(node.partitions),
            note=node.reason if not node.takes_jobs else "",
        )
        for node in nodes
        for kind, count in node.gpus.items()
    ]


def rows_of_machine(machine: Machine) -> list[Row]:
    """The same for a machine outside Slurm; one that did not answer has a row that says so."""
    if machine.error:
        return [Row(machine.host, "", None, 0, 0, 0, "no answer", [], machine.error, in_slurm=False)]
    rows = []
    for name in dict.fromkeys(gpu.name for gpu in machine.gpus):
        alike = [gpu for gpu in machine.gpus if gpu.name == name]
        used = sum(machines.is_in_use(gpu) for gpu in alike)
        free = len(alike) - used
        rows.append(Row(machine.host, hardware.type_name(name), _memory_gb(alike[0]), len(alike), used, free, "up", [], "", in_slurm=False))
    return rows


def _memory_gb(gpu: NvidiaGpu) -> float | None:
    return round(gpu.memory_mib / 1024, 1) if gpu.memory_mib is not None else None


class NoAccelerators(UserError):
    """There is nothing to list; the message says where was looked."""


def gather(site: Site) -> list[Row]:
    """All rows: Slurm's nodes, this machine where it is in no Slurm, then the site file's machines.

    Raises `NoAccelerators` where there is neither Slurm nor a GPU nor a machine to ask.
    """
    has_slurm = slurm_commands.is_installed("sinfo") and _slurm_answers()
    local = hardware.local_gpus()
    memory_gb = KNOWN_MEMORY_GB | {hardware.type_name(gpu.name): size for gpu in local if (size := _memory_gb(gpu)) is not None}
    nodes = slurm_queries.all_nodes() if has_slurm else []
    rows = rows_of_nodes(nodes, memory_gb | site.gpu_memory_gb)
    here = hardware.host_name()
    if local and not any(node.name == here and node.gpus for node in nodes):
        rows += rows_of_machine(Machine(f"{here} (this machine)", local))
    for machine in machines.ask_all([machine.host for machine in site.machines]):
        rows += rows_of_machine(machine)
    if not rows:
        raise NoAccelerators(_nothing(nodes, has_slurm))
    return rows


def _slurm_answers() -> bool:
    """Whether Slurm is set up here: its commands may be installed on a machine that belongs to no cluster."""
    try:
        slurm_commands.run("scontrol", "ping")
    except slurm_commands.CommandFailed as error:
        if error.is_without_cluster:
            return False
        raise
    return True


def _nothing(nodes: Sequence[Node], has_slurm: bool) -> str:
    here = f"{socket.gethostname()} has no GPU (nvidia-smi finds none)"
    if has_slurm:
        return f"none of the {len(nodes)} nodes of this cluster has a GPU; stages run on their CPUs"
    if slurm_commands.stopped_private_cluster():
        return f"{slurm_commands.CLUSTER_STOPPED}; {here}, and the site file names no machines"
    return f"{here} and no Slurm, and the site file names no machines; stages run on this machine's CPUs with --executor local"


class Total(NamedTuple):
    type: str
    total: int
    used: int
    free: int


def totals(rows: Sequence[Row]) -> list[Total]:
    """Sums by type, over all nodes and machines."""
    kinds = dict.fromkeys(row.type for row in rows if row.total)
    return [Total(k, *(sum(getattr(row, field) for row in rows if row.type == k) for field in ("total", "used", "free"))) for k in kinds]


COLUMNS = (
    *(Column("NODE"), Column("TYPE"), Column("MEMORY", is_right=True, dropped=1)),
    *(Column("TOTAL", is_right=True), Column("USED", is_right=True), Column("FREE", is_right=True)),
    *(Column("STATE"), Column("PARTITIONS", dropped=2), Column("NOTE")),
)


def fold(rows: Sequence[Row]) -> list[Row]:
    """The rows of nodes that read alike as one row, with the sums of their GPUs, where the first of them stood."""
    alike: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        alike.setdefault((row.type, row.total, row.used, row.free, row.state, *row.partitions, row.note, row.in_slurm), []).append(row)
    return [_together(group) for group in alike.values()]


def _together(rows: Sequence[Row]) -> Row:
    """One row for `rows`, which differ in nothing but their nodes' names; a long list of those stands in the note."""
    total, used, free = (sum(counts) for counts in zip(*((row.total, row.used, row.free) for row in rows), strict=True))
    names, note = host_list([row.node for row in rows]), rows[0].note
    if len(names) > LONGEST_NAME and len(rows) > 1:
        names, note = f"{len(rows)} nodes", "; ".join(filter(None, (note, names)))
    return rows[0]._replace(node=names, total=total, used=used, free=free, note=note)


def host_list(names: Sequence[str]) -> str:
    """`n[1-3,7],login`: names as Slurm writes them, numbers of one length after one prefix together."""
    numbers: dict[tuple[str, int], list[int]] = {}
    for name in names:
        prefix = name.rstrip("0123456789")
        numbers.setdefault((prefix, len(name) - len(prefix)), []).append(int(name[len(prefix) :] or 0))
    return ",".join(_numbered(prefix, length, of) for (prefix, length), of in numbers.items())


def _numbered(prefix: str, length: int, numbers: list[int]) -> str:
    if not length:
        return prefix
    text = re.sub(r"\d+", lambda number: number[0].zfill(length), ranges(numbers))
    return f"{prefix}[{text}]" if len(numbers) > 1 else f"{prefix}{text}"


def table(rows: Sequence[Row], width: int | None = None) -> list[str]:
    """The lines to print: a row a node and type, or where there are many, for nodes that read alike; then the sums by type."""
    if len(rows) > MOST_ROWS:
        rows = fold(rows)
    texts = [_cells(row) for row in rows]
    sums = [["all", total.type, "", str(total.total), str(total.used), str(total.free), "", "", ""] for total in totals(rows)]
    layout = lay_out(COLUMNS, [*texts, *sums], width)
    return [
        layout.header,
        *(line for lines in layout.rows[: len(rows)] for line in lines),
        "",
        *(line for (line,) in layout.rows[len(rows) :]),
    ]


def _cells(row: Row) -> list[str]:
    memory = f"{row.memory_gb:g} GB" if row.memory_gb is not None else "" if row.note and not row.type else "?"
    place = ",".join(row.partitions) if row.in_slurm else "(outside Slurm)"
    return [row.node, row.type, memory, str(row.total), str(row.used), str(row.free), row.state, place, row.note]
