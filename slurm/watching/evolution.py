"""What `crosscoder evolution` says: how features changed from one snapshot of a training run to the next.

A window is the training steps between two snapshots. A feature is *silent* in a window in which it doesn't fire; it *died* in the first
silent window after one in which it fired, and *revived* in the first after that in which it fires again. Rises and falls are of features
that fire in both windows (activations) or of all (norms). Shapes: F features, L layers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slurm.record.text_table import Column, figure, lay_out
from slurm.watching.feature_history import Snapshot

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOVED = 0.1
"""A value rose or fell if it changed by more than this share of what it was: less is within the noise of a window."""

Row = dict[str, Any]


def course(snapshots: Sequence[Snapshot]) -> list[Row]:
    """A row a snapshot: counts of features, medians over features, shrinkage by layer. What compares is None in the first."""
    import numpy as np

    rows, before, has_fired_F = [], None, np.zeros(len(snapshots[0].firings_F), dtype=bool)
    for now in snapshots:
        fires_F = now.firings_F > 0
        activation_F, norm_F = mean_activation(now), now.decoder_norms_FL.sum(1)
        row: Row = {"step": now.step, "tokens": now.tokens, "window_tokens": now.window_tokens, "features": len(fires_F)}
        row |= {"silent": int((~fires_F).sum()), "dead": int((now.tokens_since_fired_F >= now.facts["dead_window_tokens"]).sum())}
        row |= {"mean_activation_median": float(np.median(activation_F[fires_F])) if fires_F.any() else None}
        row |= {"decoder_norm_median": float(np.median(norm_F))}
        compared: Row = dict.fromkeys(("died", "revived", "firing_in_both", *(f"{name}_{way}" for name in _MOVING for way in _WAYS)))
        if before is not None:
            fired_F = before.firings_F > 0
            both_F = fired_F & fires_F
            compared = {"died": int((fired_F & ~fires_F).sum()), "revived": int((fires_F & ~fired_F & has_fired_F).sum())}
            compared |= {"firing_in_both": int(both_F.sum())}
            compared |= _moves("activation", mean_activation(before)[both_F], activation_F[both_F])
            compared |= _moves("norm", before.decoder_norms_FL.sum(1), norm_F)
        shrinkage = {name: now.facts[name] for name in ("norm_ratio_by_layer", "best_scalar_by_layer", "explained_variance_by_layer")}
        rows.append(row | compared | {"layers": now.facts["layers"], "measured_on": now.facts["measured_on"]} | shrinkage)
        before, has_fired_F = now, has_fired_F | fires_F
    return rows


_MOVING = ("activation", "norm")
_WAYS = ("rose", "fell", "ratio_median")


def _moves(name: str, before_F: "NDArray[Any]", now_F: "NDArray[Any]") -> Row:
    """How many rose and fell by more than `MOVED`, and the median of their ratios (None where there is none)."""
    import numpy as np

    known_F = before_F > 0
    ratios = now_F[known_F] / before_F[known_F]
    values = (int((ratios > 1 + MOVED).sum()), int((ratios < 1 - MOVED).sum()), float(np.median(ratios)) if ratios.size else None)
    return dict(zip((f"{name}_{way}" for way in _WAYS), values, strict=True))


def mean_activation(snapshot: Snapshot) -> "NDArray[Any]":
    """[F]: mean of each feature's activation over its firings in the window, normalized units; 0 where there are none."""
    activations_F: NDArray[Any] = snapshot.activation_sum_F / snapshot.firings_F.clip(min=1)
    return activations_F


def feature_course(snapshots: Sequence[Snapshot], feature: int) -> list[Row]:
    """A row a snapshot of one feature."""
    return [
        {
            "feature": feature,
            "step": now.step,
            "tokens": now.tokens,
            "window_tokens": now.window_tokens,
            "firings": int(now.firings_F[feature]),
            "density": int(now.firings_F[feature]) / max(now.window_tokens, 1),
            "mean_activation": float(mean_activation(now)[feature]),
            "decoder_norms": now.decoder_norms_FL[feature].tolist(),
        }
        for now in snapshots
    ]


# -- on the terminal ------------------------------------------------------------------------------------------------------------


def table(named: str, rows: Sequence[Row], width: int | None) -> list[str]:
    """The lines for all features: what died and came back, what rose and fell, how much the reconstruction shrinks."""
    columns = [Column(name, is_right=True, dropped=dropped) for name, dropped in _COLUMNS.items()]
    cells = [[*_cells(row), _shares(row["norm_ratio_by_layer"])] for row in rows]
    lines = lay_out([*columns, Column("|x_hat|/|x|")], cells, width).lines
    last = rows[-1]
    return [
        f"{named}: {len(rows)} snapshots of {last['features']:,} features; dead at the last one: {last['dead']:,}", "",
        *lines, "",
        "window: training tokens since the snapshot before. silent: no firing in it; died: silent, but fired in the window before;",
        f"revived: fires again. act, norm: mean activation over firings, and decoder norm, up or down by over {100 * MOVED:.0f} %",
        "of what it was, and the median ratio to it. |x_hat|/|x|: the reconstruction's norm over the input's, by layer, on",
        f"{last['measured_on']}; layers: {', '.join(last['layers'])}",
    ]  # fmt: skip


_COLUMNS = {"step": 4, "tokens": 0, "window": 5, "silent": 0, "died": 0, "revived": 0}
_COLUMNS |= {"act up": 0, "act down": 0, "act ratio": 3, "norm up": 0, "norm down": 0, "norm ratio": 3}
"""By heading, which goes first where the terminal is narrow; 0 never."""


def _cells(row: Row) -> list[str]:
    features, both = row["features"], row["firing_in_both"]
    shares = [_percent(row[name], features) for name in ("silent", "died", "revived")]
    activation = [*(_percent(row[f"activation_{way}"], both) for way in ("rose", "fell")), _number(row["activation_ratio_median"])]
    norm = [*(_percent(row[f"norm_{way}"], features) for way in ("rose", "fell")), _number(row["norm_ratio_median"])]
    return [f"{row['step']:,}", f"{row['tokens']:,}", f"{row['window_tokens']:,}", *shares, *activation, *norm]


def feature_table(rows: Sequence[Row], layers: Sequence[str], width: int | None) -> list[str]:
    """The lines for one feature."""
    columns = [Column(name, is_right=True) for name in ("step", "tokens", "fires on", "mean activation")]
    cells = [
        [
            f"{row['step']:,}",
            f"{row['tokens']:,}",
            f"{100 * row['density']:.3g} %",
            figure(row["mean_activation"]) if row["firings"] else "",
            _shares(row["decoder_norms"]),
        ]
        for row in rows
    ]
    lines = lay_out([*columns, Column("decoder norm")], cells, width).lines
    return [f"feature {rows[0]['feature']}; layers: {', '.join(layers)}", *lines]


def _percent(count: int | None, total: int | None) -> str:
    return "" if count is None or not total else f"{100 * count / total:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _shares(values: Sequence[float | None]) -> str:
    return "/".join("none" if value is None else f"{value:.2f}" for value in values)
