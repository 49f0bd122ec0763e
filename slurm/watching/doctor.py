"""Where data and runs lie, what this cluster will do to a job by its own configuration, and what that means for these runs."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.config import site_file
from pipeline.config.clone import clone
from pipeline.config.errors import UserError
from pipeline.config.site_file import Site
from slurm.client import slurm_queries, submit_limits
from slurm.client.slurm_values import seconds
from slurm.client.submit_limits import SubmitLimit
from slurm.record.text_table import Column, lay_out

REQUEUE_DELAY_S = 120
"""What Slurm uses where AuthInfo names no cred_expire: the lifetime of a job's credential."""
COMFORTABLE_GRACE_S = 30
"""Enough for a checkpoint of a few GB."""


class Finding(NamedTuple):
    """One fact. `meaning` is what it means for these runs; `is_concern` marks what may cost work or surprise."""

    subject: str
    fact: str
    meaning: str
    is_concern: bool = False


def examine(
    settings: Mapping[str, str], partitions: Sequence[Mapping[str, str]], *, sacct_answers: bool, limits: Sequence[SubmitLimit] = ()
) -> list[Finding]:
    """All findings of a cluster whose `scontrol show config` and `show partition` gave `settings` and `partitions`.

    limits : on how many of my jobs may be queued at once.
    """
    kill_wait = _seconds(settings.get("KillWait")) or 30
    return [
        Finding(
            "Slurm", f"{settings.get('SLURM_VERSION', 'unknown version')}, cluster {settings.get('ClusterName', '?')}", _version(settings)
        ),
        *_preemption(settings, partitions, kill_wait),
        _requeue(settings),
        _requeue_delay(settings),
        _kill(kill_wait),
        _time_limit(settings),
        _arrays(settings),
        *(_submit_limit(limit) for limit in sorted(limits)[:1]),
        _memory(settings),
        _accounting(settings, sacct_answers),
        _forgetting(settings),
        _lost_node(settings),
        _bad_exit(settings),
        *(_partition(partition) for partition in partitions),
    ]


def gather(site: Site) -> list[Finding]:
    """What the site file says, then the findings of the cluster; where none answers, that and why."""
    try:
        return [*_site(site), *_cluster()]
    except UserError as error:
        return [*_site(site), Finding("Slurm", "no answer", str(error), is_concern=True)]


def _site(site: Site) -> list[Finding]:
    path = site_file.site_file()
    named = "CROSSCODER_SITE names it" if os.environ.get("CROSSCODER_SITE") else f"the one of the clone {clone()}"
    fact = str(path) if path else f"none; {clone() / 'configs' / 'site.yaml'} would be it"
    meaning = f"{named}; relative roots lie in the clone" if path else "everything stays in the clone"
    return [Finding("site file", fact, meaning), *(_root(name, getattr(site, name)) for name in ("data", "ssd", "runs"))]


def _root(name: str, path: Path) -> Finding:
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return Finding(f"{{{name}}}", str(path), f"can't be used: {there} is not a directory that you may write to", is_concern=True)
    return Finding(f"{{{name}}}", str(path), "is there" if there == path else "is made when it is first written to")


def _cluster() -> list[Finding]:
    """The findings of the cluster that answers here."""
    settings = slurm_queries.configuration()
    sacct_answers = slurm_queries.has_accounting(settings)
    return examine(settings, slurm_queries.partitions(), sacct_answers=sacct_answers, limits=submit_limits.of_me())


def _version(settings: Mapping[str, str]) -> str:
    found = re.match(r"(\d+)\.(\d+)", settings.get("SLURM_VERSION", ""))
    if found and (int(found[1]), int(found[2])) < (22, 5):
        return "older than 22.05, the oldest that these commands were tried with"
    return "known to these commands"


def _preemption(settings: Mapping[str, str], partitions: Sequence[Mapping[str, str]], kill_wait: int) -> list[Finding]:
    kind = settings.get("PreemptType", "")
    if not kind or kind.endswith("/none"):
        return [Finding("preemption", "off", "no job is pushed aside for another")]
    mode = settings.get("PreemptMode", "OFF").upper()
    signals = "preempt_send_user_signal" in settings.get("SlurmctldParameters", "")
    findings = [
        Finding(
            "preemption",
            f"{kind.removeprefix('preempt/')}, mode {mode}",
            _preempt_mode(mode),
            is_concern="CANCEL" in mode or "SUSPEND" in mode or "GANG" in mode,
        ),
        Finding(
            "preemption signal",
            "the job's own (--signal), then SIGTERM" if signals else "SIGTERM and SIGCONT only",
            "runs take either as the order to save and stop",
        ),
    ]
    for partition in partitions:
        if partition.get("PreemptMode", mode).upper() == "OFF":
            continue
        grace = int(partition.get("GraceTime") or 0)
        name = partition.get("PartitionName", "?")
        if grace:
            meaning = f"a preempted run has {grace} s to save before it is killed"
        else:
            meaning = (
                f"a preempted run has only KillWait, {kill_wait} s, to save; what it can't save in time is lost back to its last checkpoint"
            )
        findings.append(
            Finding(f"grace in {name}", f"{grace} s", meaning, is_concern=max(grace, kill_wait if not grace else 0) < COMFORTABLE_GRACE_S)
        )
    return findings


def _preempt_mode(mode: str) -> str:
    if "REQUEUE" in mode:
        return "a preempted run goes back to the queue and resumes"
    if "CANCEL" in mode:
        return "Slurm cancels a preempted job; the run submits itself again, up to a number of attempts"
    if "SUSPEND" in mode or "GANG" in mode:
        return "a preempted job is suspended: it keeps its memory, and its GPUs' memory, and goes on later"
    return "only partitions with a mode of their own preempt"


def _requeue(settings: Mapping[str, str]) -> Finding:
    if settings.get("JobRequeue", "1") == "0":
        return Finding(
            "requeue", "not by default (JobRequeue=0)", "runs ask for it themselves (--requeue), so they are requeued all the same"
        )
    return Finding("requeue", "allowed", "a run whose node fails, or that is preempted, is queued again and resumes")


def _requeue_delay(settings: Mapping[str, str]) -> Finding:
    named = re.search(r"requeue_delay=(\d+)", settings.get("SchedulerParameters", "")) or re.search(
        r"cred_expire=(\d+)", settings.get("AuthInfo", "")
    )
    delay = int(named[1]) if named else REQUEUE_DELAY_S
    return Finding(
        "requeue delay", f"{delay} s", f"a requeued run shows `waits until` for about {delay} s before it may start, on an idle cluster too"
    )


def _kill(kill_wait: int) -> Finding:
    return Finding(
        "KillWait",
        f"{kill_wait} s",
        f"between SIGTERM (cancel, requeue, time limit) and SIGKILL a run has {kill_wait} s to save",
        is_concern=kill_wait < 10,
    )


def _time_limit(settings: Mapping[str, str]) -> Finding:
    enforced = settings.get("EnforcePartLimits", "NO").upper() in ("ALL", "ANY", "YES")
    if enforced:
        return Finding("partition limits", "enforced at submission", "a run over its partition's limit is refused at once")
    fact = "not enforced at submission (EnforcePartLimits=NO)"
    return Finding("partition limits", fact, "Slurm takes a job over the limit and never starts it; `submit` checks first", is_concern=True)


def _arrays(settings: Mapping[str, str]) -> Finding:
    size, jobs = settings.get("MaxArraySize", "1001"), settings.get("MaxJobCount", "10000")
    return Finding("arrays", f"MaxArraySize {size}, MaxJobCount {jobs}", f"an array of more than {size} tasks is split into several")


def _submit_limit(limit: SubmitLimit) -> Finding:
    meaning = "jobs and tasks of arrays beyond it wait outside Slurm, and are queued as earlier ones end"
    if limit.num_jobs < 2:
        meaning = "a job that ends still counts, so none can queue another: arrays and chains are refused; use --executor local"
    return Finding("queued at once", limit.in_words, meaning, is_concern=limit.num_jobs < 2)


def _memory(settings: Mapping[str, str]) -> Finding:
    counted = "MEMORY" in settings.get("SelectTypeParameters", "").upper()
    default = settings.get("DefMemPerCPU") or settings.get("DefMemPerNode") or settings.get("DefMemPerGPU", "")
    if not counted:
        return Finding("memory", "not counted", "resources.mem_gb is not used to place jobs; nodes may run out")
    if default in ("", "UNLIMITED", "0"):
        meaning = "a run without resources.mem_gb takes all memory of its node, so nothing else runs there: give mem_gb"
        return Finding("memory", "counted, no default", meaning, is_concern=True)
    return Finding("memory", f"counted, default {default} MiB", "a run without resources.mem_gb gets the default")


def _accounting(settings: Mapping[str, str], sacct_answers: bool) -> Finding:
    if sacct_answers:
        return Finding("accounting", "sacct answers", "how a job ended is known for long; it may lag seconds behind the queue")
    kind = settings.get("AccountingStorageType", "").removeprefix("accounting_storage/") or "none"
    return Finding(
        "accounting", f"none ({kind})", "no sacct: how runs ended is read from their directories, and no command waits for sacct"
    )


def _forgetting(settings: Mapping[str, str]) -> Finding:
    age = _seconds(settings.get("MinJobAge")) or 300
    return Finding("finished jobs", f"forgotten after {age} s", "`crosscoder jobs` remembers them through their run directories")


def _lost_node(settings: Mapping[str, str]) -> Finding:
    timeout = _seconds(settings.get("SlurmdTimeout")) or 300
    meaning = (
        f"a run on a node that dies is queued again after about {timeout} s; one that lives on unseen is stopped by the lock of its run"
    )
    return Finding("lost node", f"counted as down after {timeout} s", meaning)


def _bad_exit(settings: Mapping[str, str]) -> Finding:
    if settings.get("KillOnBadExit", "0") == "1":
        return Finding("failed rank", "ends its job", "a torch.distributed group never waits for a dead rank")
    return Finding("failed rank", "leaves the others running", "runs ask srun to end the job all the same (--kill-on-bad-exit)")


def _partition(partition: Mapping[str, str]) -> Finding:
    limit, default = partition.get("MaxTime", "?"), partition.get("DefaultTime", "NONE")
    nodes, state = partition.get("MaxNodes", "UNLIMITED"), partition.get("State", "UP")
    words = [f"time up to {limit}" if limit != "UNLIMITED" else "no time limit"]
    words += [f"default {default}"] if default not in ("NONE", "") else []
    words += [f"at most {nodes} {'node' if nodes == '1' else 'nodes'} a job"] if nodes not in ("UNLIMITED", "") else []
    words += [f"priority tier {partition.get('PriorityTier', '1')}", f"nodes {partition.get('Nodes', '')}"]
    default_words = " (default)" if partition.get("Default") == "YES" else ""
    return Finding(
        f"partition {partition.get('PartitionName', '?')}{default_words}",
        ", ".join(words),
        "takes jobs" if state == "UP" else f"is {state}: jobs wait or are refused",
        is_concern=state != "UP",
    )


def _seconds(text: str | None) -> int | None:
    """`30 sec`, as scontrol writes durations of its configuration."""
    match = re.match(r"(\d+) sec$", text or "")
    return int(match[1]) if match else seconds(text or "")


def table(findings: Sequence[Finding], width: int | None = None) -> list[tuple[Finding, list[str]]]:
    """Each finding with the lines to print of it; `!` marks a concern."""
    rows = [["!" if f.is_concern else " ", f.subject, f"{f.fact}: {f.meaning}"] for f in findings]
    return list(zip(findings, lay_out((Column(""), Column("WHAT"), Column("IS AND MEANS")), rows, width, is_prose=True).rows, strict=True))
