"""The verdict in words: at each layer, the strongest baseline, and what the crosscoder beats."""

from collections.abc import Callable
from typing import NamedTuple

from pipeline.evaluation.measurements import Measurements
from pipeline.evaluation.predictions import Stand
from pipeline.evaluation.threshold_sweep import crossing

ORDER = ["crosscoder", "dense_path", "compared", "affine_all", "affine", "other_layer_matched", "other_layer"]
ORDER += ["pca", "pca_joint", "random_dictionary", "strongest_baseline", "mean", "zero"]
"""In which kinds of stand-ins are named."""


class LayerVerdict(NamedTuple):
    """How the crosscoder compares at one layer, by nats or by explained variance."""

    own: float
    best: tuple[str, float] | None
    """The strongest baseline by name, and its figure; None where there is none."""
    beaten: list[str]
    not_beaten: list[str]
    others: list[tuple[str, float]]
    """Every baseline by name, and its figure."""

    @property
    def is_better(self) -> bool:
        return not self.not_beaten

    @property
    def outcome(self) -> str:
        """In a word, beside the strongest baseline."""
        return "BETTER" if self.is_better else "WORSE"


def verdict(found: Measurements, *, ranks: dict[str, int], ranks_needed: list[int | None]) -> list[str]:
    """Sentences for every layer measured, the costs in nats first.

    ranks : of the principal components among the baselines, by their name.
    ranks_needed : by layer, how many of them explain as much as the crosscoder.
    """
    sentences = []
    for layer, needed in zip(found.layers, ranks_needed, strict=True):
        by_nats, by_variance = compare(found, layer, ranks)
        sentences += [_cost(layer, by_nats), _variance(by_variance)]
        if needed is not None:
            sentences.append(f"  A PCA explains as much from rank {needed:,} on.")
        if by_variance.best is not None and not by_variance.is_better:
            sentences += _at_other_l0(found, layer, by_variance.best)
    return sentences


def compare(found: Measurements, layer: str, ranks: dict[str, int]) -> tuple[LayerVerdict, LayerVerdict]:
    """By what the replacement costs in nats, and by explained variance."""
    losses = {stand: loss for stand, loss in found.losses.items() if stand.layer == layer}

    def phrase(stand: Stand) -> str:
        return name(stand, ranks) if stand.by != "compared" else compared_run(found, str(stand.source))

    nats = _compare({stand: loss.difference for stand, loss in losses.items()}, layer, phrase, lambda own, other: own < other)
    explained = {stand: row.explained_variance for stand, row in found.reconstruction.items() if stand.layer == layer}
    known = {stand: value for stand, value in explained.items() if value is not None}
    return nats, _compare(known, layer, phrase, lambda own, other: own > other)


def _compare(
    figures: dict[Stand, float], layer: str, phrase: Callable[[Stand], str], beats: Callable[[float, float], bool]
) -> LayerVerdict:
    own = figures.get(Stand(layer, "crosscoder"), 0.0)
    others = [(stand, value) for stand, value in figures.items() if stand.by not in ("crosscoder", "dense_path")]
    others.sort(key=lambda item: ORDER.index(item[0].by))
    best: tuple[str, float] | None = None
    for stand, value in others:
        if best is None or beats(value, best[1]):
            best = (phrase(stand), value)
    beaten = [phrase(stand) for stand, value in others if beats(own, value)]
    not_beaten = [phrase(stand) for stand, value in others if not beats(own, value)]
    return LayerVerdict(own, best, beaten, not_beaten, [(phrase(stand), value) for stand, value in others])


def _cost(layer: str, found: LayerVerdict) -> str:
    assert found.best is not None  # mean and zero are always there
    start = f"{layer}: {found.outcome} than the strongest baseline by nats: the crosscoder costs {number(found.own)}, "
    return f"{start}{found.best[0]} {number(found.best[1])}. {_list(found)}"


def _variance(found: LayerVerdict) -> str:
    if found.best is None:
        return "  No explained variance: the activations never vary here."
    start = f"  {found.outcome} by explained variance: the crosscoder's is {number(found.own)}, that of "
    return f"{start}{found.best[0]} {number(found.best[1])}. {_list(found)}"


def _at_other_l0(found: Measurements, layer: str, best: tuple[str, float]) -> list[str]:
    """At what L0 the crosscoder would explain more than the strongest baseline, by the sweep over its thresholds."""
    met, (phrase, share) = crossing(found.sweep, layer, best[1]), best
    if met is None:
        return []
    if len(found.sweep) == 1:
        return [f"  It has no thresholds to lower, so it explains more than {phrase} at no L0 up to its own, {met.highest_l0:.1f}."]
    if met.l0 is None:
        most = f"it explains most, {number(met.best)}, at L0 {met.best_l0:.1f}"
        return [
            f"  With its thresholds lowered it explains more than {phrase} ({number(share)}) at no L0 up to {met.highest_l0:.1f}: {most}."
        ]
    return [f"  With its thresholds moved it would explain more than {phrase} ({number(share)}) at L0 {met.l0:.1f}."]


def _list(found: LayerVerdict) -> str:
    if not found.beaten:
        return "It beats none."
    if found.is_better:
        return "It beats all: " + _and(found.beaten) + "."
    return f"It beats {_and(found.beaten)}; not {_and(found.not_beaten)}."


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def compared_run(found: Measurements, label: str) -> str:
    """`per-layer (sparse autoencoders a layer, L0 31.40)`."""
    return f"{label} ({found.compared_kinds[label]}, L0 {found.compared_firing[label].l0 or 0:.2f})"


def name(stand: Stand, ranks: dict[str, int]) -> str:
    """A stand-in that is no other run, as a phrase."""
    phrases = {
        "affine": f"an affine map from {stand.source}",
        "affine_all": "an affine map from all other layers",
        "other_layer": f"{stand.source} as it is",
        "other_layer_matched": f"{stand.source} matched in mean and scale",
        "pca": f"PCA of rank {ranks.get('pca', 0):,}",
        "pca_joint": f"PCA of rank {ranks.get('pca_joint', 0):,} over all layers",
        "random_dictionary": "a random dictionary",
        "mean": "the mean",
        "zero": "zeros",
    }
    return phrases[stand.by]


def number(value: float | None) -> str:
    """In at most eight characters where possible; a dash where there is none."""
    if value is None:
        return "-"
    # Adding 0 makes 0 of -0.
    return f"{round(value, 4) + 0.0:.4f}" if abs(value) < 100 else f"{value:.3g}"


def best_of_baselines(found: Measurements) -> tuple[float | None, float | None]:
    """What the strongest baseline of each layer costs in nats, and what it explains; means over layers, None where a layer has none."""
    nats: list[float] = []
    explained: list[float] = []
    for layer in found.layers:
        of_loss = [loss.difference for stand, loss in found.losses.items() if stand.layer == layer and _is_fitted(stand)]
        rows = [row.explained_variance for stand, row in found.reconstruction.items() if stand.layer == layer and _is_fitted(stand)]
        known = [value for value in rows if value is not None]
        if not of_loss or not known:
            return None, None
        nats.append(min(of_loss))
        explained.append(max(known))
    return sum(nats) / len(nats), sum(explained) / len(explained)


def _is_fitted(stand: Stand) -> bool:
    return stand.by not in ("crosscoder", "dense_path", "mean", "zero", "compared")
