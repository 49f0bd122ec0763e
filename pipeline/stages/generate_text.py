"""generate: what a language model writes by itself, with layers replaced by a crosscoder's reconstruction, and with features edited.

    generations/        a line of JSON a continuation, see `pipeline.generation.samples`

Nothing is kept of a run that is interrupted: started again, it begins from the first prompt.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.config.generate_text import GenerateConfig
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.evaluation.belonging import check_model, find_run
from pipeline.generation import samples
from pipeline.generation.continuation import Continuation, Writer
from pipeline.generation.editing import Edit
from pipeline.generation.prompts import Prompts, read_prompts
from pipeline.generation.splicing import Intervention
from pipeline.language_model import LanguageModel
from pipeline.language_models import bind, each, identities, load_models
from pipeline.run import Run


class Change(NamedTuple):
    """One of the ways in which every prompt is continued."""

    kind: str
    strength: float | None
    intervention: Intervention | None


def run(config: GenerateConfig, run: Run) -> dict[str, Any]:
    """Runs the stage; gives where the texts lie and what they cost."""
    models = load_models(config)
    trained = load_crosscoder(find_run(config.crosscoder), models.device)
    check_model(trained, models, f"the crosscoder in {config.crosscoder}")
    model, language_model = config.models[config.written_by], each(models)[config.written_by]
    prompts = Prompts.of(language_model, trained, revision=model.revision, check_tokenizer=model.check_tokenizer)
    texts = [*config.prompts, *([] if config.prompts_file is None else read_prompts(config.prompts_file))]
    encoded = [prompts.encode(text) for text in texts]
    for reader in each(models).values():
        _check_lengths(encoded, config, reader)
    models.check_use(trained.layers, max(map(len, encoded)), predictions=True)
    writer = Writer(models, trained, written_by=config.written_by)
    check(config, writer)
    run.bind_input("crosscoder", trained.identity)
    bind(models, run)
    inputs = {"crosscoder": trained.identity, **identities(models)}
    if config.prompts_file is not None:
        run.bind_input("prompts_file", hashlib.sha256("\n".join(texts).encode()).hexdigest())
    for line in [*models.remarks, *_remarks(prompts, writer, language_model)]:
        run.say(line)
    output = run.directory / "generations"
    records.claim(output, {"stage": "generate", "settings": config.identity(), "inputs": {**inputs, "prompts": texts}})
    total, rows = len(encoded) * len(list(changes(config, writer, 1))), list[samples.Row]()
    for number, (text, prompt) in enumerate(zip(texts, encoded, strict=True)):
        of_prompt = {"prompt": number, "prompt_text": text, "prompt_ids": prompt}
        own: Continuation | None = None
        for change in changes(config, writer, len(prompt)):
            run.report("written", len(rows), total, unit="continuations")
            seed = [config.seed, number]
            found = writer.continue_text(prompt, config.sampling, change.intervention, seed=seed, on_token=run.check_stop)
            own = own or found
            one = samples.row(change.kind, change.strength, found, own, config.breakdown)
            rows.append(of_prompt | one | {"text": prompts.decode_behind(prompt, found.token_ids)})
    run.report("written", total, total, unit="continuations", done=True)
    manifest = samples.write(output, rows, {**inputs, "layers": trained.layers, "prompts": len(texts), "settings": config.resolved()})
    run.say(f"{len(rows):,} continuations of {len(texts):,} prompts: {output / 'generations.jsonl'}")
    return _result(manifest, str(output)) | models.memory_used()


def changes(config: GenerateConfig, writer: Writer, prompt_tokens: int) -> Iterator[Change]:
    """The ways in which a prompt of so many tokens is continued; the model's own comes first."""
    yield Change(samples.CLEAN, None, None)
    written = writer.splicer.written
    if config.reconstruct:
        yield Change(samples.RECONSTRUCTION, None, Intervention(config.layers or written, encode_from=config.encode_from))
    if (steering := config.steering) is not None:
        first = steering.first_position(prompt_tokens)
        strengths: list[float | None] = [*steering.strengths] or [None]
        for strength in strengths:
            edit = Edit(tuple(steering.features), 0.0 if strength is None else strength, steering.mode)
            intervention = Intervention(
                steering.layers or written, edit, steering.keep_error, first_position=first, encode_from=config.encode_from
            )
            yield Change(samples.STEERED, strength, intervention)


def check(config: GenerateConfig, writer: Writer) -> None:
    """Raises `UserError` for a layer that the crosscoder doesn't write, or a feature that it doesn't have."""
    writer.splicer.check(config.layers or [])
    if config.steering is not None:
        writer.splicer.check(config.steering.layers or [], config.steering.features, field="steering.layers")


def _check_lengths(encoded: list[list[int]], config: GenerateConfig, language_model: LanguageModel) -> None:
    new, limit = config.sampling.max_new_tokens, language_model.max_context
    for number, prompt in enumerate(encoded):
        read = len(prompt) + new - 1  # the last token is written, not read
        if limit is not None and read > limit:
            raise UserError(
                f"prompt {number} has {len(prompt):,} tokens and sampling.max_new_tokens is {new:,}, but {language_model.name} reads at "
                f"most {limit:,} tokens; use a shorter prompt, or fewer new tokens"
            )


def _remarks(prompts: Prompts, writer: Writer, language_model: LanguageModel) -> Iterator[str]:
    beginning = prompts.beginning_of_text_id
    does = "without beginning-of-text" if beginning is None else f"with beginning-of-text, id {beginning:,}"
    yield f"prompts begin {does}, as contexts of the training did"
    if not writer.is_cached:
        yield f"{language_model.name} can't go on from a key-value cache: every token reads the whole text again"


def _result(manifest: records.Record, output: str) -> dict[str, Any]:
    means = {
        kind: [{name: one[name] for name in ("strength", *samples.MEANS, "broken")} for one in manifest["summary"] if one["kind"] == kind]
        for kind in (samples.CLEAN, samples.RECONSTRUCTION, samples.STEERED)
    }
    alone = {
        kind: {name: means[kind][0][name] for name in samples.MEANS} for kind in (samples.CLEAN, samples.RECONSTRUCTION) if means[kind]
    }
    return {
        "output": output,
        "data_id": manifest["data_id"],
        "prompts": manifest["prompts"],
        "continuations": sum(one["texts"] for one in manifest["summary"]),
        **alone,
        **({"steered": means[samples.STEERED]} if means[samples.STEERED] else {}),
    }
