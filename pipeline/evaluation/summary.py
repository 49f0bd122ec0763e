"""What a person reads of an evaluation: five numbers and the verdict first, in `tables.txt` all the rest."""

from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.crosscoder.metrics import DENSE_FRACTION
from pipeline.evaluation import tables, verdict
from pipeline.evaluation.fitting import FEW_POSITIONS_A_DIMENSION
from pipeline.evaluation.measurements import Measurements
from pipeline.evaluation.model_diffing import ModelDifference
from pipeline.evaluation.outliers import FEW, MUCH
from pipeline.evaluation.report import Evaluation, headline, sparsity, verdict_lines, wrapped


def first_lines(evaluation: Evaluation) -> list[str]:
    """Five numbers, the verdict, and what to beware of; lines of at most 100 columns."""
    warned = warnings(evaluation)
    return [*_five_numbers(evaluation), "", *verdict_lines(evaluation), *([""] if warned else []), *warned]


def all_lines(evaluation: Evaluation) -> list[str]:
    """What `tables.txt` holds: all numbers in words, then the tables."""
    wide = tables.tables(evaluation.found, evaluation.trained.layers).splitlines()
    return [*_in_words(evaluation), *warnings(evaluation), "", *wide]


def _five_numbers(evaluation: Evaluation) -> list[str]:
    trained, found, numbers, show = evaluation.trained, evaluation.found, headline(evaluation), verdict.number
    size = _size(trained)
    own = "the model's own" if len(found.clean_by_model) == 1 else "the models' own (mean of each)"
    cost = f"{show(numbers['cross_entropy_difference'])} nats more than {own} {show(found.clean_cross_entropy)}"
    share = show(numbers["explained_variance"])
    rows = {
        "cost": cost + _beside(numbers["cross_entropy_difference_of_baseline"]),
        "explained variance": share + _beside(numbers["explained_variance_of_baseline"]),
        "L0": f"{numbers['l0']:.2f} of {trained.num_features:,} features fire at a position",
    }
    if trained.tokens_trained:
        rows["dead"] = f"{100 * numbers['dead_fraction']:.1f} % of the features, in the last {trained.dead_window_tokens:,} training tokens"
    else:
        rows["dead"] = f"{100 * numbers['dead_eval_fraction']:.1f} % of the features, on this text"
    if numbers["functional_coherence"] is None:
        rows["dense"] = (
            f"{100 * numbers['dense_fraction']:.1f} % of the features fire on over {100 * DENSE_FRACTION:.0f} % of the positions"
        )
    else:
        rows["sharing"] = f"{numbers['layers_driving']:.2f} of {len(trained.layers)} layers drive a feature (mean)"
    rows |= {pair.name: _shared(pair) for pair in found.model_differences}
    width = max(map(len, rows))
    heading = [f"crosscoder {trained.identity[:12]}: {size}", f"on held-out text, {found.num_positions:,} positions:"]
    return [*heading, *(line for name, row in rows.items() for line in wrapped(f"  {name:{width}}  {row}"))]


def _shared(pair: ModelDifference) -> str:
    """What two models share, and what each has alone, of the features that fire here."""
    classes = {row.name: row for row in pair.classes()}
    alone = [
        f"{row.features:,} in {model} alone" + (f" ({row.absent:,} absent from {other})" if row.absent is not None else "")
        for model, other in ((pair.one, pair.other), (pair.other, pair.one))
        for row in [classes[f"only_{model}"]]
    ]
    return (
        f"{100 * classes['shared'].fraction:.1f} % of {int(pair.fires_F.sum()):,} features write in both models alike, {', '.join(alone)}"
    )


def _size(trained: TrainedCrosscoder) -> str:
    """An imported crosscoder counts as trained on no tokens: nothing is known of its training."""
    trained_on = f"{trained.tokens_trained:,} training tokens" if trained.tokens_trained else "trained elsewhere"
    return f"{len(trained.layers)} layers, {trained.num_features:,} features, {trained_on}"


def _beside(value: float | None) -> str:
    return "" if value is None else f"; strongest baseline {verdict.number(value)}"


def _in_words(evaluation: Evaluation) -> list[str]:
    trained, found, held_out = evaluation.trained, evaluation.found, evaluation.parts.measured
    numbers, firing = headline(evaluation), sparsity(evaluation)
    show = verdict.number
    as_trained = "" if found.l0_as_trained is None else f" with the inference threshold, {found.l0_as_trained:.2f} as trained"
    dead, dead_eval, dense = (_share(firing[key], trained.num_features) for key in ("dead", "dead_eval", "dense"))
    size = _size(trained)
    measured = f"{len(held_out.indices):,} contexts, {found.num_positions:,} positions, {found.num_predictions:,} predictions"
    explained, with_outliers = (show(numbers[key]) for key in ("explained_variance", "explained_variance_with_outliers"))
    clean, more = show(found.clean_cross_entropy), show(numbers["cross_entropy_difference"])
    in_training = f"{dead} in the last {trained.dead_window_tokens:,} training tokens, " if trained.tokens_trained else ""
    lines = [
        f"crosscoder {trained.identity[:12]}: {size}",
        f"held-out: {measured}, {_outliers(found)}",
        f"explained variance {explained}, with outliers {with_outliers}",
        f"cross-entropy {clean} nats clean, {more} more with a layer replaced (mean over layers, each alone)",
        f"L0 {firing['l0']:.2f}{as_trained}",
        f"dead: {in_training}{dead_eval} on the held-out text",
        f"dense: {dense} fire on over {100 * DENSE_FRACTION:.0f} % of the positions",
    ]
    if numbers["functional_coherence"] is not None:
        lines.append(f"a feature is driven by {numbers['layers_driving']:.2f} of {len(trained.layers)} layers (mean over those that fire)")
    if found.compared_firing:
        lines.append(f"compared with {', '.join(verdict.compared_run(found, label) for label in found.compared_firing)}")
    return [part for line in lines for part in wrapped(line)]


def _outliers(found: Measurements) -> str:
    excluded = f", {found.num_excluded:,} of excluded tokens" if found.num_excluded else ""
    return f"{found.num_outliers:,} {'outlier' if found.num_outliers == 1 else 'outliers'}{excluded} left out"


def warnings(evaluation: Evaluation) -> list[str]:
    """A sentence for each thing that makes a figure less than it seems."""
    sentences = []
    for row in evaluation.found.outliers:
        if row.share_of_few > MUCH:
            sentences.append(
                f"{row.layer}: beware, {100 * FEW:g} % of the positions hold {100 * row.share_of_few:.0f} % of the variance, outliers left "
                "out: a few positions decide its explained variance; see its legacy ratios and median error, or lower outlier_norm_ratio"
            )
    fit = evaluation.fit.covariances
    if fit.num_positions < FEW_POSITIONS_A_DIMENSION * fit.d_model:
        sentences.append(
            f"beware, the baselines were fitted on {fit.num_positions:,} positions, little for a width of {fit.d_model:,}: they are "
            "weaker than they could be; allow more fit_tokens, or name training_tokens"
        )
    if not evaluation.exact_head:
        sentences.append(
            "beware, what this language model does between its head and its logits is not known: cross-entropy and KL come from "
            "logits in its own precision"
        )
    return [line for sentence in sentences for line in wrapped(sentence)]


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.1f} %)"
