"""Measures a trained crosscoder on held-out text: tables on the terminal, `metrics.json` and figures in the run directory.

    metrics.json            every number, and under `definitions` what each is; written last, so it is whole or not there
    features.safetensors    firing_counts [F] int64 (held-out positions on which each feature fires), tokens_since_fired [F] int64
    feature_density.png     how often features fire
    explained_variance.png  of each layer, beside the baselines

Nothing is kept of an evaluation that is interrupted: started again, it begins anew.
"""

import math
from pathlib import Path
from typing import Any

import safetensors.torch

from pipeline import records
from pipeline.activations.source import Provenance
from pipeline.activations.token_check import check_tokens
from pipeline.config.errors import UserError
from pipeline.config.evaluate_crosscoder import EvaluateConfig
from pipeline.config.token_limit import notices, short_of
from pipeline.contexts import Contexts
from pipeline.crosscoder import metrics
from pipeline.crosscoder.checkpoint import TrainedCrosscoder, load_crosscoder
from pipeline.evaluation import figures, tables
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.measurements import Measurement, Measurements, Stand, layer_moments
from pipeline.language_model import LanguageModel
from pipeline.run import Run
from pipeline.tokens import TokenSet

METRICS_FORMAT = "crosscoder-metrics/1"


def run(config: EvaluateConfig, run: Run) -> dict[str, Any]:
    """Runs the stage; gives the headline numbers and where the rest lies."""
    language_model = LanguageModel.load(config.language_model)
    trained = load_crosscoder(find_run(config.crosscoder), language_model.device)
    tokens = TokenSet.open(config.tokens)
    remarks = check_inputs(trained, language_model, tokens, config)
    if config.check_hashes:
        tokens.check_hashes(run)
    identities = {"crosscoder": trained.identity, "language_model": language_model.hash, "tokens": tokens.data_id}
    for field, identity in identities.items():
        run.bind_input(field, identity, language_model.files if field == "language_model" else None)
    held_out = HeldOut(
        Contexts(tokens, config.context_tokens, beginning_of_text_id=trained.provenance.beginning_of_text_id),
        max_tokens=config.max_tokens,
        seed=config.seed,
        batch_contexts=config.batch_contexts,
        device=language_model.device,
    )
    if trained.provenance.tokens_id == tokens.data_id:
        run.say(f"{tokens.directory} is the token set that the crosscoder was trained on: these are no held-out figures")
    limit = notices(config.max_tokens, held_out.num_there, where=tokens.directory, unit="tokens")
    for line in [*remarks, *limit, *differences_from_training(trained.provenance, config)]:
        run.say(line)
    found = measure(trained, language_model, held_out, config, run)
    document = {"format": METRICS_FORMAT, "inputs": identities, **as_json(found, trained)}
    check_finite(document, "metrics")
    for line in [*summary(document, trained), "", *tables.tables(found, trained.layers).splitlines()]:
        run.say(line)
    paths = write_files(run.directory, document, found, trained)
    for path in paths:
        run.say(str(path))
    result = {**headline(document, trained.layers), "files": [str(path) for path in paths], **language_model.memory_used()}
    return result | short_of(config.max_tokens, held_out.num_there)


def find_run(path: Path) -> Path:
    """`path` itself if it is a run or a checkpoint; of a folder of runs of one name, the newest that finished."""
    if not path.is_dir() or (path / "checkpoints").exists() or (path / "crosscoder.json").exists():
        return path
    results = {result.parent: records.read_json(result) for result in path.glob("*/result.json")}
    finished = [directory for directory, result in results.items() if result.get("status") == "finished"]
    if not finished:
        raise UserError(f"{path} holds neither a checkpoint nor a finished run of train; train first, or name one of its checkpoints")
    return max(finished, key=lambda directory: directory.name)


def check_inputs(trained: TrainedCrosscoder, language_model: LanguageModel, tokens: TokenSet, config: EvaluateConfig) -> list[str]:
    """Sentences for the log; raises `UserError` where crosscoder, language model and token set don't belong together."""
    provenance = trained.provenance
    if provenance.language_model_hash != language_model.hash:
        raise UserError(
            f"the crosscoder in {config.crosscoder} was trained on a language model of hash {_short(provenance.language_model_hash)}, but "
            f"language_model.model {language_model.name} has {_short(language_model.hash)}; name the model that it was trained on"
        )
    missing = [layer for layer in trained.layers if layer not in language_model.block_names]
    if missing:
        raise UserError(
            f"the crosscoder in {config.crosscoder} reads {missing[0]}, but {language_model.name} has "
            f"{language_model.block_names[0]} to {language_model.block_names[-1]}; name the model that it was trained on"
        )
    if trained.d_model != language_model.d_model:
        raise UserError(
            f"the crosscoder in {config.crosscoder} reads activations of width {trained.d_model:,}, but {language_model.name} has width "
            f"{language_model.d_model:,}; name the model that it was trained on"
        )
    if provenance.tokenizer_hash != tokens.tokenizer_hash:
        raise UserError(
            f"{tokens.directory} was made by the tokenizer {_short(tokens.tokenizer_hash)}, the tokens that the crosscoder was trained on "
            f"by {_short(provenance.tokenizer_hash)}; tokenize the held-out text with the same tokenizer"
        )
    beginning = provenance.beginning_of_text_id
    if config.beginning_of_text not in ("auto", beginning is not None):
        was = "without beginning-of-text" if beginning is None else f"that begin with beginning-of-text, id {beginning:,}"
        raise UserError(
            f"beginning_of_text is {str(config.beginning_of_text).lower()}, but the crosscoder in {config.crosscoder} was trained on "
            f"contexts {was}; set it to auto, which does as training did"
        )
    language_model.check_use(trained.layers, config.context_tokens, predictions=True)
    check_tokenizer = config.language_model.check_tokenizer
    remarks = check_tokens(tokens, language_model, check_tokenizer=check_tokenizer, beginning_of_text_id=beginning)
    does = "without beginning-of-text" if beginning is None else f"with beginning-of-text, id {beginning:,}"
    return [*remarks, f"contexts begin {does}, as in training"]


def differences_from_training(trained: Provenance, config: EvaluateConfig) -> list[str]:
    """A sentence for each way in which the measured activations are others than those trained on; the figures hold all the same."""
    lines = []
    if trained.context_tokens != config.context_tokens:
        lines.append(
            f"context_tokens is {config.context_tokens:,}, in training it was {trained.context_tokens:,}: activations far into a context "
            "may differ from those trained on"
        )
    if trained.drop_positions != [0]:
        left_out = f"left out positions {trained.drop_positions}" if trained.drop_positions else "left out no position"
        lines.append(f"training {left_out} of each context; these figures leave out position 0 alone")
    return lines


def _short(content_hash: str) -> str:
    return content_hash[:12] if content_hash else "(none)"


def measure(trained: TrainedCrosscoder, language_model: LanguageModel, held_out: HeldOut, config: EvaluateConfig, run: Run) -> Measurements:
    """Both passes over the held-out contexts."""
    moments = layer_moments(language_model, trained.layers, held_out, run)
    measurement = Measurement(
        trained,
        language_model,
        moments,
        other_layer_distance=config.other_layer_distance,
        training_batch_positions=trained.batch_positions,
    )
    done, total = 0, len(held_out.indices)
    for batch in held_out.batches():
        measurement.add(batch, run)
        done += len(batch.tokens_BS)
        run.report("evaluate", done, total, unit="contexts", done=done == total)
    return measurement.results(held_out)


def as_json(found: Measurements, trained: TrainedCrosscoder) -> dict[str, Any]:
    """What `metrics.json` holds besides format and inputs."""
    features, dead = trained.num_features, int(trained.dead_F.sum())
    return {
        "layers": trained.layers,
        "num_features": features,
        "step": trained.step,
        "tokens_trained": trained.tokens_trained,
        "held_out": {
            "contexts": found.num_contexts,
            "tokens": found.num_tokens,
            "positions": found.num_positions,
            "predictions": found.num_predictions,
        },
        "sparsity": {
            "l0": found.firing.l0,
            "l0_as_trained": found.l0_as_trained,
            "dead": dead,
            "dead_fraction": dead / features,
            "dead_window_tokens": trained.dead_window_tokens,
            "dead_eval": found.firing.num_silent,
            "dead_eval_fraction": found.firing.num_silent / features,
            "dense": found.firing.num_dense,
            "dense_fraction": found.firing.num_dense / features,
        },
        "reconstruction": [{**stand._asdict(), **row._asdict()} for stand, row in found.reconstruction.items()],
        "clean_cross_entropy": found.clean_cross_entropy,
        "replaced": [{**stand._asdict(), **loss._asdict()} for stand, loss in found.losses.items()],
        "definitions": metrics.DEFINITIONS,
    }


def check_finite(value: Any, where: str) -> None:
    """Raises `UserError` naming the first number that is NaN or infinite."""
    if isinstance(value, dict):
        for key, inner in value.items():
            check_finite(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            check_finite(inner, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{where} is {value}: the language model or the crosscoder gives numbers that are not finite; check the checkpoint's "
            "weights, or choose a dtype with a wider range (bfloat16 or float32)"
        )


def summary(document: dict[str, Any], trained: TrainedCrosscoder) -> list[str]:
    """The lines above the tables."""
    held_out, sparsity, features = document["held_out"], document["sparsity"], trained.num_features
    as_trained = "" if sparsity["l0_as_trained"] is None else f" with the inference threshold, {sparsity['l0_as_trained']:.2f} as trained"
    trained_on = f"{trained.tokens_trained:,} training tokens"
    dead, dead_eval, dense = (_share(sparsity[key], features) for key in ("dead", "dead_eval", "dense"))
    return [
        f"crosscoder {trained.identity[:12]}: {len(trained.layers)} layers, {features:,} features, {trained_on}",
        f"held-out: {held_out['contexts']:,} contexts, {held_out['positions']:,} positions, {held_out['predictions']:,} predictions",
        f"L0 {sparsity['l0']:.2f}{as_trained}",
        f"dead: {dead} in the last {trained.dead_window_tokens:,} training tokens, {dead_eval} on the held-out text",
        f"dense: {dense} fire on over {100 * metrics.DENSE_FRACTION:.0f} % of the positions",
    ]


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.1f} %)"


def write_files(directory: Path, document: dict[str, Any], found: Measurements, trained: TrainedCrosscoder) -> list[Path]:
    """Writes figures and counts, then `metrics.json`, each whole or not at all; gives their paths, `metrics.json` first."""
    density, explained, features = (directory / name for name in ("feature_density.png", "explained_variance.png", "features.safetensors"))
    counts_F, since_F = found.firing.counts_F.cpu(), trained.tokens_since_fired_F.cpu()
    figures.feature_density(
        density,
        counts_F.numpy(),
        trained.dead_F.cpu().numpy(),
        num_positions=found.num_positions,
        dense_fraction=metrics.DENSE_FRACTION,
    )
    figures.explained_variance(explained, [layer_bars(found, layer) for layer in trained.layers])
    with records.atomic_file(features) as file:
        file.write(safetensors.torch.save({"firing_counts": counts_F, "tokens_since_fired": since_F}))
    records.write_json(directory / "metrics.json", document)
    return [directory / "metrics.json", density, explained, features]


def layer_bars(found: Measurements, layer: str) -> figures.LayerBars:
    """Explained variance of the crosscoder and of the best other layer."""

    def best(by: str) -> float | None:
        rows = [row.explained_variance for stand, row in found.reconstruction.items() if (stand.layer, stand.by) == (layer, by)]
        return max((value for value in rows if value is not None), default=None)

    return figures.LayerBars(layer, best("crosscoder"), best("other_layer_matched"), best("other_layer"))


def headline(document: dict[str, Any], layers: list[str]) -> dict[str, Any]:
    """The numbers by which runs are compared."""
    rows = {Stand(row["layer"], row["by"], row["source"]): row for row in document["reconstruction"]}
    losses = {Stand(row["layer"], row["by"], row["source"]): row for row in document["replaced"]}
    together = losses[Stand("all", "crosscoder")]
    return {
        "l0": document["sparsity"]["l0"],
        "explained_variance": rows[Stand("joint", "crosscoder")]["explained_variance"],
        "explained_variance_by_layer": {layer: rows[Stand(layer, "crosscoder")]["explained_variance"] for layer in layers},
        "dead_fraction": document["sparsity"]["dead_fraction"],
        "dead_eval_fraction": document["sparsity"]["dead_eval_fraction"],
        "dense_fraction": document["sparsity"]["dense_fraction"],
        "clean_cross_entropy": document["clean_cross_entropy"],
        "cross_entropy_difference": together["difference"],
        "recovered_against_zero": together["recovered_against_zero"],
        "recovered_by_layer": {layer: losses[Stand(layer, "crosscoder")]["recovered_against_zero"] for layer in layers},
        "positions": document["held_out"]["positions"],
    }
