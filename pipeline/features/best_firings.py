"""For every feature the few firings with the greatest keys, each with the feature's activation over a window around it.

A key is one int64 that no other firing of the feature has, so that what is kept depends neither on the order in which firings come
nor on how they are divided. Its lower half is the place (numbered over all positions read) counted from the end, so that of equals
the earlier one wins; its upper half is what is wanted:

    strongest_keys    the bits of the activation: a float32 of 0 or more sorts as the integer that it is written as
    sample_keys       a keyed hash of place and feature: the greatest of them are a random sample without replacement

Shapes: F features, K kept of each, W tokens of a window, C candidates, R rows (positions that follow one another in a context).
"""

import torch
from torch import Tensor

from pipeline.permutation import keyed_hash

NONE = -1
"""The key where a feature has fired less than K times."""
NUM_PLACES = 1 << 32
_LOW_HALF = NUM_PLACES - 1


def strongest_keys(activations_C: Tensor, places_C: Tensor) -> Tensor:
    """[C] int64; activations are float32 and over 0."""
    return (activations_C.view(torch.int32).long() << 32) | (_LOW_HALF - places_C)


def sample_keys(features_C: Tensor, places_C: Tensor, *, num_features: int, seed: int) -> Tensor:
    """[C] int64."""
    key = int(keyed_hash(torch.tensor(seed), 1))
    return ((keyed_hash(places_C * num_features + features_C, key) >> 32) << 32) | (_LOW_HALF - places_C)


def places_of(keys: Tensor) -> Tensor:
    """The places that keys stand for; without meaning where a key is `NONE`."""
    return _LOW_HALF - (keys & _LOW_HALF)


class BestFirings:
    """Arrays of one size from the start, F times K times (8 + 4 W) bytes, whatever is added."""

    def __init__(self, num_features: int, num_kept: int, *, window_tokens: int, window_after: int, device: torch.device) -> None:
        self.num_kept = num_kept
        self.offsets_W = torch.arange(window_tokens, device=device) - (window_tokens - 1 - window_after)
        """Of a window's tokens from the firing."""
        self.keys_FK = torch.full((num_features, num_kept), NONE, dtype=torch.int64, device=device)
        """In falling order."""
        self.windows_FKW = torch.zeros(num_features, num_kept, window_tokens, device=device)
        """Float32; 0 outside the context."""

    def add(self, features_C: Tensor, keys_C: Tensor, rows_C: Tensor, features_RF: Tensor) -> None:
        """Adds candidates; `rows_C` says where in `features_RF`, which reaches as far as windows do, each one fires."""
        best = self._contenders(features_C, keys_C)
        if not len(best):
            return
        features_C, keys_C, rows_C = features_C[best], keys_C[best], rows_C[best]
        rows_CW = rows_C[:, None] + self.offsets_W
        inside_CW = (rows_CW >= 0) & (rows_CW < len(features_RF))
        windows_CW = features_RF[rows_CW.clamp(0, len(features_RF) - 1), features_C[:, None]]
        self._insert(features_C, keys_C, torch.where(inside_CW, windows_CW, 0.0))

    def merge(self, keys_FK: Tensor, windows_FKW: Tensor) -> None:
        """Adds what another one kept of other positions."""
        features_C, kept_C = (keys_FK != NONE).nonzero(as_tuple=True)
        keys_C = keys_FK[features_C, kept_C]
        best = self._contenders(features_C, keys_C)
        if len(best):
            self._insert(features_C[best], keys_C[best], windows_FKW[features_C[best], kept_C[best]])

    def _contenders(self, features_C: Tensor, keys_C: Tensor) -> Tensor:
        """The candidates that beat what their feature has, at most K a feature."""
        better = (keys_C > self.keys_FK[features_C, -1]).nonzero()[:, 0]
        order, rank = _ranked(features_C[better], keys_C[better])
        return better[order[rank < self.num_kept]]

    def _insert(self, features_C: Tensor, keys_C: Tensor, windows_CW: Tensor) -> None:
        touched_U = torch.unique(features_C)
        known = len(touched_U) * self.num_kept
        features = torch.cat([touched_U.repeat_interleave(self.num_kept), features_C])
        keys = torch.cat([self.keys_FK[touched_U].flatten(), keys_C])
        windows = torch.cat([self.windows_FKW[touched_U].view(known, -1), windows_CW])
        order, rank = _ranked(features, keys)
        kept_UK = order[rank < self.num_kept].view(len(touched_U), self.num_kept)
        self.keys_FK[touched_U] = keys[kept_UK]
        self.windows_FKW[touched_U] = windows[kept_UK]


def _ranked(features_C: Tensor, keys_C: Tensor) -> tuple[Tensor, Tensor]:
    """An order by feature, within one by falling key; and the rank within the feature of each entry of it."""
    by_key = keys_C.argsort(descending=True, stable=True)
    order = by_key[features_C[by_key].argsort(stable=True)]
    sorted_C = features_C[order]
    return order, torch.arange(len(order), device=order.device) - torch.searchsorted(sorted_C, sorted_C)
