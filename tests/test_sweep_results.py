"""What is shown of a sweep: its table and its figure, from rows as `gather` gives them."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline import records
from slurm.record.run_directory import RunDirectory
from slurm.submission import sweep_results
from slurm.watching import sweep_figure, sweep_table

LEARNING_RATE, KIND = "optimizer.learning_rate", "loss.l1.norm"


def row(task: int, state: str = "finished", **values: Any) -> dict[str, Any]:
    return {"task": task, "state": state, **values}


def sweep_run(tmp_path: Path, results: list[dict[str, Any] | None], *, metric: str | None = "loss", maximize: bool = False) -> RunDirectory:
    run = RunDirectory(tmp_path / "sweep/s/20261123-000000-aaaa")
    members = ", ".join(f"{{seed: {task}}}" for task in range(len(results)))
    run.path.mkdir(parents=True)
    run.write_job({"stage": "sweep", "num_tasks": len(results), "jobs": []})
    (run.path / "config.yaml").write_text(f"metric: {metric or 'null'}\nmaximize: {str(maximize).lower()}\nmembers: [{members}]\n")
    for task, result in enumerate(results):
        if result is not None:
            records.write_json(run.task_directory(task) / "result.json", {"error": None, **result})
    return run


# -- rows -------------------------------------------------------------------------------------------------------------


def test_the_best_finished_task_is_first_and_what_has_not_finished_last(tmp_path: Path) -> None:
    finished = [{"status": "finished", "result": {"loss": loss}} for loss in (3.0, 1.0, None)]
    results = [*finished, None, {"status": "failed", "error": "Traceback\n  deep\nValueError: loss is nan", "result": None}]
    run = sweep_run(tmp_path, results)
    (run.task_directory(3)).mkdir()
    (run.task_directory(3) / "metrics.jsonl").write_text('{"loss": 0.1}\n')  # better so far, but not done
    rows = sweep_results.gather(run, {3: "running"})
    assert [(r["task"], r["state"]) for r in rows] == [(1, "finished"), (0, "finished"), (2, "finished"), (3, "running"), (4, "failed")]
    assert rows[-1]["error"] == "ValueError: loss is nan"
    sweep_results.write_csv(rows, tmp_path / "results.csv")
    with open(tmp_path / "results.csv") as file:
        assert [line["loss"] for line in csv.DictReader(file)] == ["1.0", "3.0", "", "0.1", ""]


def test_fields_that_are_the_same_in_every_task_are_not_varied() -> None:
    assert sweep_results.varied_fields([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": True}]) == ["b"]
    assert sweep_results.varied_fields([{"a": 1}, {"a": True}]) == ["a"]
    assert sweep_results.varied_fields([{"a": 1}]) == ["a"]


def test_fields_are_named_by_as_few_parts_as_tell_them_apart() -> None:
    names = sweep_results.short_names(["optimizer.learning_rate", "loss.l1.norm", "loss.auxk.k", "activation.k", "seed"])
    assert list(names.values()) == ["learning_rate", "norm", "auxk.k", "activation.k", "seed"]


# -- table ------------------------------------------------------------------------------------------------------------


def test_the_table_shows_what_was_varied_and_the_key_results_in_five_digits() -> None:
    rows = [row(3, **{LEARNING_RATE: 1e-3, "loss": 43.442677782166676}), row(0, **{LEARNING_RATE: 1e-4, "loss": 63.0})]
    assert sweep_table.table(rows, [LEARNING_RATE], ["loss"]).lines == [
        "TASK  learning_rate    loss",
        "   3          0.001  43.443",
        "   0         0.0001      63",
    ]


def test_tasks_that_failed_or_wait_stand_at_the_end_and_hundreds_share_a_line() -> None:
    rows = [row(0, seed=0, loss=1.5), row(1, "running", seed=1, loss=2.0), row(2, "failed", seed=2, error="no disk")]
    rows += [row(task, "queued", seed=task) for task in range(3, 300)]
    assert sweep_table.table(rows, ["seed"], ["loss"]).lines == [
        " TASK  seed  loss  STATE",
        "    0     0   1.5",
        "    1     1     2  running",
        "    2     2        failed: no disk",
        "3-299              297 waiting",
    ]
    assert sweep_table.summary("sweep/s/aaaa", rows, "loss", maximize=False) == (
        "sweep/s/aaaa: 300 tasks, 1 finished, 1 running, 1 failed, 297 waiting; best loss first (lower is better)"
    )


def test_a_narrow_terminal_loses_further_results_and_never_the_metric() -> None:
    rows = [row(0, seed=1, explained_variance=0.5, **{f"another_result_{i}": i for i in range(5)})]
    results = ["explained_variance", *(f"another_result_{i}" for i in range(5))]
    table = sweep_table.table(rows, ["seed"], results, 50)
    assert table.lines[0] == "TASK  seed  explained_variance  another_result_0"
    assert table.left_out == [f"another_result_{i}" for i in (4, 3, 2, 1)]


def test_wished_columns_are_shown_and_else_a_few_that_differ_but_never_times() -> None:
    rows = [row(task, seed=task, score=task, seconds=2.0 * task, same=1, **{f"x{i}": task + i for i in range(9)}) for task in range(2)]
    assert sweep_table.result_columns(rows, ["seed"], "score", ["x7"]) == ["score", "x7"]
    assert sweep_table.result_columns(rows, ["seed"], "score", []) == ["score", "x0", "x1", "x2"]


# -- figure -----------------------------------------------------------------------------------------------------------


def test_numbers_lie_along_x_words_have_colors_and_seeds_neither() -> None:
    rows = [row(0, **{LEARNING_RATE: rate, KIND: kind, "seed": seed}) for rate in (1, 2) for kind in ("a", "b", "c") for seed in range(4)]
    axis = sweep_figure.choose_axis(rows, [KIND, LEARNING_RATE, "seed"])
    assert axis == sweep_figure.Axis(LEARNING_RATE, [KIND], ["seed"], [])
    assert sweep_figure.choose_axis(rows, ["seed"]).x == "seed"
    assert sweep_figure.choose_axis(rows, [KIND]).x == KIND


def test_fields_that_a_zip_varies_together_are_one_axis() -> None:
    rows = [row(0, a=1, b=10), row(1, a=2, b=20), row(2, a=3, b=30)]
    assert sweep_figure.choose_axis(rows, ["a", "b"]) == sweep_figure.Axis("a", [], [], ["b"])


def test_one_far_value_does_not_squash_the_others() -> None:
    assert sweep_figure.limits([0.81, 0.82, 0.83, 0.84, 0.825, -0.46]) == (0.81, 0.84)
    assert sweep_figure.limits([4.1, 4.2, 5.0, 9.0]) == (4.1, 9.0)
    assert sweep_figure.limits([1.0, 1.0, 1.0, 5.0]) == (1.0, 5.0)
    assert sweep_figure.limits([3.0]) == (3.0, 3.0)
    assert sweep_figure.limits([39, 43, 44, 48, 400, 4100], is_log=True) == (39, 4100)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("seconds", "seconds [s]"),
        ("a.timeout_min", "a.timeout_min [min]"),
        ("tokens_per_second", "tokens_per_second [1/s]"),
        ("loss", "loss"),
    ],
)
def test_an_axis_is_labelled_with_the_unit_that_the_name_tells(name: str, expected: str) -> None:
    assert sweep_figure.with_unit(name) == expected


def drawn_panels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: list[dict[str, Any]], varied: list[str], **keywords: Any
) -> list[Any]:
    """The panels of the figure that `draw` saves, after it has been rendered for real."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    plain = {"title": "sweep/s/aaaa", "maximize": True}
    assert sweep_figure.draw(rows, varied, "explained_variance", tmp_path / "results.png", **{**plain, **keywords})
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    return list(figures[0].axes)


def test_the_figure_has_a_title_a_legend_labels_and_log_axes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    points = [(rate, kind) for rate in (1e-4, 1e-3, 1e-2) for kind in ("relu", "batch_topk")]
    rows = [row(i, **{LEARNING_RATE: r, KIND: k, "explained_variance": 0.8 + i / 100, "dead": 10**i}) for i, (r, k) in enumerate(points)]
    rows += [
        row(6, "running", **{LEARNING_RATE: 1e-4, KIND: "relu", "explained_variance": 0.99}),
        row(7, "queued", **{LEARNING_RATE: 1e-2}),
    ]
    first, second = drawn_panels(monkeypatch, tmp_path, rows, [LEARNING_RATE, KIND], columns=["dead"])
    assert (first.get_xscale(), first.get_yscale(), second.get_yscale()) == ("log", "linear", "log")
    assert first.get_xlabel() == "optimizer.learning_rate"
    assert first.get_ylabel() == "explained_variance (higher is better)"
    assert second.get_ylabel() == "dead"
    whole = first.figure
    # The running task is better so far, but only a finished one is called best.
    assert whole.get_suptitle() == "sweep/s/aaaa\nbest: 0.85, task 5 (ringed); 1 of 8 tasks without a result yet"
    assert [text.get_text() for text in whole.legends[0].get_texts()] == ["norm batch_topk", "norm relu"]


def test_words_have_places_of_their_own_along_x_and_an_outlier_an_arrow_with_its_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = {"linear": 0.81, "cosine": 0.82, "constant": 0.83, "none": 0.84, "sqrt": 0.825, "bad": -46.0}
    rows = [row(i, decay=decay, explained_variance=value) for i, (decay, value) in enumerate(values.items())]
    (panel,) = drawn_panels(monkeypatch, tmp_path, rows, ["decay"])
    assert [label.get_text() for label in panel.get_xticklabels()] == list(values)
    low, high = panel.get_ylim()
    assert 0.8 < low < 0.81 < 0.84 < high < 0.85
    assert [text.get_text() for text in panel.texts] == ["-46"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.0, -1.0, 3.0], [1e-9, 1e9], [0.5, math.inf]])
def test_every_set_of_values_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    rows = [row(i, a=i, b=None if i else True, seed=0, explained_variance=value) for i, value in enumerate(values)]
    assert drawn_panels(monkeypatch, tmp_path, rows, ["a", "b", "seed"])


def test_many_groups_share_a_color_and_have_no_legend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [row(i, a=i % 20, b=i // 20, explained_variance=float(i)) for i in range(300)]
    (panel,) = drawn_panels(monkeypatch, tmp_path, rows, ["a", "b"])
    assert panel.figure.legends == []


def test_a_sweep_without_a_metric_yet_draws_nothing(tmp_path: Path) -> None:
    rows = [row(0, "queued", a=1), row(1, a=2, explained_variance=math.nan)]
    assert not sweep_figure.draw(rows, ["a"], "explained_variance", tmp_path / "results.png", title="s", maximize=True)
    assert not (tmp_path / "results.png").exists()
