"""What Slurm's commands print, read alike in every version."""

import math
import time
from typing import Any

import pytest
import slurm_shapes

from pipeline.config.errors import UserError
from slurm.client import job_output, node_output, slurm_values
from slurm.client.job_output import Job
from slurm.client.node_output import GpuCount, Node
from slurm.client.slurm_values import SEPARATOR

# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, 5),
        ("5", 5),
        (-3, -3),
        (80.0, 80),
        (None, None),
        (True, None),
        ("N/A", None),
        (math.inf, None),
        ({"set": True, "infinite": False, "number": 7}, 7),
        ({"set": False, "infinite": False, "number": 7}, None),
        ({"set": True, "infinite": True, "number": 0}, None),
    ],
)
def test_an_integer_that_may_be_unset_is_read_in_every_form(value: Any, expected: int | None) -> None:
    assert slurm_values.number(value) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:02", 2),
        ("10:00", 600),
        ("1:02:03", 3723),
        ("2-03:04:05", 2 * 86400 + 3 * 3600 + 4 * 60 + 5),
        ("365-00:00:00", 365 * 86400),
        ("30", 1800),
        ("2-12", 2 * 86400 + 12 * 3600),
        ("2-12:30", 2 * 86400 + 12 * 3600 + 30 * 60),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_a_duration_is_read_as_slurm_writes_it(text: str, expected: int | None) -> None:
    assert slurm_values.seconds(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("1000M", 1000), ("4G", 4096), ("1.50T", 1_572_864), ("512", 512), ("4Gn", 4096), ("", None)]
)
def test_memory_is_read_in_mebibytes(text: str, expected: int | None) -> None:
    assert slurm_values.megabytes(text) == expected


def test_a_moment_is_read_in_local_time_and_none_has_none() -> None:
    moment = slurm_values.moment("2026-11-23T09:14:33")
    assert moment is not None
    assert time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(moment)) == "2026-11-23T09:14:33"
    assert slurm_values.moment("Unknown") is None


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("gpu:h200:2", {"h200": 2}),
        ("gpu:h200:2(S:0-1)", {"h200": 2}),
        ("gpu:4(S:0-1)", {"gpu": 4}),
        ("gpu:h200:1(IDX:0,2),gpu:a100:2(IDX:1,3)", {"h200": 1, "a100": 2}),
        ("tmpsize:7T,gpu:l40s:4(S:0-1)", {"l40s": 4}),
        ("gpu:1080:4", {"1080": 4}),
        ("gpu:a100:0(IDX:N/A),shard:0(0/8)", {"a100": 0}),
        ("gres:gpu:h200:1", {"h200": 1}),
        ("gres/gpu:h200=3", {"h200": 3}),
        ("shard:8", {}),
        ("(null)", {}),
        ("", {}),
        (None, {}),
    ],
)
def test_gpus_are_counted_by_type(gres: str | None, expected: dict[str, int]) -> None:
    assert slurm_values.gpu_counts(gres) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("RUNNING", "RUNNING"),
        ("CANCELLED by 1000", "CANCELLED"),
        ("CANCELLED+", "CANCELLED"),
        (["RUNNING"], "RUNNING"),
        (["COMPLETED", "COMPLETING"], "COMPLETING"),
        (["PENDING", "REQUEUED"], "REQUEUED"),
        ([], "UNKNOWN"),
        ("", "UNKNOWN"),
    ],
)
def test_a_jobs_state_reads_as_squeue_says_it(value: Any, expected: str) -> None:
    assert job_output.job_state(value) == expected


@pytest.mark.parametrize(
    ("value", "flags", "expected"),
    [
        ("idle", [], ("IDLE",)),
        ("idle", ["DRAIN"], ("IDLE", "DRAIN")),
        (["IDLE", "DRAIN"], None, ("IDLE", "DRAIN")),
        ("down*", [], ("DOWN", "NOT_RESPONDING")),
        ("IDLE+DRAIN+NOT_RESPONDING", [], ("IDLE", "DRAIN", "NOT_RESPONDING")),
        ("mixed-", [], ("MIXED", "PLANNED")),
        ("maint$", [], ("MAINT",)),
    ],
)
def test_a_nodes_states_are_a_base_and_flags(value: Any, flags: Any, expected: tuple[str, ...]) -> None:
    assert node_output.node_states(value, flags) == expected


@pytest.mark.parametrize("flag", ["DRAIN", "NOT_RESPONDING", "MAINT", "INVALID_REG", "RESERVED", "FAIL"])
def test_what_is_free_on_a_node_out_of_service_can_not_be_had(flag: str) -> None:
    assert Node("n1", ("IDLE",)).takes_jobs
    assert Node("n1", ("MIXED", "PLANNED")).takes_jobs
    assert not Node("n1", ("IDLE", flag)).takes_jobs


# -- every version's JSON ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", slurm_shapes.VERSIONS)
def test_every_versions_json_gives_the_same_jobs(version: str) -> None:
    running, cancelled, ending, waiting = job_output.parse_jobs_json(slurm_shapes.squeue(version))
    assert running._replace(elapsed_s=0) == Job(
        id="1042",
        state="RUNNING",
        nodes="n1",
        partition="main",
        limit_s=3600,
        gpus="gpu:h200:2",
        priority=4_294_901_759,
        started=1_755_290_346.0,
        submitted=1_755_290_000,
        raw_id="1042",
        name="train-demo",
        comment='{"run":"a|b"}',
        requested="cpu=1,mem=1000M,node=1,billing=1",
        required_nodes="n1",
        mem_mb=4096,
        num_restarts=2,
    )
    assert abs(running.elapsed_s - (time.time() - 1_755_290_346)) < 60
    assert (cancelled.state, cancelled.reason, cancelled.limit_s, cancelled.started) == (
        "CANCELLED",
        "DependencyNeverSatisfied",
        None,
        None,
    )
    assert (ending.id, ending.raw_id, ending.array_id, ending.state, ending.throttle) == ("1044_0", "1047", "1044", "COMPLETING", 1)
    assert (waiting.id, waiting.state, waiting.reason, waiting.limit_s) == ("1044_[1-3%1]", "PENDING", "JobArrayTaskLimit", 600)


@pytest.mark.parametrize("version", slurm_shapes.VERSIONS)
def test_every_versions_json_gives_the_same_nodes(version: str) -> None:
    sizes = {"cpus": 64, "cpus_used": 8, "mem_mb": 512_000, "mem_used_mb": 16_000}
    assert node_output.parse_nodes_json(slurm_shapes.sinfo(version)) == [
        Node("n1", ("MIXED",), ("main", "low"), {"h200": GpuCount(2, 1)}, **sizes),
        Node("n2", ("IDLE", "DRAIN"), ("main",), {"a100": GpuCount(4, 0)}, **sizes, reason="bad fan"),
        Node("n3", ("DOWN", "NOT_RESPONDING"), ("main",), {"a100": GpuCount(1, 0)}, **sizes, reason="Not responding"),
        Node("c1", ("IDLE",), ("cpu",), {}, **sizes),
    ]


def test_what_is_not_slurms_json_is_said() -> None:
    with pytest.raises(UserError, match=r"`squeue --json` did not print JSON .* it began: 'slurm_load_jobs error'"):
        job_output.parse_jobs_json("slurm_load_jobs error")
    with pytest.raises(UserError, match="printed JSON without 'sinfo'; it holds: meta, errors"):
        node_output.parse_nodes_json('{"meta": {}, "errors": []}')


# -- text -------------------------------------------------------------------------------------------------------------


def squeue_line(**changes: str) -> str:
    words = dict.fromkeys(job_output.JOB_FIELDS, "N/A") | {"%i": "1042_3", "%T": "RUNNING", "%r": "None", "%N": "n1", "%P": "main"}
    words |= {"%l": "1:00:00", "%M": "5:07", "%b": "gres:gpu:h200:1", "%Q": "12", "%F": "1042", "%A": "1046", "%j": "train", "%k": "(null)"}
    return SEPARATOR.join((words | changes).values())


def test_squeues_text_is_read_with_any_comment() -> None:
    comment = '{"run": "a|b"}; and "quotes", commas'
    (job,) = job_output.parse_squeue(squeue_line(**{"%k": comment}) + "\n")
    assert job == Job(
        "1042_3", "RUNNING", "", "n1", "main", 3600, 307, "gpu:h200:1", 12, array_id="1042", raw_id="1046", name="train", comment=comment
    )


def test_a_line_break_in_a_comment_hides_no_other_job() -> None:
    text = squeue_line(**{"%k": "first\nsecond"}) + "\n" + squeue_line(**{"%i": "1050"})
    assert [job.id for job in job_output.parse_squeue(text)] == ["1042_3", "1050"]


def test_sinfos_text_gives_each_node_once_with_all_its_partitions() -> None:
    rows = [("n1", "main*", "mixed"), ("n1", "low", "mixed"), ("n2", "main*", "idle+drain")]
    text = ""
    for name, partition, state in rows:
        words = [name, partition, state, "2/6/0/8", "gpu:h200:2", "gpu:h200:1(IDX:1)", "16000", "2000", "(null)", "none"]
        text += "".join(word + SEPARATOR for word in words) + "\n"
    n1, n2 = node_output.parse_sinfo(text)
    assert n1 == Node("n1", ("MIXED",), ("main", "low"), {"h200": GpuCount(2, 1)}, 8, 2, 16_000, 2_000)
    assert (n2.name, n2.takes_jobs) == ("n2", False)


def test_use_told_without_the_type_counts_for_the_one_type_there_is() -> None:
    words = ["n1", "main", "mixed", "2/6/0/8", "gpu:h200:4(S:0-1)", "gpu:3(IDX:0-2)", "16000", "2000", "(null)", "none"]
    (node,) = node_output.parse_sinfo("".join(word + SEPARATOR for word in words))
    assert node.gpus == {"h200": GpuCount(4, 3)}


def test_of_a_requeued_job_accounting_gives_the_newest_run() -> None:
    def line(state: str, start: str, node: str) -> str:
        words = ["1042", state, "3:0", node, "00:00:05", start, "Unknown", "01:00:00", "main", "train", ""]
        return SEPARATOR.join(words)

    text = "\n".join([line("FAILED", "2026-11-23T10:00:00", "n2"), line("REQUEUED", "2026-11-23T09:00:00", "n1")])
    (job,) = job_output.parse_sacct(text)
    assert (job.state, job.nodes, job.reason) == ("FAILED", "n2", "exit code 3")
    (killed,) = job_output.parse_sacct(line("FAILED", "2026-11-23T10:00:00", "n2").replace("3:0", "0:9"))
    assert killed.reason == "ended by signal 9"


def test_scontrols_records_keep_spaces_and_name_the_arrays_tasks() -> None:
    text = (
        "JobId=1047 ArrayJobId=1044 ArrayTaskId=0 ArrayTaskThrottle=2 JobName=a b Priority=7 Nice=3 JobState=RUNNING Reason=None "
        "TimeLimit=00:10:00 Partition=low ReqNodeList=n2 MinMemoryNode=4G TresPerNode=gres:gpu:1 ReqTRES=cpu=1,mem=4G\n"
        "JobId=1044 ArrayJobId=1044 ArrayTaskId=1-3%2 JobState=PENDING Reason=JobArrayTaskLimit TRES=cpu=2 TimeLimit=UNLIMITED\n"
    )
    first, rest = job_output.parse_scontrol(text)
    assert (first.id, first.name, first.nice, first.limit_s, first.required_nodes) == ("1044_0", "a b", 3, 600, "n2")
    assert (first.mem_mb, first.gpus, first.requested, first.throttle) == (4096, "gpu:1", "cpu=1,mem=4G", 2)
    assert (rest.id, rest.requested, rest.limit_s) == ("1044_[1-3%2]", "cpu=2", None)


def test_the_configuration_is_read_with_its_empty_values() -> None:
    text = "Configuration data as of 2026-11-23\nKillWait           = 30 sec\nDebugFlags         = (null)\nAuthInfo = cred_expire=5\n"
    assert slurm_values.parse_config(text) == {"KillWait": "30 sec", "DebugFlags": "", "AuthInfo": "cred_expire=5"}
