"""How well a crosscoder stands in for the activations of a held-out set: the measurements, batch by batch.

Two passes over the same contexts. The first gives each layer's mean; the second compares every position's activations with
their reconstructions and with the baselines, and runs the language model with each of them in place of the activations.
`pipeline.evaluation.held_out` says which positions and predictions count.

B contexts in a batch, S positions in a context, N positions that count in a batch, L layers, D model width, F features.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.crosscoder.metrics import FiringCounts, LayerMoments, Predictions, Reconstruction, ReconstructionMetrics, recovered
from pipeline.evaluation.held_out import HeldOut, HeldOutBatch
from pipeline.interventions import Intervention, clean_run, put, zero
from pipeline.language_model import LanguageModel
from pipeline.run import Run

FEATURES_AT_A_TIME = 1 << 26
"""At most so many numbers of features_BF exist at once: 256 MiB."""


class Stand(NamedTuple):
    """What stands in for the activations of a layer; the rows of every table are named by it."""

    layer: str
    """A layer; in reconstruction also `joint` and `mean_over_layers`, in cross-entropy also `all`."""
    by: str
    """crosscoder, mean, zero, other_layer or other_layer_matched."""
    source: str | None = None
    """The other layer, where one is taken."""


class Loss(NamedTuple):
    """What a replacement does to the model's predictions; see `metrics.DEFINITIONS`."""

    cross_entropy: float
    difference: float
    kl: float
    recovered_against_zero: float | None
    recovered_against_mean: float | None


class Measurements(NamedTuple):
    num_contexts: int
    num_tokens: int
    num_positions: int
    num_predictions: int
    firing: FiringCounts
    l0_as_trained: float | None
    reconstruction: dict[Stand, ReconstructionMetrics]
    clean_cross_entropy: float
    losses: dict[Stand, Loss]


def layer_moments(language_model: LanguageModel, layers: list[str], held_out: HeldOut, run: Run) -> LayerMoments:
    """The first pass: mean and spread of each layer's activations over the positions that count."""
    moments = LayerMoments(len(layers), language_model.d_model, language_model.device)
    done = 0
    for batch in held_out.batches():
        run.check_stop()
        moments.add(language_model.activations(batch.tokens_BS, layers)[batch.replaced_BS])
        done += len(batch.tokens_BS)
        run.report("means", done, len(held_out.indices), unit="contexts")
    return moments


class Measurement:
    """The second pass: adds up batches, and gives the results at the end.

    Parameters
    ----------
    moments : from the first pass over the same contexts.
    other_layer_distance : another layer's activation is spliced in for layers at most so many places apart.
    training_batch_positions : over groups of so many positions a BatchTopK crosscoder is also encoded as in training.
    """

    def __init__(
        self,
        trained: TrainedCrosscoder,
        language_model: LanguageModel,
        moments: LayerMoments,
        *,
        other_layer_distance: int,
        training_batch_positions: int,
    ) -> None:
        self._trained, self._language_model = trained, language_model
        self._layers = trained.layers
        self._mean_LD = moments.mean_LD
        self._spread_L = moments.mean_squared_centered_norm_L.sqrt()
        device, scale_L = language_model.device, trained.normalizer.scale_L
        self._firing = FiringCounts(trained.num_features, device)
        self._as_trained = EncodingAsTrained(trained, training_batch_positions, device)
        self._whole = {by: Reconstruction(self._mean_LD, scale_L) for by in ("crosscoder", "mean")}
        self._pairs = {pair: Reconstruction(self._mean_LD[[to]], scale_L[[to]]) for pair, to, _ in self._other_layers()}
        self._spliced_pairs = [pair for pair, to, source in self._other_layers() if abs(to - source) <= other_layer_distance]
        self._clean = Predictions(device)
        self._predictions: dict[Stand, Predictions] = {}

    def _other_layers(self) -> list[tuple[Stand, int, int]]:
        """Each ordered pair of layers, raw and matched, with the indices of the layer replaced and the layer taken."""
        pairs = [(to, source) for to in range(len(self._layers)) for source in range(len(self._layers)) if to != source]
        kinds = ("other_layer", "other_layer_matched")
        return [(Stand(self._layers[to], by, self._layers[source]), to, source) for to, source in pairs for by in kinds]

    @torch.inference_mode()
    def add(self, batch: HeldOutBatch, run: Run) -> None:
        """Adds a batch; raises `Stopped` before the next forward pass when the run was asked to stop."""
        clean = clean_run(self._language_model, batch.tokens_BS, self._layers)
        acts_NLD = clean.acts_BSLD[batch.replaced_BS].float()
        reconstructions_NLD = self._reconstruct(acts_NLD)
        self._as_trained.add(acts_NLD)
        self._whole["crosscoder"].add(acts_NLD, reconstructions_NLD)
        self._whole["mean"].add(acts_NLD, self._mean_LD.expand_as(acts_NLD))
        self._clean.add(clean.logits_BSV, batch.targets_BS, batch.counted_BS, clean.logits_BSV)
        for stand, replace in self._replacements(acts_NLD, reconstructions_NLD, batch.replaced_BS):
            run.check_stop()
            logits_BSV = self._language_model.logits(batch.tokens_BS, replace)
            sums = self._predictions.setdefault(stand, Predictions(self._language_model.device))
            sums.add(logits_BSV, batch.targets_BS, batch.counted_BS, clean.logits_BSV)

    def _reconstruct(self, acts_NLD: Tensor) -> Tensor:
        """One encode of all layers by the inference form, and its decoding; counts what fires."""
        reconstructions = [torch.empty_like(acts_NLD[:0])]
        for part_NLD in torch.split(acts_NLD, max(1, FEATURES_AT_A_TIME // self._trained.num_features)):
            features_NF = self._trained.encode(part_NLD)
            self._firing.add(features_NF)
            reconstructions.append(self._trained.decode(features_NF, part_NLD))
        return torch.cat(reconstructions)

    def _replacements(
        self, acts_NLD: Tensor, reconstructions_NLD: Tensor, replaced_BS: Tensor
    ) -> Iterator[tuple[Stand, dict[str, Intervention]]]:
        """Every changed run of a batch: each layer alone, by each stand-in, and all layers together."""
        together: dict[str, dict[str, Intervention]] = {"crosscoder": {}, "mean": {}, "zero": {}}
        for index, layer in enumerate(self._layers):
            together["crosscoder"][layer] = put(reconstructions_NLD[:, index], replaced_BS)
            together["mean"][layer] = put(self._mean_LD[index], replaced_BS)
            together["zero"][layer] = zero(replaced_BS)
            for by, replace in together.items():
                yield Stand(layer, by), {layer: replace[layer]}
        for by, replace in together.items():
            yield Stand("all", by), replace
        for stand, to, source in self._other_layers():
            values_ND = self._other_layer(acts_NLD, to, source, matched=stand.by == "other_layer_matched")
            self._pairs[stand].add(acts_NLD[:, [to]], values_ND[:, None])
            if stand in self._spliced_pairs:
                yield stand, {stand.layer: put(values_ND, replaced_BS)}

    def _other_layer(self, acts_NLD: Tensor, to: int, source: int, *, matched: bool) -> Tensor:
        """Layer `source` in place of layer `to`, as it is or moved and scaled to that layer's mean and spread; float64."""
        values_ND = acts_NLD[:, source].double()
        if not matched:
            return values_ND
        spread = self._spread_L[source]
        gain = torch.where(spread > 0, self._spread_L[to] / spread, 0.0)
        return self._mean_LD[to] + (values_ND - self._mean_LD[source]) * gain

    def results(self, held_out: HeldOut) -> Measurements:
        reconstruction: dict[Stand, ReconstructionMetrics] = {}
        for by, sums in self._whole.items():
            reconstruction |= {Stand(layer, by): found for layer, found in zip(self._layers, sums.layers(), strict=True)}
            reconstruction |= {Stand("joint", by): sums.joint(), Stand("mean_over_layers", by): sums.mean_over_layers()}
        reconstruction |= {pair: sums.layers()[0] for pair, sums in self._pairs.items()}
        return Measurements(
            num_contexts=len(held_out.indices),
            num_tokens=held_out.num_tokens,
            num_positions=self._firing.num_positions,
            num_predictions=self._clean.num_predictions,
            firing=self._firing,
            l0_as_trained=self._as_trained.l0(),
            reconstruction=reconstruction,
            clean_cross_entropy=self._clean.cross_entropy,
            losses={stand: self._loss(stand) for stand in self._predictions},
        )

    def _loss(self, stand: Stand) -> Loss:
        found, clean = self._predictions[stand], self._clean.cross_entropy
        against = {by: self._predictions[Stand(stand.layer, by)].cross_entropy for by in ("zero", "mean")}
        shares = {by: recovered(ablated=ablated, spliced=found.cross_entropy, clean=clean) for by, ablated in against.items()}
        return Loss(found.cross_entropy, found.cross_entropy - clean, found.kl, shares["zero"], shares["mean"])


class EncodingAsTrained:
    """What a BatchTopK crosscoder fires when the features compete within groups of positions, as they did in training.

    The groups are of consecutive held-out positions whatever the batches are; the last one is smaller.
    """

    def __init__(self, trained: TrainedCrosscoder, group_positions: int, device: torch.device) -> None:
        self._trained = trained
        self._group_positions = group_positions
        self._firing = FiringCounts(trained.num_features, device)
        self._applies = trained.config.activation_function.kind in ("topk", "batch_topk")
        self._waiting: list[Tensor] = []

    def add(self, acts_NLD: Tensor) -> None:
        if not self._applies:
            return
        self._waiting.append(acts_NLD)
        if sum(map(len, self._waiting)) >= self._group_positions:
            *groups, rest_NLD = torch.cat(self._waiting).tensor_split(self._cuts())
            self._waiting = [rest_NLD.clone()]
            for group_NLD in groups:
                self._encode(group_NLD)

    def _cuts(self) -> list[int]:
        total = sum(map(len, self._waiting))
        return list(range(self._group_positions, total + 1, self._group_positions))

    def _encode(self, group_NLD: Tensor) -> None:
        if len(group_NLD):
            self._firing.add(self._trained.encode(group_NLD, as_trained=True))

    def l0(self) -> float | None:
        """Of everything added, the last group included; None for other activation functions. To be called once, at the end."""
        if self._waiting:
            self._encode(torch.cat(self._waiting))
            self._waiting = []
        return self._firing.l0 if self._applies else None
