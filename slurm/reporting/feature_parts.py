"""The features of a store as a page reads them: an index of all, and parts with all that is known of some.

Index, columns over features: {"features": 3, "layers": ["h.0", "h.1"], "positions": 29835, "density": [...], "max": [...], "mean": [...],
"norms": [[...] per layer], "alone": [[...] per layer], "cosine": [...] or null with one layer, "dead": [...], "dense": [...],
"top": [[token, ...], ...], "promoted": [[token, ...], ...]}. A part: {"tokens": [token, ...], "features": {"7": {"promoted": ...,
"contexts": [[quantile, document, position, peak, activation, [token's place in "tokens", ...], [level, ...]], ...]}}}, where a level is
the activation at that token in thousandths of the feature's greatest.

A part beside the page is a file of JavaScript, `crosscoderPart("a1b2c3", 3, {...})`: a page opened from disk may run such a file, but not
read one of JSON. Of more than `FEATURES_AN_INDEX` features the index goes on in such files, `crosscoderIndex("a1b2c3", 1, {...})`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from slurm.record.printable import printable_line
from slurm.watching.feature_store import FeatureStore, Row

FEATURES_A_PART, FEATURES_AN_INDEX = 64, 16_384
MOST_STRONGEST, MOST_OF_A_GROUP = 10, 2
"""Contexts that a page shows: of the strongest firings, and of each group of the sample."""
TOP_TOKENS, PROMOTED_TOKENS = 5, 3
"""Tokens of a feature, and of each of its layers, by which the index can be searched."""
LEVELS = 1000

INDEX_COLUMNS = (
    "density", "max_activation", "mean_activation", "relative_norms", "survives_alone", "layer_cosines", "is_dead_eval", "is_dense",
    "top_tokens", "promoted",
)  # fmt: skip
DETAIL_COLUMNS = ("neighbors", "neighbor_cosines", "decoder_norms", "drop_by_layer", "layer_cosines")


def indices(store: FeatureStore) -> Iterator[dict[str, Any]]:
    """A few numbers and tokens of every feature, by column, `FEATURES_AN_INDEX` at a time."""
    table = store.columns(INDEX_COLUMNS)
    for first in range(0, store.num_features, FEATURES_AN_INDEX):
        yield _index(store, {name: column[first : first + FEATURES_AN_INDEX] for name, column in table.items()}, first)


def _index(store: FeatureStore, table: dict[str, list[Any]], first: int) -> dict[str, Any]:
    has_pairs = len(store.layers) > 1
    promoted = [
        list(dict.fromkeys(shown(token) for tokens in row for token in tokens[:PROMOTED_TOKENS])) for row in table["promoted"]
    ]  # fmt: skip
    return {
        "features": store.num_features,
        "layers": store.layers,
        "positions": store.num_positions,
        "density": rounded(table["density"]),
        "max": rounded(table["max_activation"]),
        "mean": rounded(table["mean_activation"]),
        "norms": [rounded(column) for column in zip(*table["relative_norms"], strict=True)],
        "alone": [rounded(column) for column in zip(*table["survives_alone"], strict=True)],
        "cosine": rounded([min(row) for row in table["layer_cosines"]]) if has_pairs else None,
        "dead": [first + place for place, is_dead in enumerate(table["is_dead_eval"]) if is_dead],
        "dense": [first + place for place, is_dense in enumerate(table["is_dense"]) if is_dense],
        "top": [[shown(token) for token in tokens[:TOP_TOKENS]] for tokens in table["top_tokens"]],
        "promoted": promoted,
    }


def parts(store: FeatureStore) -> Iterator[dict[str, Any]]:
    """Every part, in the order of its features."""
    for first in range(0, store.num_features, FEATURES_A_PART):
        contents = Contents()
        for feature in range(first, min(first + FEATURES_A_PART, store.num_features)):
            contents.add(store, feature)
        yield contents.part()


class Contents:
    """A part to which features are added; its tokens are listed once."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._features: dict[str, dict[str, Any]] = {}

    def add(self, store: FeatureStore, feature: int) -> dict[str, Any]:
        """All that a page shows of this feature, which it gives too."""
        (row,) = store.features([feature])
        detail: dict[str, Any] = {name: row[name] if name == "neighbors" else rounded(row[name]) for name in DETAIL_COLUMNS}
        for name in ("promoted", "suppressed"):
            tokens, logits = row[name] or [], row[f"{name}_logits"] or []
            detail[name] = [_lens(*of_layer) for of_layer in zip(tokens, logits, strict=True)]
        detail["contexts"] = [_context(context, row["max_activation"], self._places) for context in _chosen(store.contexts(feature))]
        self._features[str(feature)] = detail
        return detail

    def part(self) -> dict[str, Any]:
        """What was added."""
        return {"tokens": list(self._places), "features": self._features}


def _lens(tokens: Sequence[str], logits: Sequence[float]) -> list[tuple[str, float]]:
    return [(shown(token), logit) for token, logit in zip(tokens, rounded(logits), strict=True)]


def _chosen(contexts: Sequence[Row]) -> list[Row]:
    """The first of the strongest, and the first of each group of the sample."""
    counts: dict[int | None, int] = {}
    chosen = []
    for context in contexts:
        quantile = context["quantile"]
        counts[quantile] = counts.get(quantile, 0) + 1
        if counts[quantile] <= (MOST_STRONGEST if quantile is None else MOST_OF_A_GROUP):
            chosen.append(context)
    return chosen


def _context(row: Row, greatest: float, places: dict[str, int]) -> list[Any]:
    tokens = [places.setdefault(shown(token), len(places)) for token in row["tokens"]]
    levels = [round(LEVELS * value / greatest) if value > 0 and greatest > 0 else 0 for value in row["activations"]]
    return [row["quantile"], row["document"], row["position"], row["peak"], *rounded([row["activation"]]), tokens, levels]


def shown(token: str) -> str:
    """A token as the page shows it: line breaks and tabs as signs, control characters escaped."""
    return printable_line(token.replace("\n", "⏎").replace("\t", "⇥"))


def rounded(values: Sequence[float]) -> list[float]:
    """To three significant digits: who needs more reads the store."""
    return [0 if value == 0 else float(f"{value:.3g}") for value in values]


def script_json(value: Any) -> str:
    """JSON that can stand in a script of a page: no text in it ends the script or opens a comment."""
    text = msgspec.json.encode(value).decode()
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text
