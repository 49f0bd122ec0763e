"""The text of slurm.conf, gres.conf and slurmdbd.conf for a private cluster. Pure functions of a layout."""

from pathlib import Path
from typing import NamedTuple

from slurm.client import slurm_commands
from slurm.cluster.layout import Layout, Node, Partition

CLUSTER_NAME = slurm_commands.PRIVATE_CLUSTER_NAME
PRETENDS = "SlurmdParameters=config_overrides"
"""The line that lets a node have less than it is said to have."""
DATABASE, DATABASE_USER = "slurm_acct_db", "slurm"


ADDRESS = "127.0.0.1"
"""Where daemons and commands find one another."""


class Place(NamedTuple):
    """Where and as whom the cluster runs. `ports`: of slurmctld, slurmdbd, then of each node's slurmd."""

    directory: Path
    host: str
    user: str
    ports: tuple[int, ...]
    is_closed: bool = True
    """Whether the machine's name stands for `ADDRESS`, so that daemons can be told to listen there alone."""

    @property
    def munge_socket(self) -> Path:
        return self.directory / "run" / "munge.sock"

    @property
    def database_socket(self) -> Path:
        return self.directory / "run" / "sql.sock"

    @property
    def slurmdbd_port(self) -> int:
        return self.ports[1]


def slurm_conf(layout: Layout, place: Place, first_job_id: int) -> str:
    """slurm.conf. Every line is there for a reason that a real Slurm 22.05 gave; the less plain ones are noted."""
    d, policy = place.directory, layout.policy
    lines = [
        f"ClusterName={CLUSTER_NAME}",
        f"SlurmctldHost={place.host}({ADDRESS})",
        f"SlurmctldPort={place.ports[0]}",
        f"SlurmUser={place.user}",
        f"SlurmdUser={place.user}",
        *_authentication(layout, place),
        # Daemons and srun listen on the address of the machine's name alone; by themselves they listen on every one. Any other than
        # ADDRESS won't do, not even 127.0.1.1: a step calls its srun back where the call came from, which on the loopback is 127.0.0.1.
        *(["CommunicationParameters=NoCtldInAddrAny,NoInAddrAny"] if place.is_closed else []),
        *_accounting(layout, place),
        f"StateSaveLocation={d}/state",
        f"SlurmdSpoolDir={d}/spool/%n",
        f"SlurmctldPidFile={d}/run/slurmctld.pid",
        f"SlurmdPidFile={d}/run/slurmd-%n.pid",
        f"SlurmctldLogFile={d}/log/slurmctld.log",
        f"SlurmdLogFile={d}/log/slurmd-%n.log",
        "MailProg=/bin/true",
        # cgroups would need root; without them memory and devices are counted but not enforced.
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SwitchType=switch/none",
        "MpiDefault=none",
        # Ids from 1 in each new cluster would meet the results of an earlier job of that number.
        f"FirstJobId={first_job_id}",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        # Without a default a job that asks for no memory takes all of its node.
        f"DefMemPerCPU={min(_default_mem_per_cpu(node) for node in layout.nodes)}",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=sched_interval=1,bf_interval=1,enable_user_top",
        "PriorityType=priority/basic",
        "GresTypes=gpu",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        f"JobRequeue={int(policy.requeues)}",
        f"KillWait={policy.kill_wait_s}",
        # One rank that dies takes the others with it; they would wait for it in a collective for ever.
        "KillOnBadExit=1",
        f"SlurmdTimeout={policy.node_timeout_s}",
        "ReturnToService=2",
        f"MinJobAge={policy.min_job_age_s}",
        f"MaxArraySize={policy.max_array_size}",
        f"MaxJobCount={policy.max_jobs}",
        # A job over its partition's limit is refused at once; by default it would be taken and wait for ever.
        "EnforcePartLimits=ALL",
        *(["SlurmctldParameters=preempt_send_user_signal"] if policy.warns_before_preemption else []),
        *([] if layout.is_real_hardware else [PRETENDS]),
        *layout.extra_lines,
        *(_node(node, place, port) for node, port in zip(layout.nodes, place.ports[2:], strict=True)),
        *(_partition(partition) for partition in layout.partitions),
    ]
    return "\n".join(lines) + "\n"


def gres_conf(layout: Layout, devices: dict[str, tuple[str, ...]]) -> str:
    """gres.conf, a line a GPU; `devices` maps each node to its GPUs' device files, in order.

    Only character devices give jobs a CUDA_VISIBLE_DEVICES; a link to /dev/null is one.
    """
    lines = ["AutoDetect=off"]
    for node in layout.nodes:
        for gpu, device in zip(node.gpus, devices[node.name], strict=True):
            lines.append(f"NodeName={node.name} Name=gpu Type={gpu.type} File={device}")
    return "\n".join(lines) + "\n"


def cgroup_conf(version: tuple[int, int]) -> str:
    """cgroup.conf for that version of Slurm, so that slurmd leaves cgroups alone: by itself it would want a systemd to make some.

    `disabled` is known from 24.05 on. Before, the plugin of version 1 loads anywhere and, as nothing here uses it, is never asked.
    """
    return f"CgroupPlugin={'disabled' if version >= (24, 5) else 'cgroup/v1'}\n"


def slurmdbd_conf(layout: Layout, place: Place) -> str:
    d = place.directory
    return "\n".join(
        [
            *(line for line in _authentication(layout, place) if line.startswith("Auth")),
            "DbdHost=localhost",
            f"DbdAddr={ADDRESS}",
            *(["CommunicationParameters=NoInAddrAny"] if place.is_closed else []),
            f"DbdPort={place.slurmdbd_port}",
            f"SlurmUser={place.user}",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",  # MariaDB's word for the socket that MYSQL_UNIX_PORT names
            f"StorageUser={DATABASE_USER}",
            f"StorageLoc={DATABASE}",
            f"LogFile={d}/log/slurmdbd.log",
            f"PidFile={d}/run/slurmdbd.pid",
            "",
        ]
    )


def _authentication(layout: Layout, place: Place) -> list[str]:
    # A requeued job waits until its credential has expired: cred_expire is the requeue delay.
    expire = f"cred_expire={layout.policy.requeue_delay_s}"
    return ["AuthType=auth/munge", f"AuthInfo=socket={place.munge_socket},{expire}", "CredType=cred/munge"]


def _accounting(layout: Layout, place: Place) -> list[str]:
    if not layout.accounting:
        return ["AccountingStorageType=accounting_storage/none", "JobAcctGatherType=jobacct_gather/none"]
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        f"AccountingStorageHost={ADDRESS}",
        f"AccountingStoragePort={place.slurmdbd_port}",
        # Else slurmctld and sacctmgr look for munge in /run.
        f"AccountingStoragePass={place.munge_socket}",
        "AccountingStorageTRES=gres/gpu",
        "AccountingStoreFlags=job_comment",
        "JobAcctGatherType=jobacct_gather/linux",
    ]


def _default_mem_per_cpu(node: Node) -> int:
    return max(100, min(2_000, node.mem_mb // node.cpus // 2))


def _node(node: Node, place: Place, port: int) -> str:
    types = list(dict.fromkeys(gpu.type for gpu in node.gpus))
    gres = ",".join(f"gpu:{kind}:{sum(gpu.type == kind for gpu in node.gpus)}" for kind in types)
    words = [f"NodeName={node.name} NodeHostname={place.host} NodeAddr={ADDRESS} Port={port} CPUs={node.cpus} RealMemory={node.mem_mb}"]
    return " ".join([*words, *([f"Gres={gres}"] if gres else []), "State=UNKNOWN"])


def _partition(partition: Partition) -> str:
    words = [f"PartitionName={partition.name} Nodes=ALL State=UP PriorityTier={partition.tier}"]
    words.append(f"MaxTime={partition.max_time_min or 'INFINITE'}")
    if partition.default_time_min:
        words.append(f"DefaultTime={partition.default_time_min}")
    if partition.max_nodes:
        words.append(f"MaxNodes={partition.max_nodes}")
    words.append(f"GraceTime={partition.grace_s}" if partition.preemptible else "PreemptMode=OFF")
    if partition.is_default:
        words.append("Default=YES")
    return " ".join(words)
