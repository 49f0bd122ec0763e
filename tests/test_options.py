"""Every option of every command, alone and with every other: both are heeded, or one sentence refuses them.

`TABLE` holds for each command its options and arguments, each with the words that give it and with what shows that it was heeded,
and the pairs that are refused. An option that is not in it fails the first test; one that is in it is tried with all others.
"""

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pytest
import typer.main
import typer.testing
from feature_pieces import write_snapshot, write_store
from pydantic import Field

from pipeline import records
from pipeline.config import load
from pipeline.config.errors import UserError
from pipeline.config.schema import OPERATIONAL, DataPath
from pipeline.config.stage import StageConfig
from slurm.changing import job_control
from slurm.client import submit_limits
from slurm.client.job_output import Job
from slurm.cluster import control
from slurm.commands.command_line import build_app
from slurm.execution import executor, slurm_job
from slurm.record import activity, run_directory
from slurm.record.run_directory import Json, RunDirectory
from slurm.submission import foreground, preflight, resuming
from slurm.submission.freezing import Freezer
from slurm.watching import generation_view


class ToyConfig(StageConfig):
    IS_DIVISIBLE = True
    stage: Literal["toy"] = "toy"
    steps: int = 3
    output: Annotated[DataPath | None, Field(json_schema_extra=OPERATIONAL)] = None

    def outputs(self) -> dict[str, Path]:
        return {} if self.output is None else {"output": self.output}


class Place:
    """A root of runs with a finished run, a failed one of three tasks and a sweep; what a queue would do is only noted."""

    def __init__(self, root: Path) -> None:
        self.root, self.runs = root, root / "runs"
        (root / "site.yaml").write_text(f"runs: {self.runs}\ndata: {root}/data\n")
        (root / "toy.yaml").write_text("stage: toy\nname: toy\n")
        (root / "made.yaml").write_text(f"stage: toy\nname: toy\noutput: {root}/data/made\n")
        (root / "sweep.yaml").write_text("name: s\nbase: toy.yaml\ngrid: {steps: [1, 2]}\n")
        self.finished = self.make("toy", "toy", "finished", 1, "7")
        self.failed = self.make("toy", "failed", "failed", 3, "1042")
        write_store(self.make("features", "made", "finished", 1, "9").path / "features")
        self.make("generate", "made", "finished", 1, "10")
        self.make_crosscoder()
        write_snapshot(self.make("train", "kept", "finished", 1, "12").path / "history/00000006")
        (self.failed.path / "tables.txt").write_text("a wide table\n")
        records.claim(root / "data/made", {"stage": "toy", "settings": ToyConfig(name="toy").identity(), "inputs": {}})
        (root / "data/made/numbers.bin").write_bytes(b"123")
        shard = records.commit_shard(root / "data/made", "numbers", "toy/1", ["numbers.bin"], {}, {})
        records.write_manifest(root / "data/made", "toy-set/1", {"numbers": shard}, {})

    def make(self, stage: str, name: str, status: str, num_tasks: int, job_id: str) -> RunDirectory:
        run = run_directory.create(self.runs, stage, name)
        config = ToyConfig(name=name, resources={"array_tasks": num_tasks})  # type: ignore[arg-type]
        (run.path / "config.yaml").write_text(json.dumps(config.resolved()))
        records.write_json(run.path / "inputs.json", {})
        surroundings(None, run)  # type: ignore[arg-type]
        entry = {"id": job_id, "tasks": list(range(num_tasks)), "array": num_tasks > 1, "submitted": 0.0, "sbatch": ""}
        job = {"format": "job/1", "id": run.id, "stage": stage, "name": name, "executor": "slurm", "cluster": "dev", "num_tasks": num_tasks}
        job |= {"submitted": 1.0, "submitted_by": "me@here", "command": ["x"], "resources": config.resources.resolved(), "setup": []}
        run.write_job(job | {"after": [], "jobs": [entry], "changes": []})
        for task in range(num_tasks):
            directory = run.path if num_tasks == 1 else run.path / "tasks" / str(task)
            (directory / "log").mkdir(parents=True)
            (directory / "log/1.log").write_text(f"first of task {task}\nlast of task {task}\n")
            result = {"status": status, "started": 0.0, "ended": 1.0, "job": job_id, "error": "no disk", "result": {"score": 1.0}}
            records.write_json(directory / "result.json", result)
        return run

    def make_crosscoder(self) -> None:
        run = self.make("train", "made", "finished", 1, "11")
        (run.path / "config.yaml").write_text(json.dumps({"activations": {"language_model": {"model": "demo", "device": "cuda"}}}))
        facts = {"layers": ["transformer.h.2", "transformer.h.3"], "config": {"num_features": 8}}
        (run.path / "checkpoints/1").mkdir(parents=True)
        records.write_json(run.path / "checkpoints/1/crosscoder.json", facts)
        (self.root / "prompts.txt").write_text("def f")

    def all_runs(self) -> set[RunDirectory]:
        return set(run_directory.list_runs(self.runs))


def surroundings(freezer: Freezer, run: RunDirectory, code_of: RunDirectory | None = None) -> Json:
    code = {"hash": "c0de", "files": {}, "commit": None, "edited": False, "root": "/", "branch": None, "left_out": {}}
    records.write_json(run.path / "code.json", code)
    records.write_json(run.path / "environment.json", {"python_version": "3", "torch": "2", "packages": {}})
    return code


def launch(run: RunDirectory, tasks: Any, *, may_wait: bool = True) -> list[Json]:
    job = run.job()
    entry = {"id": "2000", "tasks": list(tasks), "array": len(tasks) > 1, "submitted": 2.0, "sbatch": ""}
    run.write_job(job | {"jobs": [*job["jobs"], entry]})
    return [entry]


class Outcome(NamedTuple):
    """What a command came to; `text` is all that it printed and all that it froze or queued."""

    code: int
    printed: str
    refusal: str
    text: str
    place: Place
    new: set[RunDirectory]
    called: list[Json]


Check = Callable[[Outcome], bool]

TEXTS = [
    {
        "prompt": 0,
        "prompt_text": "def f",
        "kind": kind,
        "strength": None,
        "text": text,
        "kl_per_token": 0.1,
        "cross_entropy": 1.0,
        "breaks": None,
    }
    for kind, text in (("clean", "own"), ("reconstruction", "other"))
]
MANIFEST = {"summary": [], "settings": {"breakdown": {"ngram": 4, "cross_entropy_rise": 1.5, "repeated_rise": 0.3}}}


class Option(NamedTuple):
    """How an option or argument is given, and what shows that it was heeded."""

    words: str
    is_heeded: Check = lambda outcome: True


def says(pattern: str) -> Check:
    return lambda outcome: re.search(pattern, outcome.text) is not None


def is_json(outcome: Outcome) -> bool:
    return isinstance(json.loads(outcome.printed), list | dict)


def features_shown(outcome: Outcome) -> list[int]:
    """The features in a table, in JSON, or at the head of each one's page, in their order."""
    return [
        int(number)
        for number in re.findall(r'^(?:feature | +)(\d+)[: ]|"feature": (\d+)', outcome.printed, re.M)
        for number in number
        if number
    ]


def leaves_nothing(outcome: Outcome) -> bool:
    return not outcome.new and not outcome.called


def passes(**values: object) -> Check:
    """For a command that hands its options to one function."""
    return lambda outcome: any(call.items() >= values.items() for call in outcome.called)


ANY = ("any", "any")
"""In the place of a refused pair: the command refuses all of them here."""


class Command(NamedTuple):
    """needed : words that make the command complete where the pair does not. refused : pairs, and a piece of the sentence."""

    options: dict[str, Option]
    needed: dict[str, str] = {}
    refused: dict[tuple[str, str], str] = {}


CONFIG = Option("toy.yaml", lambda o: bool(o.new) or "toy/toy: " in o.text or '"name": "toy"' in o.text)
CHANGE = Option("resources.cpus=7", says(r"cpus\W+(1 -> |\S+first\S+ 1, \S+second\S+ )?7\b|7 cores"))
DRY_RUN, AS_JSON = Option("--dry-run", leaves_nothing), Option("--json", is_json)
FROZEN = "--resume goes on with the run as it was frozen: give it without "
LOCAL, DEBUG = "--executor local works on this machine: give it without ", "--executor debug works here and now: give it without "

WRITING = {
    "KEY=VALUE": Option("sampling.max_new_tokens=7", says('"max_new_tokens": 7')),
    "--prompt": Option("--prompt f --prompt g", says(r'"prompts": \["f", "g"\]')),
    "--prompts": Option("--prompts prompts.txt", says(r'"prompts_file": "[^"]*/prompts.txt"')),
    "--temperature": Option("--temperature 0.5", says('"temperature": 0.5')),
    "--top-p": Option("--top-p 0.25 sampling.temperature=0.5", says('"top_p": 0.25')),
    "--seed": Option("--seed 3", says('"seed": 3')),
    "--layers": Option("--layers transformer.h.3", says(r'"layers": \["transformer.h.3"\]')),
    "--executor slurm": Option("--executor slurm", says(r'"executor": "slurm"')),
    "--json": AS_JSON,
}
"""What `generate` and `steer` have in common."""

TABLE = {
    "run": Command({"CONFIG": CONFIG, "KEY=VALUE": CHANGE}, {"CONFIG": "toy.yaml"}),
    "submit": Command(
        {
            "CONFIG": CONFIG,
            "KEY=VALUE": CHANGE,
            "--executor slurm": Option("--executor slurm", says(r"in Slurm|\"executor\": \"slurm\"")),
            "--executor local": Option("--executor local", says(r"executor local|\"executor\": \"local\"")),
            "--executor debug": Option("--executor debug", says(r"executor debug|worked on here")),
            "--partition": Option("--partition low", says(r"partition low|\"partition\": \"low\"")),
            "--node": Option("--node n7", says(r"node n7|\"node\": \"n7\"")),
            "--after": Option("--after {finished}", lambda o: o.place.finished.id in o.text),
            "--resume": Option("--resume {failed}", says(r"tasks 0-2 of 3 would go on|\"tasks\": \[\s*0,\s*1,\s*2\s*\]|job 2000: 3 of 3")),
            "--again": Option("--again made.yaml", lambda o: "skipped" not in o.text),
            "--dry-run": DRY_RUN,
            "--json": AS_JSON,
        },
        {"CONFIG": "toy.yaml"},
        {
            **{("--resume", other): FROZEN for other in ("--partition", "--node", "--after", "--again")},
            **{("--resume", f"--executor {name}"): f"{FROZEN}--executor" for name in ("slurm", "local", "debug")},
            ("--resume", "CONFIG"): f"{FROZEN}a configuration",
            ("--resume", "KEY=VALUE"): f"{FROZEN}a configuration",
            ("--executor local", "--partition"): f"{LOCAL}--partition",
            ("--executor local", "--node"): f"{LOCAL}--node",
            ("--executor debug", "--partition"): f"{DEBUG}--partition",
            ("--executor debug", "--node"): f"{DEBUG}--node",
            ("--executor debug", "--after"): f"{DEBUG}--after",
            ("--executor debug", "--json"): "--executor debug prints what its stages print: give it without --json",
        },
    ),
    "rerun": Command(
        {
            "RUN": Option("{finished}", lambda o: o.place.finished.id in o.text or bool(o.new)),
            "KEY=VALUE": CHANGE,
            "--executor slurm": Option("--executor slurm", says(r"in Slurm|\"executor\": \"slurm\"")),
            "--executor local": Option("--executor local", says(r"executor local|\"executor\": \"local\"")),
            "--executor debug": Option("--executor debug", says(r"executor debug|worked on here")),
            "--dry-run": DRY_RUN,
        },
        {"RUN": "{finished}"},
    ),
    "sweep": Command(
        {
            "SWEEP": Option("sweep.yaml", says(r"steps.*1.*steps.*2|2 tasks|\"tasks\": 2")),
            "KEY=VALUE": Option("seed=77", says("seed.*77|1 task, |2 tasks|tasks")),
            "--executor slurm": Option("--executor slurm", says(r"in Slurm|\"executor\": \"slurm\"")),
            "--executor local": Option("--executor local", says(r"executor local|\"executor\": \"local\"")),
            "--executor debug": Option("--executor debug", says(r"executor debug|worked on here")),
            "--dry-run": DRY_RUN,
            "--json": AS_JSON,
        },
        {"SWEEP": "sweep.yaml"},
        {("--executor debug", "--json"): "--executor debug prints what its stages print: give it without --json"},
    ),
    "show": Command(
        {
            "RUN": Option("{failed}", says("failed")),
            "--config": Option("--config", says(r"max_parallel")),
            "--all": Option("--all", says("a wide table")),
            "--json": AS_JSON,
        },
        {"RUN": "{failed}"},
        {("--all", "--json"): "leave --all or --json out"},
    ),
    "logs": Command(
        {
            "RUN": Option("{failed}", says("last of task")),
            "TASK": Option("1042_2", says("last of task 2")),
            "--task": Option("--task 1", says("last of task 1")),
            "--follow": Option("--follow"),
            "--lines": Option("--lines 1", lambda o: "first of" not in o.text),
        },
        {"RUN": "{failed}"},
        {("TASK", "--task"): "1042_2 names task 2 already; leave --task out"},
    ),
    "compare": Command({"RUN": Option("{failed}/tasks/0 {failed}/tasks/1"), "--json": AS_JSON}, {"RUN": "{failed} {finished}"}),
    "verify": Command({"PATH": Option("data/made"), "--json": AS_JSON}, {"PATH": "data/made"}),
    "clean": Command({"--dry-run": DRY_RUN, "--json": AS_JSON}),
    "results": Command({"RUN": Option("{failed}"), "--json": AS_JSON}, {"RUN": "{failed}"}, {ANY: "is not a sweep"}),
    "jobs": Command(
        {
            "WORD": Option("failed", lambda o: "toy/toy" not in o.text),
            "--all": Option("--all", lambda o: "jobs --all" not in o.text),
            "--json": AS_JSON,
        }
    ),
    "watch": Command({"RUN": Option("{failed}"), "--interval": Option("--interval 2")}, {}, {ANY: "watch needs a terminal"}),
    "accelerators": Command({"--json": AS_JSON}),
    "features": Command(
        {
            "RUN": Option("features/made", lambda o: bool(features_shown(o))),
            "FEATURE": Option("2 1", lambda o: 0 not in features_shown(o)),
            "--sort": Option("--sort feature", lambda o: features_shown(o) == sorted(features_shown(o))),
            "--search": Option("--search one", lambda o: set(features_shown(o)) == {1}),
            "--most": Option("--most 1", lambda o: len(set(features_shown(o))) <= 1),
            "--json": AS_JSON,
            "--jsonl": Option("--jsonl", lambda o: all("tokens" in json.loads(line) for line in o.printed.splitlines())),
        },
        {"RUN": "features/made"},
        {("--json", "--jsonl"): "two forms of the same"},
    ),
    "evolution": Command(
        {
            "RUN": Option("train/kept", says(r"kept|\b600\b|window_tokens")),
            "FEATURE": Option("2 1", says(r"feature 2|\"feature\": 2")),
            "--json": AS_JSON,
        },
        {"RUN": "train/kept"},
    ),
    "export": Command(
        {
            "RUN": Option("{finished}"),
            "DIR": Option("out"),
            "--to": Option("--to safetensors"),
            "--license": Option("--license mit"),
            "--push-to-hub": Option("--push-to-hub ana/diff"),
            "--private": Option("--private"),
        },
        {"RUN": "{finished}", "DIR": "out", "--to": "--to safetensors"},
        {ANY: "is a run of toy, which leaves no crosscoder"},
    ),
    "import": Command(
        {
            "PATH": Option("nowhere"),
            "KEY=VALUE": Option("seed=3"),
            "--from": Option("--from ckkissane"),
            "--name": Option("--name taken"),
            "--language-model": Option("--language-model demo"),
            "--layer": Option("--layer transformer.h.2"),
            "--tokens": Option("--tokens data/tokens"),
        },
        {
            "PATH": "nowhere",
            "--from": "--from sae_lens",
            "--language-model": "--language-model demo",
            "--layer": "--layer transformer.h.1",
            "--tokens": "--tokens data/tokens",
        },
        {ANY: "nowhere, but nothing is there; name the directory of the files"},
    ),
    "report": Command(
        {"RUN": Option("{finished}"), "--output": Option("--output page.html"), "--inside": Option("--inside 3")},
        {"RUN": "{finished}"},
        {ANY: "trains no crosscoder"},
    ),
    "config": Command(
        {
            "STAGE": Option("count", lambda o: "optimizer" not in o.printed),
            "--markdown": Option("--markdown", says(r"^# Settings")),
            "--json": Option("--json", lambda o: "count" in json.loads(o.printed)),
        },
        {},
        {("--markdown", "--json"): "two forms of the same"},
    ),
    "generate": Command(
        {
            "RUN": Option("train/made", says(r'"crosscoder": "[^"]*/train/made/')),
            **WRITING,
            "--encode-from": Option("--encode-from spliced", says('"encode_from": "spliced"')),
        },
        {"RUN": "train/made", "--prompt": "--prompt f"},
    ),
    "steer": Command(
        {
            "RUN": Option("train/made", says(r'"reconstruct": false')),
            "--feature": Option("--feature 3,7", says(r'"features": \[3, 7\]')),
            "--strength": Option("--strength 2,-4.5", says(r'"strengths": \[2.0, -4.5\]')),
            "--mode": Option("--mode clamp", says('"mode": "clamp"')),
            "--positions": Option("--positions 5:", says('"positions": "5:"')),
            **WRITING,
        },
        {"RUN": "train/made", "--prompt": "--prompt f", "--feature": "--feature 1", "--strength": "--strength 1"},
    ),
    "doctor": Command({"--json": AS_JSON}),
    "change": Command(
        {"JOB": Option("1050", passes(reference="1050")), "KEY=VALUE": Option("nice=3", passes(changes=["nice=3"]))},
        {"JOB": "1050", "KEY=VALUE": "nice=3"},
    ),
    "hold": Command({"JOB": Option("1050", passes(done="held"))}),
    "release": Command({"JOB": Option("1050", passes(done="released"))}),
    "cancel": Command(
        {
            "JOB": Option("1050", passes(done="cancelled", ids=("1050",))),
            "--all": Option("--all", passes(done="cancelled", ids=("1050", "1051"))),
            "--yes": Option("--yes", lambda o: "cancel these?" not in o.printed),
        },
        {"JOB": "1050"},
        {("JOB", "--all"): "name jobs or runs, or give --all"},
    ),
    "cluster start": Command(
        {
            "--directory": Option("--directory d", passes(directory=Path("d"))),
            "--pretend": Option("--pretend", passes(pretend=True)),
            "--accounting": Option("--accounting", passes(accounting=True)),
            "--fresh": Option("--fresh", passes(fresh=True)),
        }
    ),
    "cluster stop": Command({"--directory": Option("--directory d", passes(directory=Path("d")))}),
    "cluster status": Command({"--directory": Option("--directory d", passes(directory=Path("d")))}),
}
INSTEAD_OF_NEEDED = {"--resume", "--again", "TASK", "cancel --all"}
"""What is given in the place of the argument that a command needs; of one command, after its name."""


def commands(group: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        found |= commands(command, f"{prefix}{name} ") if hasattr(command, "commands") else {prefix + name: command}
    return found


def names_of(command: Any) -> set[str]:
    """`--partition` of an option, `CONFIG` and `KEY=VALUE` of arguments."""
    names = set[str]()
    for parameter in command.params:
        if parameter.param_type_name == "option":
            names |= {name for name in parameter.opts if name.startswith("--") and name != "--help"}
        else:
            names |= set(re.findall(r"KEY=VALUE|[A-Z]+", str(parameter.metavar)))
    return names


def test_the_table_holds_every_option_of_every_command() -> None:
    found = {name: names_of(command) for name, command in commands(typer.main.get_command(build_app())).items()}
    in_table = {name: {option.partition(" ")[0] for option in command.options} - {"TASK"} for name, command in TABLE.items()}
    assert in_table == found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setitem(load.STAGES, "toy", load.Stage(f"{__name__}:ToyConfig", "nowhere"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CROSSCODER_SITE", str(tmp_path / "site.yaml"))
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm is asked
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # hundreds of small files
    monkeypatch.setattr(Freezer, "write_surroundings", surroundings)
    monkeypatch.setattr(resuming, "check_startable", lambda run: None)
    monkeypatch.setattr(preflight, "check", lambda parsed: "dev")
    monkeypatch.setattr(executor, "launch", launch)
    monkeypatch.setattr(slurm_job, "submission_text", lambda run: "#!/bin/bash\n")
    monkeypatch.setattr(submit_limits, "of_me", lambda *names: [])
    monkeypatch.setattr(activity, "_slurm_has", lambda job, run: False)
    return Place(tmp_path)


def run_command(place: Place, monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> Outcome:
    called: list[Json] = []

    def noted(**given: object) -> Callable[..., Any]:
        return lambda *arguments, **named: called.append({**given, "directory": arguments[0] if arguments else None, **named}) or "done"

    def here(*arguments: Any) -> int:
        called.append({"here": True})
        return 0

    queue = [Job("1050", "PENDING"), Job("1051", "PENDING")]
    monkeypatch.setattr(foreground, "run_here", here)
    monkeypatch.setattr(foreground, "run_frozen_here", here)
    for function in ("start", "stop", "status"):
        monkeypatch.setattr(control, function, noted())
    monkeypatch.setattr("slurm.client.slurm_queries.my_jobs", lambda: queue)
    monkeypatch.setattr("slurm.client.slurm_queries.my_jobs_if_any", lambda: queue if name == "cancel" else [])
    monkeypatch.setattr(
        "slurm.changing.change.change", lambda reference, changes, site: called.append({"reference": reference, "changes": changes}) or []
    )
    for function, done in (("hold", "held"), ("release", "released")):
        monkeypatch.setattr(job_control, function, lambda target, done=done: called.append({"done": done}) or "")
    monkeypatch.setattr(
        job_control,
        "cancel",
        lambda targets: called.append({"done": "cancelled", "ids": tuple(i for target in targets for i in target.ids)}) or [],
    )
    monkeypatch.setattr(generation_view.Texts, "open", lambda run: generation_view.Texts(TEXTS, MANIFEST))
    before = place.all_runs()
    words = words.format(finished=place.finished.reference, failed=place.failed.reference)
    result = typer.testing.CliRunner().invoke(build_app(), [*name.split(), *words.split()], input="y\n")
    refusal = str(result.exception) if isinstance(result.exception, UserError) else " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    if result.exception is not None and not isinstance(result.exception, UserError | SystemExit):
        raise result.exception
    new = place.all_runs() - before
    frozen = [json.dumps([run.job(), run.config_values()]) for run in [*new, place.failed]]
    text = "\n".join([result.stdout, *frozen, *(["worked on here"] if {"here": True} in called else [])])
    code = 1 if isinstance(result.exception, UserError) else result.exit_code
    return Outcome(code, result.stdout, refusal if code else "", text, place, new, called)


PAIRS = [
    (name, pair)
    for name, command in TABLE.items()
    for pair in [*((option,) for option in command.options), *itertools.combinations(command.options, 2)]
    if len({option.partition(" ")[0] for option in pair}) == len(pair) and set(pair) != {"RUN", "TASK"}
]


def words_of(name: str, pair: tuple[str, ...]) -> str:
    command = TABLE[name]
    needed = {} if INSTEAD_OF_NEEDED & {*pair, *(f"{name} {option}" for option in pair)} else command.needed
    given = {option: command.options[option].words for option in pair}
    return " ".join((needed | given)[option] for option in command.options if option in needed | given)


@pytest.mark.parametrize(
    ("name", "words", "twice"),
    [
        ("submit", "--resume {failed} --resume {finished}", "--resume"),
        ("submit", "toy.yaml --executor local --executor debug", "--executor"),
        ("submit", "toy.yaml --partition a --node n1 --node n2 --partition b", "--partition and --node"),
        ("submit", "toy.yaml steps=1 seed=2 steps=3", "steps"),
        ("run", "toy.yaml steps=1 steps=1", "steps"),
        ("sweep", "sweep.yaml seed=1 seed=2", "seed"),
        ("rerun", "{finished} seed=1 seed=2", "seed"),
        ("logs", "{failed} --task 0 --task 1", "--task"),
        ("change", "1050 nice=3 nice=4", "nice"),
        ("cluster start", "--directory a --directory b", "--directory"),
    ],
)
def test_what_takes_one_value_is_refused_when_given_twice(
    name: str, words: str, twice: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run_command(place, monkeypatch, name, words)
    assert outcome.code == 2
    assert f"{twice} {'are' if ' and ' in twice else 'is'} given more than once, but take" in outcome.refusal
    assert leaves_nothing(outcome)


def test_what_takes_several_values_and_flags_may_stand_twice(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "toy.yaml toy.seed=2 seed=1 --after {finished} --after {failed}/tasks/0 --json --json --dry-run"
    assert "is one task; --after takes a whole run" in run_command(place, monkeypatch, "submit", words).refusal
    assert run_command(place, monkeypatch, "jobs", "--json --json").code == 0


@pytest.mark.parametrize(("name", "pair"), PAIRS, ids=lambda value: value if isinstance(value, str) else "+".join(value))
def test_two_options_are_both_heeded_or_refused_in_one_sentence(
    name: str, pair: tuple[str, ...], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = TABLE[name]
    sentence = next((said for refused, said in command.refused.items() if refused == ANY or set(refused) == set(pair)), None)
    outcome = run_command(place, monkeypatch, name, words_of(name, pair))
    if sentence is not None:
        assert outcome.code in (1, 2)
        assert sentence in outcome.refusal
        assert leaves_nothing(outcome)
        return
    assert outcome.code == 0, outcome.refusal
    for option in pair:
        assert command.options[option].is_heeded(outcome), (option, outcome.text)
