"""What an evaluation gives: `metrics.json`, the verdict, the numbers by which runs are compared."""

import math
import textwrap
from typing import Any, NamedTuple

from pipeline.activations.outliers import OutlierLimits
from pipeline.config.errors import UserError
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.evaluation import tables, verdict
from pipeline.evaluation.approximations import Approximation
from pipeline.evaluation.baselines import Fit, rank_that_explains, ranks_of
from pipeline.evaluation.definitions import DEFINITIONS
from pipeline.evaluation.held_out import Parts
from pipeline.evaluation.measurements import JOINT, MEAN_OVER_LAYERS, SPLIT, Compared, Measurements
from pipeline.evaluation.predictions import Stand
from pipeline.evaluation.splicing import of_model

METRICS_FORMAT = "crosscoder-metrics/2"

Json = dict[str, Any]


class Evaluation(NamedTuple):
    """All that was found, and what it was found with."""

    trained: TrainedCrosscoder
    compared: list[Compared]
    parts: Parts
    fitted_on: str
    """`training_tokens`, or `tokens` where a part of the held-out set was kept back."""
    limits: OutlierLimits
    fit: Fit
    baselines: list[Approximation]
    found: Measurements
    ranks_needed: list[int | None]
    """By layer measured, how many principal directions explain as much as the crosscoder; None where nothing varies."""
    num_forward_passes: int
    exact_head: bool


def ranks_needed(found: Measurements, fit: Fit, layers: list[str]) -> list[int | None]:
    """Of `Evaluation`; `layers` are those that the crosscoder reads."""
    shares = {layer: found.reconstruction[Stand(layer, "crosscoder")].explained_variance for layer in found.layers}
    known = {
        layer: None if share is None else rank_that_explains(fit.covariances, layers.index(layer), share) for layer, share in shares.items()
    }
    return list(known.values())


def as_json(evaluation: Evaluation, inputs: dict[str, str]) -> Json:
    """What `metrics.json` holds. Raises `UserError` naming the first number that is not finite."""
    trained, found = evaluation.trained, evaluation.found
    document = {
        "format": METRICS_FORMAT,
        "inputs": inputs,
        "layers": trained.layers,
        "num_features": trained.num_features,
        "step": trained.step,
        "tokens_trained": trained.tokens_trained,
        "held_out": {
            "contexts": len(evaluation.parts.measured.indices),
            "tokens": evaluation.parts.measured.num_tokens,
            "positions": found.num_positions,
            "predictions": found.num_predictions,
            "outliers": found.num_outliers,
            "excluded_positions": found.num_excluded,
            "limits_from": evaluation.limits.source,
            "by_layer": [row._asdict() for row in found.outliers],
        },
        "sparsity": sparsity(evaluation),
        "reconstruction": [{**stand._asdict(), **row._asdict()} for stand, row in found.reconstruction.items()],
        "clean_cross_entropy": found.clean_cross_entropy,
        **_by_model("clean_cross_entropy", found.clean_by_model),
        "float32_head": evaluation.exact_head,
        "replaced": [{**stand._asdict(), **loss._asdict()} for stand, loss in found.losses.items()],
        "baselines": _baselines(evaluation),
        "driving": _driving(evaluation),
        **_model_differences(found),
        "threshold_sweep": [point._asdict() for point in found.sweep],
        "compared": [
            {
                "source": run.label, "kind": run.kind, "identity": run.trained.identity, "layers": run.trained.layers,
                "num_features": run.trained.num_features, "l0": found.compared_firing[run.label].l0,
            }
            for run in evaluation.compared
        ],
        "definitions": DEFINITIONS,
    }  # fmt: skip
    check_finite(document, "metrics")
    return {**document, "verdict": verdict_lines(evaluation)}


def verdict_lines(evaluation: Evaluation) -> list[str]:
    """The verdict, in lines of at most 100 columns."""
    sentences = verdict.verdict(evaluation.found, ranks=ranks_of(evaluation.fit), ranks_needed=evaluation.ranks_needed)
    return [line for sentence in sentences for line in wrapped(sentence)]


def wrapped(sentence: str) -> list[str]:
    """In lines of at most 100 columns."""
    return textwrap.wrap(sentence, tables.WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def sparsity(evaluation: Evaluation) -> Json:
    """How many features fire, and how often."""
    trained, firing, features = evaluation.trained, evaluation.found.firing, evaluation.trained.num_features
    dead = int(trained.dead_F.sum())
    return {
        "l0": firing.l0,
        "l0_as_trained": evaluation.found.l0_as_trained,
        "dead": dead,
        "dead_fraction": dead / features,
        "dead_window_tokens": trained.dead_window_tokens,
        "dead_eval": firing.num_silent,
        "dead_eval_fraction": firing.num_silent / features,
        "dense": firing.num_dense,
        "dense_fraction": firing.num_dense / features,
    }


def _baselines(evaluation: Evaluation) -> Json:
    fit, layers = evaluation.fit, evaluation.trained.layers
    rows = [
        {"layer": layers[layer], "by": a.by, "source": a.sources[layer], "fitted": a.fitted[layer]}
        for a in evaluation.baselines
        for layer in a.covered
    ]
    return {
        "fitted_on": evaluation.fitted_on,
        "fit_positions": fit.covariances.num_positions,
        "fit_sample": len(fit.sample_NLD),
        "fit_l0": fit.l0,
        "pca_rank": ranks_of(fit),
        "pca_rank_needed": dict(zip(evaluation.found.layers, evaluation.ranks_needed, strict=True)),
        "forward_passes": evaluation.num_forward_passes,
        "rows": rows,
    }


def _driving(evaluation: Evaluation) -> Json:
    found = evaluation.found.driving.results()
    by_layer = zip(evaluation.trained.layers, found.drop_L, found.survives_alone_L, strict=True)
    return {
        "features": found.num_features,
        "layers_driving": found.layers_driving,
        "layers_driving_quantiles": found.quantiles,
        "functional_coherence": found.functional_coherence,
        "layers_by_decoder_norm": found.layers_by_decoder_norm,
        "by_layer": [{"layer": layer, "drop": drop, "survives_alone": alone} for layer, drop, alone in by_layer],
    }


def _model_differences(found: Measurements) -> Json:
    """The entry `model_diffing` where there are several models."""
    rows = [
        {"models": [pair.one, pair.other], "sites": pair.sites, **row._asdict()}
        for pair in found.model_differences
        for row in pair.classes()
    ]
    return {"model_diffing": rows} if rows else {}


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


def headline(evaluation: Evaluation) -> Json:
    """The numbers by which runs are compared."""
    found, layers, firing = evaluation.found, evaluation.found.layers, sparsity(evaluation)
    joint = found.reconstruction[Stand(JOINT, "crosscoder")]
    mean, split = found.losses[Stand(MEAN_OVER_LAYERS, "crosscoder")], found.losses.get(Stand(SPLIT, "crosscoder"))
    by_model = {name: found.losses.get(Stand(of_model(name, MEAN_OVER_LAYERS), "crosscoder")) for name in found.clean_by_model}
    alone = {layer: found.losses[Stand(layer, "crosscoder")] for layer in layers}
    baseline_nats, baseline_variance = verdict.best_of_baselines(found)
    driving = found.driving.results()
    return {
        "l0": firing["l0"],
        "explained_variance": joint.explained_variance,
        "explained_variance_with_outliers": joint.explained_variance_with_outliers,
        "explained_variance_by_layer": {layer: found.reconstruction[Stand(layer, "crosscoder")].explained_variance for layer in layers},
        "explained_variance_of_baseline": baseline_variance,
        **{key: firing[key] for key in ("dead_fraction", "dead_eval_fraction", "dense_fraction")},
        "clean_cross_entropy": found.clean_cross_entropy,
        **_by_model("clean_cross_entropy", found.clean_by_model),
        "cross_entropy_difference": mean.difference,
        **_by_model("cross_entropy_difference", {name: loss and loss.difference for name, loss in by_model.items()}),
        "cross_entropy_difference_by_layer": {layer: loss.difference for layer, loss in alone.items()},
        "cross_entropy_difference_split": None if split is None else split.difference,
        "cross_entropy_difference_of_baseline": baseline_nats,
        "recovered_against_zero": mean.recovered_against_zero,
        "recovered_by_layer": {layer: loss.recovered_against_zero for layer, loss in alone.items()},
        "layers_driving": driving.layers_driving,
        "functional_coherence": driving.functional_coherence,
        **_shares_of_models(found),
        "positions": found.num_positions,
        "outliers": found.num_outliers,
    }


def _by_model(name: str, values: dict[str, float | None] | dict[str, float]) -> Json:
    """The entry `<name>_by_model` where there are several models."""
    return {f"{name}_by_model": dict(values)} if "" not in values else {}


def _shares_of_models(found: Measurements) -> Json:
    """The entry `model_diffing` where there are several models: by pair, the share of each class, and what of `only` is confirmed."""
    by_pair = {}
    for pair in found.model_differences:
        classes = pair.classes()
        shares = {f"{row.name}_fraction": row.fraction for row in classes}
        by_pair[pair.name] = shares | {f"{row.name}_absent": row.absent for row in classes if row.name.startswith("only_")}
    return {"model_diffing": by_pair} if by_pair else {}
