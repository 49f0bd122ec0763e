"""What a report says in sentences."""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.run import quantity
from slurm.record.run_directory import Json
from slurm.record.text_table import figure
from slurm.reporting.subject import Evaluation, Subject

MANY_LAYERS = 3
"""More of them are not told of one by one."""
UNFITTED = ("crosscoder", "dense_path", "compared")
"""Stand-ins that are no baselines."""


class LayerCost(NamedTuple):
    """What the replacement of one layer costs, in nats."""

    layer: str
    own: float
    baseline: str
    """The cheapest of all."""
    baseline_cost: float

    @property
    def is_better(self) -> bool:
        return self.own < self.baseline_cost


def stand_name(by: str, source: str | None, *, is_short: bool = False) -> str:
    """What stands in for a layer, as a phrase; short ones don't say from which layer."""
    origin = "another layer" if is_short or source is None else source
    phrases = {
        "crosscoder": "crosscoder",
        "dense_path": "its dense path alone",
        "affine": f"affine map of {origin}",
        "affine_all": "affine map of all others",
        "other_layer": f"{origin} as it is",
        "other_layer_matched": f"{origin}, matched" if is_short else f"{origin} matched in mean and scale",
        "pca": "PCA of rank L0",
        "pca_joint": "PCA of rank L0, all layers",
        "random_dictionary": "random dictionary",
        "strongest_baseline": "strongest baseline",
        "mean": "mean",
        "zero": "zeros",
        "compared": str(source),
    }
    return phrases.get(by, by.replace("_", " "))


def layer_costs(metrics: Json) -> list[LayerCost]:
    """Of every layer that was replaced alone, the crosscoder beside the cheapest baseline."""
    found = []
    for layer in metrics["layers"]:
        rows = [row for row in metrics["replaced"] if row["layer"] == layer]
        own = [row["difference"] for row in rows if row["by"] == "crosscoder"]
        baselines = [row for row in rows if row["by"] not in UNFITTED]
        if own and baselines:
            best = min(baselines, key=lambda row: float(row["difference"]))
            found.append(LayerCost(layer, own[0], stand_name(best["by"], best["source"]), best["difference"]))
    return found


def verdict_in_short(evaluation: Evaluation | None) -> str:
    """One sentence: whether the crosscoder is better than the strongest baseline, by nats."""
    if evaluation is None:
        return "Nobody evaluated it yet: whether it is good is not known."
    costs = layer_costs(evaluation.metrics)
    better = sum(cost.is_better for cost in costs)
    outcome = "better" if better == len(costs) else "worse" if not better else f"better at {better} of {len(costs)} layers"
    told = (
        _costs_of_many(costs)
        if len(costs) > MANY_LAYERS
        else "; ".join(f"{_number(cost.own)} nats at {cost.layer} ({cost.baseline}: {_number(cost.baseline_cost)})" for cost in costs)
    )
    than = "the strongest baseline" if len(costs) == 1 else "the strongest baselines"
    return f"By cross-entropy it is {outcome} than {than}: in a layer's place it costs {told}."


def _costs_of_many(costs: Sequence[LayerCost]) -> str:
    own = sum(cost.own for cost in costs) / len(costs)
    baseline = sum(cost.baseline_cost for cost in costs) / len(costs)
    worst = max(costs, key=lambda cost: cost.own - cost.baseline_cost)
    at_worst = f"it stands worst at {worst.layer} with {_number(worst.own)} ({worst.baseline}: {_number(worst.baseline_cost)})"
    return f"{_number(own)} nats, mean over {len(costs)} layers (strongest baselines: {_number(baseline)}); {at_worst}"


def verdict_paragraphs(evaluation: Evaluation) -> list[str]:
    """The verdict as evaluation gave it; lines that begin with a space go on from the line before."""
    paragraphs: list[str] = []
    for line in evaluation.metrics.get("verdict", []):
        if line.startswith(" ") and paragraphs:
            paragraphs[-1] += " " + line.strip()
        elif line.strip():
            paragraphs.append(line.strip())
    return paragraphs


def trained_on(subject: Subject) -> str:
    """What was trained on what, in a sentence."""
    config, metrics = subject.config, None if subject.evaluation is None else subject.evaluation.metrics
    crosscoder, source = config.get("crosscoder", {}), config.get("activations", {})
    function = crosscoder.get("activation_function", {}).get("kind")
    size = crosscoder.get("num_features") or (metrics or {}).get("num_features")
    features = "A crosscoder" + (f" of {size:,} features" if size else "") + (f" ({function})" if function else "")
    layers = f" over {', '.join(subject.layers)}" if subject.layers else ""
    tokens = (metrics or {}).get("tokens_trained") or (subject.rows[-1].get("tokens") if subject.rows else None)
    if config.get("stage") == "import":
        return f"{features}{layers}, imported from files of {config['layout']}."
    amount = f", trained on {quantity(tokens)} positions" if tokens else ", not trained yet"
    where = source.get("path") or source.get("tokens")
    model = (source.get("language_model") or {}).get("model")
    origin = f" of {where}" + (f", straight from {model}" if model else "") if where else ""
    return f"{features}{layers}{amount}{origin}."


def three_sentences(subject: Subject, page: str) -> list[str]:
    """What came out, whether it is good, where to look."""
    return [trained_on(subject), verdict_in_short(subject.evaluation), f"Look at it in a browser: {page}"]


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"


class Tile(NamedTuple):
    """A number with what it is and what to hold it against."""

    value: str
    name: str
    beside: str


def tiles(subject: Subject) -> list[Tile]:
    """The numbers that say most, the cost in nats first."""
    if subject.evaluation is None:
        return _tiles_of_training(subject.result)
    get = subject.evaluation.headline.get
    in_training = "trained elsewhere" if subject.config.get("stage") == "import" else f"{share(get('dead_fraction'))} dead in training"
    return [
        Tile(
            _number(get("cross_entropy_difference")), "nats more, mean over layers", _baseline(get("cross_entropy_difference_of_baseline"))
        ),
        Tile(_number(get("explained_variance")), "explained variance", _baseline(get("explained_variance_of_baseline"))),
        Tile(_tenths(get("l0")), "L0", f"of {subject.evaluation.metrics['num_features']:,} features"),
        Tile(share(get("dead_eval_fraction")), "silent on the held-out text", in_training),
        Tile(share(get("dense_fraction")), "dense", "fire on over 10 % of positions"),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _tenths(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _baseline(value: float | None) -> str:
    return "" if value is None else f"strongest baseline {value:.4f}"


def _tiles_of_training(result: Json) -> list[Tile]:
    names: Sequence[tuple[str, str]] = (("explained_variance", "explained variance"), ("l0", "L0"), ("dead_fraction", "dead"))
    return [Tile(figure(result[name]), label, "in training") for name, label in names if isinstance(result.get(name), int | float)]
