"""`crosscoder generate` and `crosscoder steer`: what a language model writes with a trained crosscoder spliced into it."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.config.errors import UserError
from slurm.commands.run_commands import Executor

if TYPE_CHECKING:
    from pipeline.config.site_file import Site
    from slurm.record.run_directory import RunDirectory
    from slurm.record.run_reference import Named

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run of train, or one of its checkpoints; a run of generate: its texts are shown.")
]
ChangesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Other settings of the stage generate, such as sampling.max_new_tokens=100.")
]
PromptOption = Annotated[
    list[str] | None, typer.Option("--prompt", metavar="TEXT", help="A text to go on from; may be given several times.")
]
PromptsOption = Annotated[
    Path | None, typer.Option("--prompts", metavar="FILE", help="More of them: a line each, or `text` in each line of a .jsonl file.")
]
TemperatureOption = Annotated[float | None, typer.Option(help="Draw tokens at this temperature.", show_default="0: the most probable")]
TopPOption = Annotated[float | None, typer.Option("--top-p", help="Draw from the most probable tokens of this probability.")]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Of what is drawn.")]
LayersOption = Annotated[
    str | None, typer.Option(metavar="LAYER,...", help="Change these layers.", show_default="all that the crosscoder writes")
]
ExecutorOption = Annotated[Executor, typer.Option(help="debug: here and now; local: a process of its own; slurm.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON: the texts, or what was queued.")]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command("generate")(generate)
    app.command("steer")(steer)


def generate(
    reference: RunArgument,
    changes: ChangesArgument = None,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    layers: LayersOption = None,
    encode_from: Annotated[
        str | None, typer.Option(metavar="clean|spliced", help="What features are read from.", show_default="clean")
    ] = None,
    executor: ExecutorOption = Executor.debug,
    as_json: JsonOption = False,
) -> None:
    """Show what the language model writes by itself and with layers replaced by the crosscoder's reconstruction, side by side."""
    given = _sampling(prompt, prompts, temperature, top_p, seed)
    given |= {"layers": None if layers is None else layers.split(","), "encode_from": encode_from}
    _show_or_start(reference, given, changes or [], executor, as_json=as_json)


def steer(
    reference: RunArgument,
    changes: ChangesArgument = None,
    feature: Annotated[str | None, typer.Option(metavar="F,...", help="Features to edit, all of them together.")] = None,
    strength: Annotated[str | None, typer.Option(metavar="S,...", help="A text for each of these strengths.")] = None,
    mode: Annotated[
        str | None, typer.Option(metavar="add|scale|clamp|ablate", help="What becomes of an activation.", show_default="add")
    ] = None,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    layers: LayersOption = None,
    positions: Annotated[
        str | None,
        typer.Option(metavar="all|last|START:", help="Where: from the last of the prompt on, or from one on.", show_default="all"),
    ] = None,
    executor: ExecutorOption = Executor.debug,
    as_json: JsonOption = False,
) -> None:
    """Edit features while the language model writes: texts by strength, what each costs, and where the text breaks down."""
    given = _sampling(prompt, prompts, temperature, top_p, seed)
    given |= {
        "steering.features": None if feature is None else [_number(part, "--feature", int) for part in feature.split(",")],
        "steering.strengths": None if strength is None else [_number(part, "--strength", float) for part in strength.split(",")],
        "steering.mode": mode,
        "steering.layers": None if layers is None else layers.split(","),
        "steering.positions": positions,
    }
    _show_or_start(reference, given, changes or [], executor, as_json=as_json, start={"reconstruct": False, "steering": {}})


def _sampling(
    prompt: list[str] | None, prompts: Path | None, temperature: float | None, top_p: float | None, seed: int | None
) -> dict[str, Any]:
    file = None if prompts is None else str(prompts)
    return {"prompts": prompt, "prompts_file": file, "sampling.temperature": temperature, "sampling.top_p": top_p, "seed": seed}


def _number(text: str, option: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option} has {text!r} in it, expected {what} with commas between them, as in 7,12") from None


def _show_or_start(
    reference: str, given: dict[str, Any], changes: Sequence[str], executor: Executor, *, as_json: bool, start: dict[str, Any] | None = None
) -> None:
    """Shows a run of generate; of a run of train, starts one with the settings that are `given` by dotted keys, and shows that."""
    from pipeline.config.site_file import load_site

    site = load_site()
    settings = {key: value for key, value in given.items() if value is not None}
    crosscoder, named = _crosscoder(reference, site)
    if named.run.stage == "generate":
        if settings or changes or executor is not Executor.debug:
            raise UserError(f"{named.reference} has its texts already, and they are shown: name a run of train for others")
        _show(named.run, site, as_json=as_json)
        return
    config = _configuration(crosscoder, named, (start or {}), settings, changes, site)
    if (run := _start(config, executor, site, as_json=as_json)) is not None:
        _show(run, site, as_json=as_json)


def _show(run: "RunDirectory", site: "Site", *, as_json: bool) -> None:
    """The texts and, below the table, what the newest feature store of the crosscoder says of the features that were edited."""
    from slurm.commands.command_line import print_json, print_lines, terminal_width
    from slurm.watching import generation_view
    from slurm.watching.feature_store import FeatureStore, crosscoder_directory, newest_of

    texts = generation_view.Texts.open(run)
    if as_json:
        print_json(texts.rows)
        return
    trained = crosscoder_directory(run) if texts.features else None
    made = None if trained is None else newest_of("features", trained, site.runs)
    known = [] if made is None else generation_view.edited_features(texts.features, FeatureStore.open(made.path / "features"))
    print_lines([*generation_view.text_lines(texts, terminal_width()), *known])


def _crosscoder(reference: str, site: "Site") -> "tuple[Path, Named]":
    """The directory that `crosscoder` names, and the run that it belongs to."""
    from slurm.record.run_reference import find

    checkpoint = Path(reference).expanduser().absolute()
    if (checkpoint / "crosscoder.json").is_file():
        return checkpoint, find(str(checkpoint.parent.parent), site.runs)
    named = find(reference, site.runs)
    return (named.run.path if named.task is None else named.run.task_directory(named.task)), named


def _configuration(
    crosscoder: Path, named: "Named", start: dict[str, Any], settings: dict[str, Any], changes: Sequence[str], site: "Site"
) -> Any:
    from pipeline.config import load
    from slurm.submission.model_of_training import models_of

    where = named.reference
    values: dict[str, Any] = {"stage": "generate", "name": named.run.job()["name"], "crosscoder": str(crosscoder), **start}
    if not any(change.startswith(("language_model.model=", "language_models")) for change in changes):
        values |= models_of(named)
    for key, value in settings.items():
        group, _, last = key.rpartition(".")
        (values.setdefault(group, {}) if group else values)[last] = value
    for change in changes:
        load.set_value(values, change, where=where)
    return load.from_values(values, where=where, site=site)


def _start(config: Any, executor: Executor, site: "Site", *, as_json: bool) -> Any:
    """The run, once it has finished here; None of one that was queued."""
    from slurm.commands.run_commands import check_queue, queue
    from slurm.execution import waves
    from slurm.record.activity import one_submission_at_a_time
    from slurm.submission import input_preflight
    from slurm.submission.foreground import run_here
    from slurm.submission.freezing import Freezer

    parsed = [("crosscoder generate", config)]
    input_preflight.check(parsed, site.runs)
    cluster = check_queue(parsed) if executor is Executor.slurm else None
    with one_submission_at_a_time(site.runs):
        planned = Freezer(site, executor=executor.value).plan(parsed, again=True, cluster=cluster)
        if executor is not Executor.debug:
            waves.queue_first(site.runs)
            queue(planned, as_json=as_json)
            return None
    # What the stage prints is no part of the JSON.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        run_here(planned)
    return planned[0].run
