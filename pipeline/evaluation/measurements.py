"""How well a crosscoder stands in for the activations of a held-out set: the measurements, batch by batch.

Before this pass others have found which positions are outliers, each layer's mean, and the baselines. It compares every
position's activations with their reconstructions and with the baselines, and runs the language model with each of them in
place of the activations. `pipeline.evaluation.held_out` says which positions and predictions count.

B contexts in a batch, S positions in a context, N positions that count in a batch, without outliers, M outliers, X layers read,
the first L of them the crosscoder's, K layers covered, D model width.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.activations.outliers import OutlierLimits
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.crosscoder.metrics import (
    FiringCounts,
    Medians,
    Reconstruction,
    ReconstructionMetrics,
    SquaredNorms,
    mean,
    recovered,
    squared_norms,
)
from pipeline.evaluation import approximations
from pipeline.evaluation.approximations import Approximation
from pipeline.evaluation.as_trained import EncodingAsTrained
from pipeline.evaluation.driving import Driving
from pipeline.evaluation.held_out import HeldOutBatch
from pipeline.evaluation.model_diffing import ModelDifference, diffings_of
from pipeline.evaluation.outliers import FEW, HeldOutMoments, LayerOutliers
from pipeline.evaluation.predictions import ReplacedPredictions, Stand
from pipeline.evaluation.splicing import Splicing, model_of, of_model
from pipeline.evaluation.threshold_sweep import SweepPoint, ThresholdSweep
from pipeline.interventions import CleanRun, clean_run
from pipeline.language_models import Models, each, in_its_model, sites_of
from pipeline.run import Run

JOINT, MEAN_OVER_LAYERS, SPLIT = "joint", "mean_over_layers", "split"
"""In place of a layer. The last two begin with the model's name where there are several: `chat/split`."""
STRONGEST = "strongest_baseline"
ABLATIONS = ("mean", "zero")


class Loss(NamedTuple):
    """What a replacement does to the model's predictions; see `pipeline.evaluation.definitions`."""

    cross_entropy: float
    difference: float
    kl: float
    recovered_against_zero: float | None
    recovered_against_mean: float | None


class Compared(NamedTuple):
    """Another trained crosscoder, whose reconstructions are rows beside this one's."""

    label: str
    trained: TrainedCrosscoder

    @property
    def kind(self) -> str:
        """What it is, by what its features read and write."""
        groups = self.trained.crosscoder.groups
        if len(self.trained.layers) == 1:
            return "a sparse autoencoder"
        if groups is None:
            return "a crosscoder"
        reads_FL, writes_FL = groups.reads_FL, groups.writes_FL
        if bool((writes_FL.sum(1) == 1).all()) and torch.equal(reads_FL, writes_FL):
            return "sparse autoencoders a layer"
        if not bool((reads_FL * writes_FL).any()):
            return "a transcoder"
        return "a crosscoder in groups"


class Measurements(NamedTuple):
    layers: list[str]
    """Those that the crosscoder reconstructs: all, unless no group of features writes some."""
    num_positions: int
    """Outliers and excluded tokens not counted."""
    num_outliers: int
    num_excluded: int
    """Positions that don't count because training left their tokens out."""
    num_predictions: int
    firing: FiringCounts
    l0_as_trained: float | None
    compared_firing: dict[str, FiringCounts]
    compared_kinds: dict[str, str]
    sweep: list[SweepPoint]
    """Of the crosscoder at other thresholds, from the lowest L0 on."""
    outliers: list[LayerOutliers]
    reconstruction: dict[Stand, ReconstructionMetrics]
    clean_by_model: dict[str, float]
    """Cross-entropy of each unchanged model by its name; a single one is called `""`."""
    losses: dict[Stand, Loss]
    driving: Driving
    model_differences: list[ModelDifference]
    """Of each two models; of a single one there is none."""

    @property
    def clean_cross_entropy(self) -> float:
        """Of the unchanged model; of several their mean."""
        return sum(self.clean_by_model.values()) / len(self.clean_by_model)


class Measurement:
    """The last pass: adds up batches, and gives the results at the end.

    Parameters
    ----------
    moments : from a pass over the same contexts.
    baselines : fitted on other contexts.
    compared : other crosscoders of the same model; what they read beyond this one's layers is read too.
    fit_sample_NLD : rows of the crosscoder's layers that baselines were fitted on; the sweep's factors are chosen on them.
    spliced_baselines : so many of the baselines are spliced in at each layer.
    seed : of the division of positions among layers.
    """

    def __init__(
        self,
        trained: TrainedCrosscoder,
        models: Models,
        limits: OutlierLimits,
        moments: HeldOutMoments,
        baselines: list[Approximation],
        compared: list[Compared],
        *,
        fit_sample_NLD: Tensor,
        spliced_baselines: int,
        seed: int,
    ) -> None:
        self._models, self._limits, self._moments = each(models), limits, moments
        self._layers, self._targets, self._seed = trained.layers, approximations.written_layers(trained), seed
        self._layers_read = list(dict.fromkeys([*trained.layers, *(layer for run in compared for layer in run.trained.layers)]))
        device = models.device
        self._firing = FiringCounts(trained.num_features, device)
        self._compared_firing = {run.label: FiringCounts(run.trained.num_features, device) for run in compared}
        self._compared_kinds = {run.label: run.kind for run in compared}
        self._sweep = ThresholdSweep(trained, self._targets, fit_sample_NLD)
        self._as_trained = EncodingAsTrained(trained, trained.batch_positions, device)
        self._driving = Driving(trained, moments.inliers.mean_LD)
        self._diffings = diffings_of(trained, list(self._models))
        self._distances = Medians(len(self._layers), device)
        self._predictions = {name: ReplacedPredictions(model) for name, model in self._models.items()}
        self._num_outliers = self._num_excluded = 0
        others = [*self._of_runs(trained, compared), *approximations.ablations(moments.inliers.mean_LD)]
        baselines = [approximations.only_at(baseline, self._targets) for baseline in baselines]
        self._approximations = [*(approximations.only_at(other, self._targets) for other in others), *baselines]
        self._sums = [self._sums_of(approximation) for approximation in self._approximations]
        targets = {name: sites_of(name, [self._layers[layer] for layer in self._targets]) for name in self._models}
        self._split_targets = {name: layers for name, layers in targets.items() if len(layers) > 1}
        """By model, the layers among which its positions are split."""
        self._strongest = strongest_baselines(baselines)
        self._spliced = spliced_at(self._approximations, baselines, spliced_baselines)

    def _of_runs(self, trained: TrainedCrosscoder, compared: list[Compared]) -> list[Approximation]:
        def seen(acts_NLD: Tensor, features_NF: Tensor) -> None:
            self._firing.add(features_NF)
            self._driving.add(acts_NLD, features_NF)
            for diffing in self._diffings:
                diffing.add(acts_NLD, features_NF)

        layers, read = self._layers, self._layers_read
        found = [approximations.of_run("crosscoder", None, trained, layers, read, seen)]
        if trained.crosscoder.dense is not None:
            found.append(approximations.dense_path(trained))
        for label, other in compared:
            firing = self._compared_firing[label]
            found.append(approximations.of_run("compared", label, other, layers, read, lambda _, features_NF, f=firing: f.add(features_NF)))  # type: ignore[misc]
        return found

    def _sums_of(self, approximation: Approximation) -> Reconstruction:
        inliers, covered = self._moments.inliers, approximation.covered
        # A layer that never varies has weight 0.
        scale_L = torch.where(inliers.spread_L > 0, inliers.spread_L.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
        return Reconstruction(inliers.mean_LD[covered], scale_L[covered], self._moments.everything.spread_L[covered])

    @property
    def num_forward_passes(self) -> int:
        """Of the language model, a batch: the clean one, each layer alone, and the positions split among layers."""
        num_split = len(self._split_targets) * (1 + len(ABLATIONS) + (1 if self._strongest else 0))
        return len(self._models) + sum(len(layers) for layers in self._spliced) + num_split

    @torch.inference_mode()
    def add(self, batch: HeldOutBatch, run: Run) -> None:
        """Adds a batch; raises `Stopped` before the next forward pass when the run was asked to stop."""
        clean = {name: self._clean_run(name, batch) for name in self._models}
        read_NXD = self._rows_read(clean, batch)
        outlier_N = self._limits.are_outliers(read_NXD[:, : len(self._layers)])
        acts_NXD, outliers_MXD = read_NXD[~outlier_N], read_NXD[outlier_N]
        replaced_BS = batch.replaced_BS.masked_scatter(batch.replaced_BS, ~outlier_N)
        splicing = {n: Splicing(model, self._predictions[n], batch, replaced_BS, run) for n, model in self._models.items()}
        for name, clean_one in clean.items():
            splicing[name].begin(clean_one.hidden_BSD)
        self._num_outliers += len(outliers_MXD)
        self._num_excluded += batch.num_excluded
        self._as_trained.add(acts_NXD[:, : len(self._layers)])
        norms = squared_norms(acts_NXD[:, : len(self._layers)], self._moments.inliers.mean_LD)
        self._distances.add(norms.centered_BL.sqrt())
        self._sweep.add(acts_NXD[:, : len(self._layers)], norms.centered_BL)
        parts = {name: self._parts(batch, len(layers)) for name, layers in self._split_targets.items()}
        strongest: dict[str, Tensor] = {}
        for index, (approximation, sums) in enumerate(zip(self._approximations, self._sums, strict=True)):
            covered = approximation.covered
            values_NKD = (approximation.give_and_count or approximation.give)(acts_NXD)
            sums.add(acts_NXD[:, covered], values_NKD, SquaredNorms(*[norms_BL[:, covered] for norms_BL in norms]))
            if len(outliers_MXD):
                sums.add_outliers(outliers_MXD[:, covered], approximation.give(outliers_MXD))
            values = {self._layers[layer]: values_NKD[:, place] for place, layer in enumerate(covered)}
            for source, layer in zip(approximation.sources, covered, strict=True):
                name = self._layers[layer]
                if layer in self._spliced[index]:
                    splicing[model_of(name)].alone(Stand(name, approximation.by, source), values[name])
                if self._strongest.get(layer) is approximation:
                    strongest[name] = values[name]
            if approximation.by in ("crosscoder", *ABLATIONS):
                self._split(splicing, approximation.by, values, parts)
        if strongest:
            self._split(splicing, STRONGEST, strongest, parts)
        for predictions in self._predictions.values():
            predictions.end()

    def _split(self, splicing: dict[str, Splicing], by: str, values: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
        """Each model with its positions divided among its own layers."""
        for name, layers in self._split_targets.items():
            splicing[name].split(Stand(of_model(name, SPLIT), by), {layer: values[layer] for layer in layers}, parts[name])

    def _clean_run(self, name: str, batch: HeldOutBatch) -> CleanRun:
        own = [in_its_model(layer) for layer in sites_of(name, self._layers_read)]
        return clean_run(self._models[name], batch.tokens_BS, own)

    def _rows_read(self, clean: dict[str, CleanRun], batch: HeldOutBatch) -> Tensor:
        """[N, X, D] float32, the layers in the order of `_layers_read`."""
        read = {name: sites_of(name, self._layers_read) for name in clean}
        acts = [clean[name].acts_BSLD[:, :, read[name].index(layer)] for layer in self._layers_read for name in [model_of(layer)]]
        return torch.stack([acts_BSD[batch.replaced_BS] for acts_BSD in acts], dim=1).float()

    def _parts(self, batch: HeldOutBatch, num_layers: int) -> Tensor:
        """Which layer each position is replaced at where positions are split: drawn for a context by its number, whatever its batch."""
        width = batch.tokens_BS.shape[1]
        drawn = [np.random.default_rng([self._seed, int(index)]).integers(num_layers, size=width) for index in batch.indices_B]
        return torch.from_numpy(np.stack(drawn)).to(batch.tokens_BS.device)

    # -- results --------------------------------------------------------------------------------------------------------------

    def results(self) -> Measurements:
        reconstruction: dict[Stand, ReconstructionMetrics] = {}
        for approximation, sums in zip(self._approximations, self._sums, strict=True):
            by, of_layers = approximation.by, sums.layers()
            for source, layer, found in zip(approximation.sources, approximation.covered, of_layers, strict=True):
                reconstruction[Stand(self._layers[layer], by, source)] = found
            if len(approximation.covered) == len(self._targets):
                run = approximation.sources[0] if by == "compared" else None
                reconstruction[Stand(JOINT, by, run)] = sums.joint()
                reconstruction[Stand(MEAN_OVER_LAYERS, by, run)] = sums.mean_over_layers()
        return Measurements(
            layers=[self._layers[layer] for layer in self._targets],
            num_positions=self._firing.num_positions,
            num_outliers=self._num_outliers,
            num_excluded=self._num_excluded,
            num_predictions=next(iter(self._predictions.values())).clean.num_predictions,
            firing=self._firing,
            l0_as_trained=self._as_trained.l0(),
            compared_firing=self._compared_firing,
            compared_kinds=self._compared_kinds,
            sweep=self._sweep.results(),
            outliers=self._moments.by_layer(self._layers, self._limits, self._distances.share_of_greatest(FEW)),
            reconstruction=reconstruction,
            clean_by_model={name: predictions.clean.cross_entropy for name, predictions in self._predictions.items()},
            losses=self._losses(),
            driving=self._driving,
            model_differences=[diffing.results() for diffing in self._diffings],
        )

    def _losses(self) -> dict[Stand, Loss]:
        losses = {stand: self._loss(stand) for predictions in self._predictions.values() for stand in predictions.changed}
        targets = [self._layers[layer] for layer in self._targets]
        means = losses_over(targets, losses, MEAN_OVER_LAYERS)
        for name in self._models if len(self._models) > 1 else []:
            means |= losses_over(sites_of(name, targets), losses, of_model(name, MEAN_OVER_LAYERS))
        return losses | means

    def _loss(self, stand: Stand) -> Loss:
        predictions = self._predictions[model_of(stand.layer)]
        found, clean = predictions.changed[stand], predictions.clean.cross_entropy
        against = {by: predictions.changed[Stand(stand.layer, by)].cross_entropy for by in ABLATIONS}
        shares = {by: recovered(ablated=ablated, spliced=found.cross_entropy, clean=clean) for by, ablated in against.items()}
        return Loss(found.cross_entropy, found.cross_entropy - clean, found.kl, shares["zero"], shares["mean"])


def losses_over(layers: list[str], losses: dict[Stand, Loss], heading: str) -> dict[Stand, Loss]:
    """The mean over `layers` of what stands in at every one of them, each alone; under `heading` in place of a layer."""
    alone: dict[Stand, list[Loss]] = {}
    for stand, loss in losses.items():
        if stand.layer in layers:
            run = stand.source if stand.by == "compared" else None
            alone.setdefault(Stand(heading, stand.by, run), []).append(loss)
    whole = {stand: of_layers for stand, of_layers in alone.items() if len(of_layers) == len(layers) > 0}
    return {stand: Loss(*[mean(values) for values in zip(*of_layers, strict=True)]) for stand, of_layers in whole.items()}  # type: ignore[arg-type]


def strongest_baselines(baselines: list[Approximation]) -> dict[int, Approximation]:
    """By layer, what explains most on the rows that baselines were fitted on; empty where there are no baselines."""
    layers = baselines[0].covered if baselines else []
    return {layer: max(baselines, key=lambda a, place=place: a.fitted[place]) for place, layer in enumerate(layers)}  # type: ignore[misc]


def spliced_at(everything: list[Approximation], baselines: list[Approximation], most: int) -> list[set[int]]:
    """By approximation, the layers at which the language model is run with it.

    Everywhere the crosscoders and the ablations; of the baselines, which all cover the same layers, `most` at each: an affine map
    from another layer, that layer itself as it is or matched, whichever explains more, then what explains most on the rows that
    they were fitted on.
    """
    spliced = [set(a.covered) if a.by in ("crosscoder", "compared", *ABLATIONS) else set[int]() for a in everything]
    for place, layer in enumerate(baselines[0].covered if baselines else []):
        ranked = sorted(baselines, key=lambda a, place=place: -a.fitted[place])  # type: ignore[misc]
        switching = [a for a in ranked if a.by in ("other_layer", "other_layer_matched")][:1]
        first = [a for a in ranked if a.by == "affine"] + switching
        rest = [a for a in ranked if all(a is not other for other in first)]
        for chosen in [*first, *rest][:most]:
            spliced[next(index for index, a in enumerate(everything) if a is chosen)].add(layer)
    return spliced
