"""What `crosscoder features` shows: a table of features, or one feature with its layers, tokens, neighbors and contexts.

A token's spaces are shown as `·`, its line breaks as `⏎`. The token of a firing stands in `«»`; on a terminal each token has a
background, the darker the stronger the feature is there.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from slurm.record.printable import printable_line
from slurm.record.text_table import Column, figure, lay_out
from slurm.watching.feature_store import FeatureStore, Row

if TYPE_CHECKING:
    from rich.text import Text

COLUMNS = (
    "feature", "firings", "density", "mean_activation", "max_activation", "is_dead_eval", "is_dense", "decoder_norms", "relative_norms",
    "layer_cosines", "survives_alone", "top_tokens",
)  # fmt: skip
"""What a table needs of each feature."""

SORTS: dict[str, Callable[[Row], Any]] = {
    "feature": lambda row: row["feature"],
    "density": lambda row: -row["density"],
    "activation": lambda row: -row["max_activation"],
    "norm": lambda row: -sum(row["decoder_norms"]),
    "layer-share": lambda row: -max(row["relative_norms"]),
    "cosine": lambda row: min(row["layer_cosines"], default=0.0),
    "survival": lambda row: -min(row["survives_alone"]),
}
"""What features can be sorted by: the first is the densest; the strongest; of the greatest decoder norm; the one that is most of one
layer; whose decoders differ most between two layers; whose firings any one layer carries best."""


def matching(rows: list[Row], text: str) -> list[Row]:
    """The features that fire most on, or promote in some layer, a token with `text` in it, in any case."""
    wanted = text.casefold()
    return [
        row for row in rows
        if any(wanted in token.casefold() for tokens in (row["top_tokens"], *row["promoted"]) for token in tokens)
    ]  # fmt: skip


def table(store: FeatureStore, rows: Sequence[Row], *, num_all: int, width: int | None) -> list[str]:
    """The lines of a table of `rows`, the first of `num_all`."""
    columns = [Column("feature", is_right=True), Column("density", is_right=True), Column("max", is_right=True)]
    columns += [Column("mean", is_right=True, dropped=4), Column("norm share"), Column("cosine", dropped=3), Column("alone", dropped=2)]
    cells = [
        [str(row["feature"]), f"{100 * row['density']:.3g} %", figure(row["max_activation"]), figure(row["mean_activation"]),
         _shares(row["relative_norms"]), _shares(row["layer_cosines"]), _shares(row["survives_alone"]), _kind(row),
         "  ".join(token_text(token) for token in row["top_tokens"][:8])]
        for row in rows
    ]  # fmt: skip
    lines = lay_out([*columns, Column("", dropped=1), Column("strongest on")], cells, width).lines
    more = f"; the first {len(rows):,} of {num_all:,} are shown, --most changes that" if num_all > len(rows) else ""
    layers = ", ".join(store.layers)
    return [*lines, f"{num_all:,} of {store.num_features:,} features over {store.num_positions:,} positions{more}; layers: {layers}"]


def feature_lines(store: FeatureStore, row: Row, contexts: list[Row], width: int | None) -> "list[str | Text]":
    """One feature: what it is, by layer, its neighbors, its contexts."""
    kind = f" ({_kind(row)})" if _kind(row) else ""
    activation = f"activation {figure(row['mean_activation'])} on average, {figure(row['max_activation'])} at most"
    fires = f"fires on {100 * row['density']:.3g} % of {store.num_positions:,} positions{kind}"
    lines: list[str | Text] = [f"feature {row['feature']}: {fires}; {activation}"]
    columns = [Column("layer"), *(Column(name, is_right=True) for name in ("norm", "share", "alone", "drop")), Column("promotes")]
    promoted = row["promoted"] or [[] for _ in store.layers]
    cells = [
        [layer, *(f"{row[name][number]:.3f}" for name in ("decoder_norms", "relative_norms", "survives_alone", "drop_by_layer")),
         "  ".join(map(token_text, promoted[number]))]
        for number, layer in enumerate(store.layers)
    ]  # fmt: skip
    lines += lay_out(columns, cells, width).lines
    for layer, tokens in zip(store.layers, row["suppressed"] or promoted, strict=True):
        lines += [f"suppresses in {layer}: {'  '.join(map(token_text, tokens))}"] if tokens else []
    if row["layer_cosines"]:
        lines.append(f"cosine between the layers' decoders: {_shares(row['layer_cosines'])}")
    near = zip(row["neighbors"], row["neighbor_cosines"], strict=True)
    lines.append("neighbors (cosine): " + ", ".join(f"{feature} ({cosine:.2f})" for feature, cosine in near))
    quantiles = 1 + max((context["quantile"] for context in contexts if context["quantile"] is not None), default=0)
    heading = None
    for context in contexts:
        quantile = context["quantile"]
        name = "strongest firings" if quantile is None else f"sample, group {quantile + 1} of {quantiles} from the weakest"
        lines += [] if name == heading else ["", name]
        heading = name
        lines.append(_context_line(context, row["max_activation"]))
    return lines


def _context_line(context: Row, greatest: float) -> "Text":
    from rich.text import Text

    line = Text(f"{context['activation']:8.3f}  {context['document']}:{context['position']}".ljust(20) + "  ")
    for number, (token, activation) in enumerate(zip(context["tokens"], context["activations"], strict=True)):
        text = token_text(token)
        share = activation / greatest if greatest > 0 else 0.0
        style = f"black on rgb(255,{245 - round(165 * share)},{225 - round(205 * share)})" if activation > 0 else ""
        line.append(f"«{text}»" if number == context["peak"] else text, style=style)
    return line


def token_text(token: str) -> str:
    """A token on one line, with nothing in it that a terminal would obey."""
    return printable_line(token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥"))


def example(context: Row) -> Row:
    """One kept firing as tools of automatic interpretation take it: the tokens of a window and the feature's activation at each."""
    return {
        "feature": context["feature"], "quantile": context["quantile"], "activation": context["activation"], "peak": context["peak"],
        "document": context["document"], "position": context["position"], "token_ids": context["token_ids"],
        "tokens": context["tokens"], "activations": context["activations"],
    }  # fmt: skip


def _shares(values: Sequence[float]) -> str:
    return "/".join(f"{value:.2f}" for value in values)


def _kind(row: Row) -> str:
    return "dead" if row["is_dead_eval"] else "dense" if row["is_dense"] else ""
