"""What `show`, `compare` and `verify` say of runs, from run directories alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import records
from pipeline.config import yaml_file
from pipeline.config.errors import UserError
from pipeline.config.schema import Config
from pipeline.config.train_crosscoder import Optimizer
from slurm.record import comparison, record_view, run_directory
from slurm.record.run_directory import RunDirectory
from slurm.record.run_reference import Named, find
from slurm.record.text_table import Column, figure, lay_out
from slurm.record.verification import verify

NOW = 1_795_424_000.0
ENVIRONMENT = {"python_version": "3.11.7", "torch": "2.13.0", "packages": {"numpy": "2.0"}, "user": "ana"}


def make_run(
    runs: Path, result: dict[str, Any] | None = None, *, config: dict[str, Any] | None = None, num_tasks: int = 1, **job: Any
) -> RunDirectory:
    run = run_directory.create(runs, "count", "demo")
    values = {"stage": "count", "name": "demo", "tokens": "/data/tokens", **(config or {})}
    (run.path / "config.yaml").write_text(yaml_file.write(values))
    records.write_json(run.path / "code.json", {"hash": "c" * 64, "commit": "d" * 40, "edited": False, "files": {"a.py": "1", "b.py": "2"}})
    records.write_json(run.path / "environment.json", ENVIRONMENT)
    plain = {"stage": "count", "name": "demo", "executor": "slurm", "cluster": "dev", "submitted": NOW, "submitted_by": "ana@login"}
    plain |= {"command": ["crosscoder", "submit", "count.yaml"], "num_tasks": num_tasks, "after": [], "jobs": [], "changes": []}
    run.write_job({**plain, **job})
    if result is not None:
        ended = {"status": "finished", "started": NOW, "ended": NOW + 162, "error": None, "result": result}
        records.write_json(run.path / "result.json", ended)
    return run


def change(what: dict[str, Any], how: str = "scontrol") -> dict[str, Any]:
    return {"time": NOW, "by": "ana@login", "what": what, "how": how}


# -- show -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("was stopped (SIGTERM); requeued as job 1042", "stopped (SIGTERM): requeued as job 1042"),
        ("was stopped; stays as it is", "stopped: stays as it is"),
        ("was stopped", "stopped"),
        ("its node died", "stopped: its node died"),
        ("", "stopped"),
    ],
)
def test_a_state_has_its_cause_beside_it_and_no_empty_part(tmp_path: Path, reason: str, said: str) -> None:
    run = make_run(tmp_path)
    assert record_view.as_text(run, {0: ("stopped", reason)}).splitlines()[0] == f"{run.reference}: {said}"


def test_results_come_first_in_five_digits_and_speed_last_of_them(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"seconds": 161.65204604999963, "loss": 43.442677782166676, "tokens": 1000000, "by_layer": [0.93267834, 1.0]})
    head, empty, title, *lines = record_view.as_text(run).splitlines()
    assert head.startswith(f"{run.reference}: finished in 2 min 42 s, ")
    assert (empty, title) == ("", "results")
    assert [line.split(maxsplit=1) for line in lines[:4]] == [
        ["loss", "43.443"],
        ["tokens", "1,000,000"],
        ["by_layer", "0.93268, 1"],
        ["seconds", "161.65"],
    ]
    assert json.loads(json.dumps(record_view.as_values(run)))["tasks"][0]["result"]["result"]["loss"] == 43.442677782166676


def test_only_settings_that_are_not_at_their_defaults_are_shown_unless_asked(tmp_path: Path) -> None:
    run = make_run(tmp_path, config={"seed": 7, "resources": {"cpus": 1, "timeout_min": 5}})
    text = record_view.as_text(run)
    shown = text[text.index("settings that are not") : text.index("record")].splitlines()[1:]
    assert [line.split() for line in shown if line] == [
        *(["seed", "7"], ["resources.timeout_min", "5"], ["tokens", "/data/tokens"]),
    ]
    assert "config.yaml\n  stage: count" in record_view.as_text(run, whole_config=True)


def test_settings_of_a_run_that_other_code_froze_are_shown_whole(tmp_path: Path) -> None:
    text = record_view.as_text(make_run(tmp_path, config={"gone_since": 3}))
    assert "\nsettings\n" in text
    assert "gone_since  3" in text.replace("  gone_since", "gone_since")


def test_attempts_are_a_line_each_and_old_ones_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for restart in range(8):
        where = {"job": "1042", "restart": restart, "host": "n1", "time": NOW + 100 * restart}
        run_directory.append_line(run.path / "attempts.jsonl", {"event": "start", **where})
        if restart != 3:
            how = {"status": "stopped", "next": "requeued as job 1042"}
            run_directory.append_line(run.path / "attempts.jsonl", {"event": "end", **where, **how, "time": where["time"] + 60})
    text = record_view.as_text(run)
    lines = text[text.index("attempts (2 earlier ones") :].splitlines()[1:7]
    assert lines[0].endswith("job 1042 (restart 2)  on n1  stopped after 1 min 0 s; requeued as job 1042")
    assert lines[1].endswith("job 1042 (restart 3)  on n1  ended without a word: killed, or its node was lost")


def test_the_queue_has_the_word_on_what_has_not_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert record_view.as_text(run, {0: ("waiting", "waits for nodes to become free")}).startswith(
        f"{run.reference}: waiting: waits for nodes to become free\n"
    )
    for reason in (
        "was cancelled; `crosscoder submit --resume x` goes on from there",
        "it needed cache/demo/x, which failed or was cancelled",
    ):
        said = reason.removeprefix("was cancelled; ")
        assert record_view.as_text(run, {0: ("cancelled", reason)}).startswith(f"{run.reference}: cancelled: {said}\n")
    assert record_view.as_values(run, {0: ("held", "held by you")})["tasks"][0]["queue"] == {"state": "held", "reason": "held by you"}


def test_of_an_array_of_hundreds_only_tasks_that_run_or_need_a_look_are_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_tasks=300)
    for task, status in ((7, "failed"), (8, "finished")):
        records.write_json(
            run.task_directory(task) / "result.json", {"status": status, "error": "no disk" if task == 7 else None, "result": {}}
        )
    text = record_view.as_text(run)
    head = text.splitlines()
    assert head[0] == f"{run.reference}: 298 new, 1 failed, 1 finished"
    assert head[1:4] == ["  task 7    failed", "    error: no disk", ""]


@pytest.mark.parametrize(
    ("what", "how", "expected"),
    [
        ({"timeout_min": [5, 7], "partition": [None, "low"]}, "scontrol", "timeout_min 5 -> 7, partition null -> low"),
        ({"optimizer.lr": [1e-3, 1e-4], "dependants": []}, "1 submitted anew as 2", "optimizer.lr 0.001 -> 0.0001 (1 submitted anew as 2)"),
        ({"seed": [0, 1], "dependants": ["7"]}, "1 submitted anew as 2", "seed 0 -> 1, 7 now waits for it (1 submitted anew as 2)"),
        ({"cancelled": [f"9_{i}" for i in range(300)]}, "scancel", "cancelled 9_0, 9_1, 9_2, 9_3 and 296 more"),
        ({"held": ["9"]}, "scontrol", "held 9"),
        ({"nice": 5}, "scontrol", "nice 5"),
        ({"after": [["/runs/cache/a/x"], []]}, "scontrol", "after cache/a/x -> none"),
        ({"group": [{"kind": "relu"}, {"kind": "topk", "k": 4}]}, "scontrol", "group kind=relu -> kind=topk k=4"),
    ],
)
def test_a_change_reads_as_a_sentence(what: dict[str, Any], how: str, expected: str) -> None:
    assert record_view.change_text(change(what, how)) == expected


def test_the_jobs_that_a_change_replaced_stand_beside_the_one_that_counts(tmp_path: Path) -> None:
    entries = [{"id": str(job), "tasks": [0], "array": False} for job in (1042, 1043, 1044)]
    assert "slurm on dev; job 1044 (before it 1042, 1043)" in record_view.as_text(make_run(tmp_path, jobs=entries))


def test_a_configuration_tells_what_was_chosen_with_the_kind_of_each_group() -> None:
    class Group(Config):
        kind: str = "plain"
        size: int = 3

    class Outer(Config):
        group: Group
        other: Group = Group()
        rate: float = 0.1

    assert Outer(group=Group(), rate=0.1).chosen() == {"group": {"kind": "plain"}}
    assert Outer(group=Group(size=4), other=Group(size=5)).chosen() == {
        "group": {"kind": "plain", "size": 4},
        "other": {"kind": "plain", "size": 5},
    }
    assert Optimizer(beta1=0.5).chosen() == {"beta1": 0.5}


# -- compare ----------------------------------------------------------------------------------------------------------


def test_times_are_no_difference_of_results(tmp_path: Path) -> None:
    first = make_run(tmp_path, {"loss": 1.0, "seconds": 3.25, "tokens_per_second": 10.0, "seconds_held_out": 1})
    second = make_run(tmp_path, {"loss": 1.0, "seconds": 4.5, "tokens_per_second": 11.0, "seconds_held_out": 1})
    differences = comparison.compare_runs(Named(first), Named(second))
    assert differences["results"] == []
    assert [row["name"] for row in differences["speed"]] == ["seconds", "tokens_per_second"]
    text = comparison.as_text(Named(first), Named(second), differences)
    assert "the same: config, code, environment, inputs, results" in text
    assert "seconds            3.25  -> 4.5" in text


@pytest.mark.parametrize("name", ["seconds", "tokens_per_second", "3.seconds", "harvest.seconds", "train_seconds"])
def test_names_that_measure_time_are_known(name: str) -> None:
    assert comparison.is_speed(name)


@pytest.mark.parametrize("name", ["loss", "second_moment", "dead_fraction", "tokens", "l0_per_token"])
def test_other_names_are_results(name: str) -> None:
    assert not comparison.is_speed(name)


def test_a_run_without_a_result_differs_in_its_state_and_not_in_every_number(tmp_path: Path) -> None:
    first, planned = make_run(tmp_path, {"loss": 1.0, "l0": 3}), make_run(tmp_path)
    second = make_run(tmp_path, jobs=[{"id": "1042", "tasks": [0], "array": False}])
    assert comparison.compare_runs(Named(first), Named(second))["results"] == [{"name": "state", "first": "finished", "second": "queued"}]
    assert comparison.compare_runs(Named(first), Named(planned))["results"] == []  # a dry run's plan


def test_differences_are_listed_by_place_with_hashes_cut_short(tmp_path: Path) -> None:
    first, second = make_run(tmp_path, config={"seed": 100000}), make_run(tmp_path, config={"seed": 1})
    facts = {"hash": "c" * 64, "commit": "d" * 40, "edited": False, "files": {"a.py": "f" * 64, "b.py": "2"}}
    records.write_json(second.path / "code.json", facts)
    lines = comparison.as_text(Named(first), Named(second), comparison.compare_runs(Named(first), Named(second))).splitlines()
    assert lines == [
        f"{first.reference} -> {second.reference}",
        *("", "config", "  seed  100000  -> 1"),
        *("", "code", "  a.py  1  -> ffffffffffff", f"  diff -r {first.code} {second.code}"),
        *("", "the same: environment, inputs, results"),
    ]


def test_tasks_of_an_array_say_how_often_they_were_attempted_and_one_is_named_by_its_job(tmp_path: Path) -> None:
    entries = [{"id": "70", "tasks": [0, 1, 2], "array": True}, {"id": "80", "tasks": [2], "array": True}]
    run = make_run(tmp_path, num_tasks=3, jobs=entries)
    run.task_directory(1).mkdir(parents=True)
    for restart in range(3):
        start = {"event": "start", "job": "70_1", "restart": restart, "host": "n1", "time": NOW}
        run_directory.append_line(run.task_directory(1) / "attempts.jsonl", start)
    lines = record_view.as_text(run).splitlines()
    assert [line.split("; ")[1:] for line in lines[1:4]] == [["job 70_0"], ["job 70_1", "3 attempts"], ["job 80_0"]]
    assert [find(word, tmp_path)[1] for word in ("70_1", "80_0", "70", "count/demo")] == [1, 2, None, None]


# -- finding ----------------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_its_path_without_id_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    run = make_run(runs)
    monkeypatch.chdir(tmp_path)
    for reference in ("runs/count/demo", "runs/count/demo/", str(runs / "count/demo"), "count/demo", f"count/demo/{run.id[-4:]}"):
        assert find(reference, runs) == Named(run)
    monkeypatch.chdir(runs / "count")
    for reference in ("demo", "count/demo", run.id[-4:]):
        assert find(reference, runs) == Named(run)


def test_of_runs_of_one_second_the_one_that_was_submitted_last_is_the_newest(tmp_path: Path) -> None:
    for letters, submitted in (("aaaa", NOW), ("bbbb", NOW + 0.5), ("cccc", NOW + 0.1)):
        make_run(tmp_path, submitted=submitted).path.rename(tmp_path / "count/demo" / f"20261123-091530-{letters}")
    assert find("count/demo", tmp_path).run.id.endswith("bbbb")


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    for reference in ("count/dmo", "runs/count/dem"):
        with pytest.raises(UserError, match=r"no run is called .* under .*; did you mean count/demo\?"):
            find(reference, tmp_path / "runs")


def test_verify_names_what_lies_near_a_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "pile"):
        (tmp_path / "tokens" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"tokens/dmo does not exist; did you mean .*/tokens/demo\?"):
        verify("tokens/dmo", tmp_path / "runs")
    with pytest.raises(UserError, match=r"tokens/x does not exist; .*/tokens holds demo, pile"):
        verify("tokens/x", tmp_path / "runs")
    with pytest.raises(UserError, match=r"is neither a finished data set \(manifest.json\) nor a run \(job.json\); .*/tokens holds demo"):
        verify("tokens", tmp_path / "runs")


# -- tables -----------------------------------------------------------------------------------------------------------


def test_a_narrow_terminal_loses_the_columns_that_matter_least_and_no_text() -> None:
    columns = [Column("ID"), Column("A", dropped=2), Column("B", dropped=3), Column("WHY")]
    rows = [["1042", "aaaa", "bbbbbb", "a reason of several words that is long"], ["7", "", "", "short"]]
    wide, narrow, least = (lay_out(columns, rows, width) for width in (None, 38, 20))
    assert wide.lines[1] == "1042  aaaa  bbbbbb  a reason of several words that is long"
    assert narrow.left_out == ["B"]
    assert narrow.rows[0] == ["1042  aaaa", "    a reason of several words that is", "    long"]
    assert narrow.rows[1] == ["7           short"]
    assert least.left_out == ["B", "A"]
    assert max(len(line) for line in least.lines) <= 20


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.9180171185, "0.91802"),
        (1e-7, "1e-07"),
        (1234567.8, "1,234,568"),
        (1000000, "1,000,000"),
        (True, "true"),
        (None, "none"),
        (2.0, "2"),
    ],
)
def test_a_figure_has_five_digits(value: object, expected: str) -> None:
    assert figure(value) == expected
