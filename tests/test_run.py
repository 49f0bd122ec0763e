"""What a stage tells its run: progress for people and files, inputs, metrics, and being asked to stop."""

import io
import json
from pathlib import Path

import pytest

from pipeline import run as run_module
from pipeline.config.errors import UserError
from pipeline.run import Run, Stopped, amount, byte_size, duration, pace, quantity


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_whole_lines_ever_more_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock[0])
    log = io.StringIO()
    run = Run(tmp_path, stage="cache", output=log)
    for second in range(600):
        clock[0] = 1000.0 + second
        run.report("harvest", second * 100, 60_000, unit="positions")
    lines = log.getvalue().splitlines()
    assert 8 <= len(lines) <= 16
    assert "\r" not in log.getvalue()
    assert lines[0].startswith("cache harvest")
    assert "60k positions  100/s" in lines[0]


def test_a_terminal_gets_one_line_rewritten_in_place(tmp_path: Path) -> None:
    screen = Terminal()
    run = Run(tmp_path, stage="train", output=screen)
    run.report("train", 1, 2, unit="steps")
    run.report("train", 2, 2, unit="steps", done=True)
    assert screen.getvalue().count("\n") == 1
    assert screen.getvalue().split("\x1b[2K")[1] == "train   50.0 %  1 of 2 steps\r"
    assert screen.getvalue().count("\r\x1b[2K") == 2


def test_the_heartbeat_holds_step_total_rate_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock[0])
    run = Run(tmp_path, stage="train", output=io.StringIO())
    run.report("train", 500, 1000, unit="steps")  # resumed at 500: what was skipped is not counted in the rate
    clock[0] += 10
    run.report("train", 600, 1000, unit="steps", done=True)
    beat = json.loads((tmp_path / "progress.json").read_text())
    assert (beat["step"], beat["total"], beat["rate"], beat["seconds_left"], beat["phase"]) == (600, 1000, 10.0, 40.0, "train")


def test_a_requested_stop_is_raised_where_the_stage_asks(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.check_stop()
    run.request_stop("SIGTERM")
    with pytest.raises(Stopped, match="SIGTERM"):
        run.check_stop()


def test_an_input_that_changed_since_the_run_began_is_refused(tmp_path: Path) -> None:
    Run(tmp_path).bind_input("tokens", "a" * 64)
    Run(tmp_path).bind_input("tokens", "a" * 64)
    with pytest.raises(UserError, match="input tokens is bbbbbbbbbbbb, but this run began with aaaaaaaaaaaa"):
        Run(tmp_path).bind_input("tokens", "b" * 64)


def test_rewinding_metrics_drops_later_rows_and_a_torn_last_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (10, 20, 30):
        run.log_metrics({"step": step, "loss": 1.0 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4')
    run.rewind_metrics(20)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [10, 20]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (12_345, "12.3k"), (4_560_000, "4.56M"), (7.89e9, "7.89G"), (2.94e11, "294G"), (0.5, "0.5"), (1.6e-5, "0")],
)
def test_quantities_are_short(value: float, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 bytes"), (1, "1 byte"), (16, "16 bytes"), (999, "999 bytes"), (1000, "1 kB"), (12_345, "12.35 kB"), (999_949, "999.9 kB")),
        *((999_960, "1 MB"), (16_777_216, "16.78 MB"), (3.0722e12, "3.072 TB"), (3.2e16, "32,000 TB")),
    ],
)
def test_sizes_have_a_unit_in_which_they_can_be_read(count: float, text: str) -> None:
    assert byte_size(count) == text


def test_amounts_and_paces_are_in_units_that_can_be_read() -> None:
    assert amount(16, 2_500_000, "bytes of files") == "16 bytes of 2.5 MB of files"
    assert amount(250, 12_345, "steps", "/") == "250/12.3k steps"
    assert amount(250, None, "") == "250"
    paces = [pace(rate, unit) for rate, unit in ((2.5e6, "bytes of files"), (0.5, "steps"), (0.05, "steps"), (0.0005, "steps"))]
    assert paces == ["2.5 MB/s", "0.5/s", "3/min", "1.8/h"]


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (200, "3 min 20 s"), (18_600, "5 h 10 min"), (183_600, "2 d 3 h")])
def test_durations_are_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
