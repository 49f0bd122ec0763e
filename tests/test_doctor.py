"""What a cluster will do to a job, read from its configuration."""

import pytest

from pipeline.config.site_file import Site
from slurm.client.submit_limits import SubmitLimit
from slurm.cluster.daemons import PrivateCluster
from slurm.watching import doctor
from slurm.watching.doctor import Finding

# As a site with Slurm's own defaults has it.
STOCK = {
    "SLURM_VERSION": "23.11.4",
    "ClusterName": "big",
    "PreemptType": "preempt/none",
    "PreemptMode": "OFF",
    "JobRequeue": "1",
    "KillWait": "30 sec",
    "MinJobAge": "300 sec",
    "SlurmdTimeout": "300 sec",
    "MaxArraySize": "1001",
    "MaxJobCount": "10000",
    "SelectTypeParameters": "CR_CORE_MEMORY",
    "DefMemPerNode": "UNLIMITED",
    "AccountingStorageType": "accounting_storage/slurmdbd",
    "EnforcePartLimits": "NO",
    "KillOnBadExit": "0",
}
PARTITION = {"PartitionName": "gpu", "MaxTime": "2-00:00:00", "DefaultTime": "01:00:00", "State": "UP", "Nodes": "g[1-9]", "Default": "YES"}


def examine(changes: dict[str, str], *partitions: dict[str, str], sacct: bool = True) -> dict[str, Finding]:
    findings = doctor.examine(STOCK | changes, partitions or [PARTITION], sacct_answers=sacct)
    return {finding.subject: finding for finding in findings}


def test_a_stock_cluster_does_not_preempt_and_requeues_after_two_minutes() -> None:
    found = examine({})
    assert found["preemption"].fact == "off"
    assert not [subject for subject in found if subject.startswith("grace")]
    assert found["requeue delay"].fact == "120 s"
    assert found["KillWait"].fact == "30 s"
    assert found["finished jobs"].fact == "forgotten after 300 s"
    assert found["partition gpu (default)"].fact.startswith("time up to 2-00:00:00, default 01:00:00")


@pytest.mark.parametrize(
    ("mode", "meaning", "is_concern"),
    [
        ("REQUEUE", "a preempted run goes back to the queue and resumes", False),
        ("CANCEL", "Slurm cancels a preempted job; the run submits itself again, up to a number of attempts", True),
        ("SUSPEND,GANG", "a preempted job is suspended: it keeps its memory, and its GPUs' memory, and goes on later", True),
    ],
)
def test_each_way_to_preempt_is_told_by_what_it_means(mode: str, meaning: str, is_concern: bool) -> None:
    found = examine({"PreemptType": "preempt/qos", "PreemptMode": mode})["preemption"]
    assert (found.meaning, found.is_concern) == (meaning, is_concern)


def test_the_submit_limit_is_told_and_one_too_low_for_arrays_is_a_concern() -> None:
    limits = [SubmitLimit(500, "QOS", "your submit limit in qos normal"), SubmitLimit(5, "Assoc", "your submit limit")]
    found = {f.subject: f for f in doctor.examine(STOCK, [PARTITION], sacct_answers=True, limits=limits)}["queued at once"]
    assert (found.fact, found.is_concern) == ("your submit limit is 5", False)
    assert "queued as earlier ones end" in found.meaning
    (found,) = [
        f
        for f in doctor.examine(STOCK, [], sacct_answers=True, limits=[SubmitLimit(1, "Assoc", "your")])
        if f.is_concern and "arrays and chains" in f.meaning
    ]
    assert "queued at once" not in examine({})


def test_grace_is_told_for_each_partition_that_can_be_preempted() -> None:
    low = {"PartitionName": "low", "PreemptMode": "REQUEUE", "GraceTime": "0"}
    slow = {"PartitionName": "slow", "PreemptMode": "REQUEUE", "GraceTime": "300"}
    safe = {"PartitionName": "safe", "PreemptMode": "OFF", "GraceTime": "0"}
    found = examine({"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE", "KillWait": "5 sec"}, low, slow, safe)
    assert [subject for subject in found if subject.startswith("grace")] == ["grace in low", "grace in slow"]
    assert "only KillWait, 5 s" in found["grace in low"].meaning
    assert (found["grace in low"].is_concern, found["grace in slow"].is_concern) == (True, False)


def test_the_signal_before_preemption_is_told() -> None:
    preempting = {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"}
    assert examine(preempting)["preemption signal"].fact == "SIGTERM and SIGCONT only"
    with_signal = preempting | {"SlurmctldParameters": "enable_configless,preempt_send_user_signal"}
    assert examine(with_signal)["preemption signal"].fact.startswith("the job's own (--signal)")


def test_the_requeue_delay_is_the_credentials_lifetime_or_newer_slurms_own_setting() -> None:
    assert examine({"AuthInfo": "socket=/run/munge,cred_expire=5"})["requeue delay"].fact == "5 s"
    assert examine({"SchedulerParameters": "bf_interval=1,requeue_delay=30"})["requeue delay"].fact == "30 s"


def test_what_may_cost_work_is_a_concern() -> None:
    found = examine({"EnforcePartLimits": "NO", "KillWait": "3 sec"}, {**PARTITION, "State": "DRAIN"}, sacct=False)
    assert [s for s, finding in found.items() if finding.is_concern] == [
        "KillWait",
        "partition limits",
        "memory",
        "partition gpu (default)",
    ]
    assert found["accounting"].fact == "none (slurmdbd)"
    calm = examine({"EnforcePartLimits": "ALL", "DefMemPerCPU": "4000", "JobRequeue": "0"})
    assert [subject for subject, finding in calm.items() if finding.is_concern] == []
    assert "ask for it themselves" in calm["requeue"].meaning


@pytest.mark.slurm
def test_the_private_cluster_is_examined_as_it_is_configured(cluster: PrivateCluster) -> None:
    found = {finding.subject: finding for finding in doctor.gather(Site())}
    assert found["Slurm"].fact.endswith("cluster private")
    assert found["preemption"].fact == "partition_prio, mode REQUEUE"
    assert found["grace in low"].fact == "20 s"
    assert found["requeue delay"].fact == "5 s"
    assert found["KillWait"].fact == "3 s"
    assert found["partition short"].fact.startswith("time up to 01:00:00, default 00:10:00, at most 1 node a job")
    assert found["memory"].fact == "counted, default 1000 MiB"
    assert found["accounting"].fact == "none (none)"


@pytest.mark.parametrize("width", [60, 80, 120, None])
def test_every_finding_is_told_whole_in_any_width(width: int | None) -> None:
    findings = [
        doctor.Finding(
            "KillWait", "3 s", "between SIGTERM (cancel, requeue, time limit) and SIGKILL a run has 3 s to save", is_concern=True
        ),
        doctor.Finding("partition main (default)", "no time limit", "takes jobs"),
    ]
    for finding, lines in doctor.table(findings, width):
        assert max(map(len, lines)) <= (width or 1000)
        assert lines[0].startswith("!" if finding.is_concern else " ")
        assert f"{finding.subject} {finding.fact}: {finding.meaning}" in " ".join(" ".join(lines).split())
