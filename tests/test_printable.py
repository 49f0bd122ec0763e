"""A terminal gets no control bytes of text that others wrote: logs, notes, names, lines of documents."""

import ast
import json
import re
from pathlib import Path

import pytest
from rich.text import Text
from toy_project import ToyProject

from slurm.commands import command_line
from slurm.record import printable, text_table
from slurm.record.run_directory import RunDirectory
from slurm.record.run_reference import Named
from slurm.watching import watch

ROOT = Path(__file__).parents[1]
CONTROLS = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")
TITLE = "\x1b]0;owned\x07"
"""Sets the title of a terminal."""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ć\tx\ny", "plain ć\tx\ny"),
        ("\x1b[31mred\x1b[0m", "red"),
        (f"a{TITLE}b", "ab"),
        ("a\x1b]8;;http://x\x1b\\b", "ab"),
        ("a\x1bPq#0\x1b\\b", "ab"),
        ("\x1b[2J\x1b[Hgone", "gone"),
        ("\x1bcreset", "reset"),
        ("a\x9b31mb", "ab"),
        ("a\x1b]0;never ended", "a0;never ended"),
        ("bell\x07 back\x08 nul\x00 del\x7f", r"bell\x07 back\x08 nul\x00 del\x7f"),
        ("a\rb", r"a\x0db"),
        ("ends\x1b", r"ends\x1b"),
        ("turned \u202egpj", r"turned \u202egpj"),
    ],
)
def test_escape_sequences_go_and_other_controls_are_shown(text: str, shown: str) -> None:
    assert printable.printable(text) == shown
    assert not CONTROLS.search(printable.printable(text).encode())


def test_every_control_character_alone_is_harmless() -> None:
    for number in [*range(32), *range(127, 160)]:
        if chr(number) not in "\n\t":
            assert not CONTROLS.search(printable.printable(f"a{chr(number)}b").encode()), number
        assert not CONTROLS.search(printable.printable_line(f"a{chr(number)}b").replace("\n", "\0").encode()), number


def test_of_a_progress_line_in_a_log_the_last_form_is_shown() -> None:
    assert printable.printable_log(" 10%\r 50%\r100%\ndone\r\nnext 1\rnext 2\r\n") == "100%\ndone\nnext 2\n"


def test_json_output_holds_no_control_character_and_the_same_value(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"note": "".join(map(chr, [*range(32), *range(127, 160)])) + "\u202eć"}
    command_line.print_json(value)
    said = capsys.readouterr().out
    assert not CONTROLS.search(said.encode())
    assert json.loads(said) == value


def test_lines_keep_their_own_colors_and_no_one_elses() -> None:
    own = Text("state  ") + Text("failed", style="red")
    assert printable.cleaned(own) is own
    cleaned = printable.cleaned(Text("evil \x1b[2J\nrow", style="red"))
    assert (cleaned.plain, cleaned.style) == (r"evil \x0arow", "red")
    assert printable.cleaned("a\x1b[1mb\x07").plain == r"ab\x07"


def test_a_cell_of_a_table_makes_no_row_of_its_own() -> None:
    columns = [text_table.Column("name"), text_table.Column("note")]
    table = text_table.lay_out(columns, [["a\nb  finished", "x\x1b[5A"], ["c", "y"]])
    assert table.lines == ["name           note", "a b  finished  x", "c              y"]


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> ToyProject:
    """A project whose stage prints, notes and fails with all that a terminal would obey."""
    project = ToyProject(tmp_path_factory.mktemp("toy"))
    program = project.root / "pipeline/stages/toy.py"
    evil = r'"\x1b]0;owned\x07\x1b[2J\x9b31m"'
    program.write_text(
        program.read_text()
        .replace('run.say(f"{GREETING}', f'print({evil}, " 10%\\r100%"); run.say(f"{{GREETING}}')
        .replace('unit="steps", done=True)', f'unit="steps", done=True, note={evil})')
        .replace("the toy fails at step {step}", "the toy fails on \\x1b]0;owned\\x07\\x9b31m{step}")
    )
    done = project.crosscoder("submit", project.config(fail_at=2), "--executor", "debug")
    assert done.returncode == 1
    return project


def test_no_command_prints_what_a_log_a_note_or_an_error_tells_a_terminal_to_do(project: ToyProject) -> None:
    run = project.only_run()
    raw = b"".join(path.read_bytes() for path in (run / "log").iterdir())
    assert b"\x1b]0;owned" in raw  # the file has what was printed
    for command in (
        ["logs", "toy/toy"],
        ["logs", "toy/toy", "-n", "5"],
        ["show", "toy/toy"],
        ["jobs", "--all"],
        ["show", "toy/toy", "--json"],
    ):
        for variables in ({}, {"FORCE_COLOR": "1"}):
            done = project.crosscoder(*command, **variables)
            assert done.returncode == 0, done.stderr
            own_colors = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout) if variables and command[0] == "jobs" else done.stdout
            assert not CONTROLS.search(own_colors.encode()), (command, done.stdout)
            assert "owned" not in done.stdout or "--json" in command, command
    assert "100%\n" in project.crosscoder("logs", "toy/toy").stdout


def test_an_error_that_quotes_a_name_prints_it_harmlessly(project: ToyProject) -> None:
    done = project.crosscoder("show", f"toy/{TITLE}\x1b[2J")
    assert (done.returncode, bool(CONTROLS.search(done.stderr.encode()))) == (1, False)
    done = project.crosscoder("run", "none\x1b[2J\x07.yaml")
    assert (done.returncode, bool(CONTROLS.search(done.stderr.encode()))) == (1, False)


def test_the_live_view_shows_no_control_character(project: ToyProject) -> None:
    from pipeline.config.site_file import Site

    looker = watch.Looker(Site(runs=project.runs))
    looker.trouble = f"squeue said {TITLE}"
    looker.look()
    lines = watch.view(looker, Named(RunDirectory(project.only_run())), width=200, height=60, interval_s=5.0)
    assert any("hello from" in line.plain for line in lines)
    assert not CONTROLS.search("\n".join(line.plain for line in lines).encode())


def test_every_module_that_prints_for_a_terminal_uses_the_print_that_is_safe_there() -> None:
    wrong = []
    for path in ROOT.glob("slurm/**/*.py"):
        tree = ast.parse(path.read_text())
        prints = any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print" for n in ast.walk(tree))
        imported = [
            alias.name
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and n.module == "slurm.record.printable"
            for alias in n.names
        ]
        if prints and "print" not in imported and path.name != "printable.py":
            wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []
