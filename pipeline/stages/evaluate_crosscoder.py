"""Measures a trained crosscoder on held-out text: five numbers and the verdict on the terminal, the rest in the run directory.

    metrics.json            every number, and under `definitions` what each is; written last, so it is whole or not there
    tables.txt              the same to read, in tables of 100 columns
    features.safetensors    a row a feature, over the held-out positions; 0 where a feature never fires:
        firing_counts [F] int64         positions on which it fires
        tokens_since_fired [F] int64    training tokens since it last fired
        sum_activation [F] float64      of its activation over them
        max_activation [F] float32
        drop_by_layer [F, L] float32    share of that sum that goes when the layer is masked in the encoder
        survives_alone [F, L] float32   share of its firings that are left when only the layer is encoded
        and for each two models, such as base-chat (see `pipeline.evaluation.model_diffing`; NaN where a feature never fires):
        norm_difference.base-chat [F] float64       0: it writes in base alone, 1: in chat alone
        beta_error.base-chat, beta_reconstruction.base-chat [F, 2] float64, nu_error.base-chat, nu_reconstruction.base-chat [F] float64
    nats.png                what the crosscoder costs the language model at each layer, beside every baseline
    explained_variance.png  of each layer, beside every baseline
    feature_density.png     how often features fire
    l0_curves.png           explained variance at other L0s, where the crosscoder has thresholds to move
    model_diffing.png       where there are several models: which features write in which of two

Nothing is kept of an evaluation that is interrupted: started again, it begins anew.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline import records
from pipeline.activations.source import Provenance
from pipeline.config.errors import UserError
from pipeline.config.evaluate_crosscoder import EvaluateConfig
from pipeline.config.token_limit import notices, short_of
from pipeline.contexts import Contexts
from pipeline.crosscoder import metrics
from pipeline.crosscoder.checkpoint import TrainedCrosscoder, load_crosscoder
from pipeline.evaluation import figures, panels, report, summary
from pipeline.evaluation.approximations import written_layers
from pipeline.evaluation.baselines import fitted_baselines, ranks_of
from pipeline.evaluation.belonging import check_inputs, check_model, check_readable, find_run
from pipeline.evaluation.fitting import fit
from pipeline.evaluation.held_out import Parts, divide
from pipeline.evaluation.measurements import Compared, Measurement
from pipeline.evaluation.model_diffing import ModelDifference
from pipeline.evaluation.outliers import held_out_moments, outlier_limits
from pipeline.evaluation.report import Evaluation
from pipeline.language_models import Models, bind, each, identities, load_models
from pipeline.run import Run
from pipeline.tokens import TokenSet


def run(config: EvaluateConfig, run: Run) -> dict[str, Any]:
    """Runs the stage; gives the headline numbers and where the rest lies."""
    models = load_models(config)
    trained = load_crosscoder(find_run(config.crosscoder), models.device)
    compared = compared_runs(config, trained, models)
    tokens = TokenSet.open(config.tokens)
    training = None if config.training_tokens is None else TokenSet.open(config.training_tokens)
    remarks = check_inputs(trained, models, tokens, config)
    if training is not None:
        check_readable(training, trained, models, config)
    if config.check_hashes:
        tokens.check_hashes(run)
    inputs = {"crosscoder": trained.identity, "tokens": tokens.data_id}
    inputs |= {f"compare_with[{number}]": other.trained.identity for number, other in enumerate(compared)}
    inputs |= {} if training is None else {"training_tokens": training.data_id}
    for field, identity in inputs.items():
        run.bind_input(field, identity)
    bind(models, run)
    inputs |= identities(models)
    parts = divided(trained, tokens, training, config, models.device)
    where = f"{tokens.directory}{'' if training else ', less what baselines are fitted on,'}"
    limit = notices(config.max_tokens, parts.num_there, where=where, unit="tokens")
    differences = [*differences_from_training(trained.provenance, config, tokens, training), *differences_of_runs(trained, compared)]
    for line in [*remarks, *limit, *differences]:
        run.say(line)
    fitted_on = "tokens" if training is None else "training_tokens"
    found = evaluate(trained, compared, models, parts, config, run, fitted_on=fitted_on)
    document = report.as_json(found, inputs)
    for line in [*summary.first_lines(found), ""]:
        run.say(line)
    paths = write_files(run.directory, document, found)
    for path in paths:
        run.say(str(path))
    result = {**report.headline(found), "files": [str(path) for path in paths], **models.memory_used()}
    return result | short_of(config.max_tokens, parts.num_there)


def compared_runs(config: EvaluateConfig, trained: TrainedCrosscoder, models: Models) -> list[Compared]:
    """The crosscoders of `compare_with`, each with a name of its own.

    Raises `UserError` for one of another language model, that reconstructs none of the layers of `trained`, or that is named twice.
    """
    paths = [find_run(path) for path in config.compare_with]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise UserError(f"compare_with[{number}] is {path}, which is named already; name each run once")
    labels = _labels(paths)
    found = []
    for path, label in zip(paths, labels, strict=True):
        other = load_crosscoder(path, models.device)
        check_model(other, models, f"compare_with {path}")
        if not _reconstructed(other) & _reconstructed(trained):
            raise UserError(
                f"compare_with {path} reconstructs {', '.join(sorted(_reconstructed(other)))}, the crosscoder in {config.crosscoder} "
                f"{', '.join(sorted(_reconstructed(trained)))}; name runs that share a layer with it"
            )
        found.append(Compared(label, other))
    return found


def _reconstructed(trained: TrainedCrosscoder) -> set[str]:
    return {trained.layers[layer] for layer in written_layers(trained)}


def _labels(paths: list[Path]) -> list[str]:
    """The name of each run, with what tells it from another of that name where there is one."""
    names = [_name(path) for path in paths]
    return [name if names.count(name) == 1 else _name(path, with_id=True) for name, path in zip(names, paths, strict=True)]


def _name(path: Path, *, with_id: bool = False) -> str:
    """`x` of train/x/<id>, `x/tasks/3` of sweep/x/<id>/tasks/3; with the id and the step of a checkpoint if need be."""
    step = f" at {path.name}" if (path / "crosscoder.json").exists() else ""
    run = path.parent.parent if step else path
    task = f"/tasks/{run.name}" if run.parent.name == "tasks" else ""
    run = run.parent.parent if task else run
    return f"{run.parent.name}/{run.name}{task}{step}" if with_id else f"{run.parent.name}{task}"


def differences_from_training(trained: Provenance, config: EvaluateConfig, tokens: TokenSet, training: TokenSet | None) -> list[str]:
    """A sentence for each way in which what is measured or fitted on is other than what was trained on; the figures hold all the same."""
    lines = []
    if trained.tokens_id == tokens.data_id:
        lines.append(f"{tokens.directory} is the token set that the crosscoder was trained on: these are no held-out figures")
    if training is None:
        lines.append(f"the baselines are fitted on a part of {tokens.directory} that is not measured; training_tokens names another set")
    elif training.data_id == tokens.data_id:
        lines.append("training_tokens is the held-out set itself: the baselines are fitted on what they are measured on")
    elif trained.tokens_id and training.data_id != trained.tokens_id:  # nothing is known of an imported one
        lines.append(f"training_tokens {training.directory} is not the token set that the crosscoder was trained on")
    if trained.context_tokens != config.context_tokens:
        lines.append(
            f"context_tokens is {config.context_tokens:,}, in training it was {trained.context_tokens:,}: activations far into a context "
            "may differ from those trained on"
        )
    if trained.drop_positions != [0]:
        left_out = f"left out positions {trained.drop_positions}" if trained.drop_positions else "left out no position"
        lines.append(f"training {left_out} of each context; these figures leave out position 0 alone")
    if trained.outlier_norms is not None and config.outlier_norm_ratio is None:
        lines.append("training left out positions of large norm, outlier_norm_ratio null counts them: they may decide every figure")
    return lines


def differences_of_runs(trained: TrainedCrosscoder, compared: list[Compared]) -> list[str]:
    """A sentence for each compared run that was trained on contexts which begin otherwise than these."""
    ours = trained.provenance.beginning_of_text_id
    return [
        f"{run.label} was trained on contexts that begin otherwise (beginning-of-text {_id(theirs)}, here {_id(ours)}): its rows are of "
        "activations that it does not know"
        for run in compared
        if (theirs := run.trained.provenance.beginning_of_text_id) != ours
    ]


def _id(token_id: int | None) -> str:
    return "none" if token_id is None else f"id {token_id:,}"


def divided(trained: TrainedCrosscoder, tokens: TokenSet, training: TokenSet | None, config: EvaluateConfig, device: torch.device) -> Parts:
    """The contexts that are measured and those that baselines are fitted on."""
    beginning = trained.provenance.beginning_of_text_id
    return divide(
        Contexts(tokens, config.context_tokens, beginning_of_text_id=beginning),
        None if training is None else Contexts(training, config.context_tokens, beginning_of_text_id=beginning),
        max_tokens=config.max_tokens,
        fit_tokens=config.fit_tokens,
        seed=config.seed,
        batch_contexts=config.batch_contexts,
        device=device,
        exclude_token_ids=trained.provenance.exclude_token_ids,
    )


def evaluate(
    trained: TrainedCrosscoder,
    compared: list[Compared],
    models: Models,
    parts: Parts,
    config: EvaluateConfig,
    run: Run,
    *,
    fitted_on: str,
) -> Evaluation:
    """All passes: what an outlier is, the means, the baselines, and the measurements."""
    limits = outlier_limits(trained, models, parts.leading, config.outlier_norm_ratio, run)
    moments = held_out_moments(models, trained.layers, parts.measured, limits, run)
    fitted = fit(trained, models, parts.fitted, limits, run)
    baselines = fitted_baselines(fitted, trained, seed=config.seed)
    measurement = Measurement(
        trained,
        models,
        limits,
        moments,
        baselines,
        compared,
        fit_sample_NLD=fitted.sample_NLD,
        spliced_baselines=config.spliced_baselines,
        seed=config.seed,
    )
    passes = measurement.num_forward_passes
    num_models = len(each(models))
    clean = "one as it is" if num_models == 1 else f"{num_models} as the models are"
    run.say(f"{passes} forward passes a batch: {clean}, {passes - num_models} with activations replaced")
    done, total = 0, len(parts.measured.indices)
    for batch in parts.measured.batches():
        measurement.add(batch, run)
        done += len(batch.tokens_BS)
        run.report("evaluate", done, total, unit="contexts", done=done == total)
    found = measurement.results()
    return Evaluation(
        trained, compared, parts, fitted_on, limits, fitted, baselines, found,
        ranks_needed=report.ranks_needed(found, fitted, trained.layers),
        num_forward_passes=passes,
        exact_head=all(model.head.is_exact for model in each(models).values()),
    )  # fmt: skip


def write_files(directory: Path, document: dict[str, Any], evaluation: Evaluation) -> list[Path]:
    """Writes figures and features, then `metrics.json`, each whole or not at all; gives their paths, the first to look at first."""
    names = ("tables.txt", "nats.png", "explained_variance.png", "feature_density.png", "features.safetensors")
    text, nats, explained, density, features = (directory / name for name in names)
    trained, found, ranks = evaluation.trained, evaluation.found, ranks_of(evaluation.fit)
    figures.feature_density(
        density,
        found.firing.counts_F.cpu().numpy(),
        trained.dead_F.cpu().numpy(),
        num_positions=found.num_positions,
        dense_fraction=metrics.DENSE_FRACTION,
    )
    panels.draw_nats(nats, found, ranks)
    panels.draw_explained_variance(explained, found, ranks)
    curves = directory / "l0_curves.png"
    panels.draw_sweep(curves, found, ranks)
    with records.atomic_file(text) as file:
        file.write(("\n".join(summary.all_lines(evaluation)) + "\n").encode())
    diffing = directory / "model_diffing.png"
    if found.model_differences:
        figures.model_diffing(diffing, [norm_bars(pair) for pair in found.model_differences])
    with records.atomic_file(features) as file:
        file.write(safetensors.torch.save(feature_columns(evaluation)))
    records.write_json(directory / "metrics.json", document)
    return [path for path in (directory / "metrics.json", nats, text, explained, curves, diffing, density, features) if path.exists()]


def feature_columns(evaluation: Evaluation) -> dict[str, Tensor]:
    """What `features.safetensors` holds, on the CPU."""
    driving = evaluation.found.driving
    columns = {
        "firing_counts": evaluation.found.firing.counts_F,
        "tokens_since_fired": evaluation.trained.tokens_since_fired_F,
        "sum_activation": driving.sum_activation_F,
        "max_activation": driving.max_activation_F,
        "drop_by_layer": driving.drop_by_layer_FL.float(),
        "survives_alone": driving.survives_alone_FL.float(),
    }
    for pair in evaluation.found.model_differences:
        for name in ("norm_difference", "nu_error", "nu_reconstruction"):
            columns[f"{name}.{pair.name}"] = getattr(pair, f"{name}_F")
        for name in ("beta_error", "beta_reconstruction"):
            columns[f"{name}.{pair.name}"] = getattr(pair, f"{name}_F2")
    return {name: column.cpu().contiguous() for name, column in columns.items()}


def norm_bars(pair: ModelDifference) -> figures.NormBars:
    """Where the features that fire write."""
    shares = {row.name: row.fraction for row in pair.classes()}
    return figures.NormBars(pair.one, pair.other, pair.norm_difference_F[pair.fires_F].numpy(), shares)
