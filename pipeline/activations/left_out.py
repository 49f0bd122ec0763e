"""Which positions are left out of a harvest for what stands there: chosen tokens, and outliers.

A position is left out at all layers at once. The order of positions (see `order`) counts them: their places are empty, so the order
and the place in it that a resumed run goes on from stay arithmetic on the lengths of contexts.

Shapes: B positions, E positions left out, L layers read, D model width.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.activations.outliers import OutlierLimits
from pipeline.activations.source import ActivationBatch, LayerStatistics
from pipeline.config.activation_source import Harvest

Places = npt.NDArray[np.int64]
NO_PLACES: Places = np.empty(0, np.int64)


class Reason(IntEnum):
    """Why a position has no row."""

    NONE = 0
    """It has one."""
    TOKEN = 1
    """Its token is one of `exclude_token_ids`, whatever its norm."""
    NORM = 2
    """Its norm is over the limit in some layer."""


class Exclusion:
    """What is left out, with its tensors on one device."""

    def __init__(self, token_ids: list[int], outlier_norms: list[float] | None, device: torch.device) -> None:
        """outlier_norms : a layer each; None leaves no position out for its norm."""
        self.token_ids = torch.tensor(sorted(token_ids), dtype=torch.int64, device=device)
        norms_L = None if outlier_norms is None else torch.tensor(outlier_norms, dtype=torch.float64, device=device)
        self.limits = OutlierLimits(norms_L, "off" if outlier_norms is None else "leading_contexts")

    @property
    def is_off(self) -> bool:
        """Whether nothing can be left out."""
        return not len(self.token_ids) and self.limits.norms_L is None

    def sentences(self, settings: Harvest) -> list[str]:
        """For the log: what is left out."""
        lines = []
        if self.limits.norms_L is not None:
            limits = ", ".join(f"{norm:,.4g} at {site}" for site, norm in zip(settings.layers, self.limits.norms_L.tolist(), strict=True))
            ratio = f" ({settings.outlier_norm_ratio:g} times the median)" if settings.outlier_norm_ratio is not None else ""
            lines.append(f"positions whose norm is over {limits}{ratio} are left out")
        if len(self.token_ids):
            lines.append(
                f"positions of {len(self.token_ids):,} token ids are left out: {', '.join(map(str, self.token_ids.tolist()[:10]))}"
                + (", ..." if len(self.token_ids) > 10 else "")
            )
        return lines

    def reasons(self, rows: ActivationBatch) -> Tensor:
        """[B] uint8, the `Reason` of each position. Does not wait for the device."""
        if self.is_off:
            return torch.zeros(len(rows.tokens_B), dtype=torch.uint8, device=rows.tokens_B.device)
        reasons_B = (self.limits.are_outliers(rows.acts_BLD) * int(Reason.NORM)).to(torch.uint8)
        return reasons_B.masked_fill_(torch.isin(rows.tokens_B, self.token_ids), int(Reason.TOKEN))


class LeftOut(NamedTuple):
    """The positions without a row among those of a generation."""

    places: Places
    """Their places in the generation, ascending."""
    num_by_token: int
    num_by_norm: int
    sum_squared_norm_L: list[float]
    """Sum of |x|^2 over those left out for their norm, a layer each."""

    @classmethod
    def none(cls, num_layers: int) -> "LeftOut":
        return cls(NO_PLACES, 0, 0, [0.0] * num_layers)

    @classmethod
    def of(cls, reasons_B: Tensor, acts_BLD: Tensor, rows_B: Tensor) -> "LeftOut":
        """reasons_B, in the order of a generation, of the rows `rows_B` of `acts_BLD`. Waits for the device."""
        outliers_ELD = acts_BLD[rows_B[reasons_B == int(Reason.NORM)]].double()
        reasons = reasons_B.cpu().numpy()
        counts = np.bincount(reasons, minlength=len(Reason))
        places = np.flatnonzero(reasons).astype(np.int64)
        return cls(places, int(counts[Reason.TOKEN]), int(counts[Reason.NORM]), outliers_ELD.square().sum((0, 2)).tolist())

    def kept_between(self, start: int, stop: int) -> Places:
        """Of the places `start` to `stop`, those with a row, counted from `start`."""
        return kept_between(self.places, start, stop)

    def facts(self) -> dict[str, Any]:
        """As an entry of a record."""
        return {"by_token": self.num_by_token, "by_norm": self.num_by_norm, "sum_squared_norm": self.sum_squared_norm_L}


def kept_between(places: Places, start: int, stop: int) -> Places:
    """Of the places `start` to `stop`, those with a row where `places` have none; counted from `start`."""
    first, last = np.searchsorted(places, [start, stop])
    return np.delete(np.arange(stop - start), places[first:last] - start)


def rows_between(places: Places, start: int, stop: int) -> tuple[int, int]:
    """Which rows stand in the places `start` to `stop` where `places` have none: the first, and one past the last."""
    before_start, before_stop = np.searchsorted(places, [start, stop]).tolist()
    return start - before_start, stop - before_stop


def num_left_out(facts: dict[str, Any]) -> int:
    """Positions that a shard's record, or a set's manifest, counts as left out."""
    left_out = facts.get("left_out")
    return 0 if left_out is None else int(left_out["by_token"]) + int(left_out["by_norm"])


def added(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """What `LeftOut.facts` say of several parts together."""
    total: dict[str, Any] = {key: sum(part[key] for part in facts) for key in ("by_token", "by_norm")}
    return total | {"sum_squared_norm": [sum(column) for column in zip(*(part["sum_squared_norm"] for part in facts), strict=True)]}


def left_out_sentences(facts: dict[str, Any] | None, statistics: LayerStatistics, layers: list[str]) -> list[str]:
    """For the log: how many positions were left out, and what those over the norms hold of |x|^2; none where nothing could be."""
    if facts is None:
        return []
    by_norm, by_token = facts["by_norm"], facts["by_token"]
    total = by_norm + by_token + statistics.num_positions
    kept_L = (statistics.mean_squared_norm_L * statistics.num_positions).tolist()
    shares_L = [left / (left + kept) if left else 0.0 for left, kept in zip(facts["sum_squared_norm"], kept_L, strict=True)]
    lines = [left_out_for_norm(by_norm, total, shares_L, layers)]
    return lines + ([f"{by_token:,} of {total:,} positions left out for their token"] if by_token else [])


def left_out_for_norm(count: int, total: int, shares_L: list[float], layers: list[str]) -> str:
    """In words: how many of `total` positions, and which share they hold of the sum of |x|^2 at each layer."""
    held = ", ".join(f"{100 * share:.3g} % at {layer}" for share, layer in zip(shares_L, layers, strict=True))
    return f"{count:,} of {total:,} positions left out for their norm" + (f"; of |x|^2 they hold {held}" if count else "")
