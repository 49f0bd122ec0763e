"""What may stand in for the activations of some layers: this crosscoder, others, a layer's mean, zeros.

Shapes: N positions, X layers read, K layers covered, D model width, F features.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.crosscoder.checkpoint import TrainedCrosscoder

FEATURES_AT_A_TIME = 1 << 26
"""At most so many numbers of features_NF exist at once: 256 MiB."""

Give = Callable[[Tensor], Tensor]
"""acts_NXD, float32, to what stands in for the layers covered, [N, K, D]."""


class Approximation(NamedTuple):
    """A way to give activations of some layers."""

    by: str
    sources: list[str | None]
    """By layer covered: the other layer or run that it is taken from, where there is one."""
    covered: list[int]
    """Which of the crosscoder's layers it gives."""
    give: Give
    fitted: list[float] = []
    """Explained variance on the rows that it was fitted on, by layer covered; empty where nothing was fitted."""
    give_and_count: Give | None = None
    """The same where what fires is to be counted."""


def only_at(approximation: Approximation, layers: list[int]) -> Approximation:
    """The same for those of the layers that it covers."""
    places = [place for place, layer in enumerate(approximation.covered) if layer in layers]
    if len(places) == len(approximation.covered):
        return approximation

    def chosen(give: Give) -> Give:
        return lambda acts_NXD: give(acts_NXD)[:, places]

    return Approximation(
        approximation.by,
        [approximation.sources[place] for place in places],
        [approximation.covered[place] for place in places],
        chosen(approximation.give),
        [approximation.fitted[place] for place in places] if approximation.fitted else [],
        None if approximation.give_and_count is None else chosen(approximation.give_and_count),
    )


def written_layers(trained: TrainedCrosscoder) -> list[int]:
    """The layers that some feature writes, which are all where there are no groups; the others are read alone."""
    groups = trained.crosscoder.groups
    return list(range(len(trained.layers))) if groups is None else [int(layer) for layer in groups.written_L.nonzero()[:, 0]]


def of_run(
    by: str,
    label: str | None,
    trained: TrainedCrosscoder,
    layers: list[str],
    layers_read: list[str],
    seen: Callable[[Tensor, Tensor], None],
) -> Approximation:
    """The reconstructions of a crosscoder, at those of `layers` that it has.

    layers_read : the X layers of what it will be given.
    seen : takes the activations of the crosscoder's layers and its features, part by part, of positions that count.
    """
    read = [layers_read.index(layer) for layer in trained.layers]
    shared = [place for place in written_layers(trained) if trained.layers[place] in layers]

    def give_and(acts_NXD: Tensor, see: Callable[[Tensor, Tensor], None] | None) -> Tensor:
        parts = [acts_NXD.new_empty(0, len(shared), acts_NXD.shape[2])]
        for part_NXD in torch.split(acts_NXD, max(1, FEATURES_AT_A_TIME // trained.num_features)):
            part_NLD = part_NXD[:, read]
            features_NF = trained.encode(part_NLD)
            if see is not None:
                see(part_NLD, features_NF)
            parts.append(trained.decode(features_NF, part_NLD)[:, shared])
        return torch.cat(parts)

    covered = [layers.index(trained.layers[place]) for place in shared]
    sources = [label] * len(covered)
    return Approximation(by, sources, covered, lambda acts: give_and(acts, None), give_and_count=lambda acts: give_and(acts, seen))


def dense_path(trained: TrainedCrosscoder) -> Approximation:
    """What a crosscoder's dense path and its bias give with every feature at zero."""
    every = list(range(len(trained.layers)))

    def give(acts_NXD: Tensor) -> Tensor:
        acts_NLD = acts_NXD[:, every]
        return trained.decode(acts_NLD.new_zeros(len(acts_NLD), trained.num_features), acts_NLD)

    return Approximation("dense_path", [None] * len(every), every, give)


def ablations(mean_LD: Tensor) -> list[Approximation]:
    """The layers' means, and zeros."""
    every: list[int] = list(range(len(mean_LD)))
    nothing: list[str | None] = [None] * len(every)
    return [
        Approximation("mean", nothing, every, lambda acts_NXD: mean_LD.expand(len(acts_NXD), *mean_LD.shape)),
        Approximation("zero", nothing, every, lambda acts_NXD: torch.zeros_like(acts_NXD[:, every])),
    ]
