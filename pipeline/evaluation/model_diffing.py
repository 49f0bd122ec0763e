"""What a crosscoder of two language models says of the difference between them, feature by feature.

- The *norm difference* of a feature says in which of the two models it writes: (1 + (|d_other| - |d_one|) / max(|d_one|, |d_other|)) / 2
  for its decoders d, so 0 where it writes in `one` alone, 1/2 where equally in both, 1 where in `other` alone.
- That a decoder is small does not show that the model lacks the feature: what the other features of the crosscoder write there may stand
  for it, or it may be left in the error. *Latent scaling* measures both on activations. With d the decoder of the model in which the
  feature is stronger (its own), f its activation, and y what a model has to show, beta is the least-squares factor of f d on y:

      beta = sum f <d, y> / sum f^2 |d|^2        over positions

  For y the error of a model without the feature, x - x_hat + f d_model, and for y the reconstruction x_hat. The ratios nu_error and
  nu_reconstruction are the foreign model's beta over its own model's: about 0 where the foreign model lacks the feature, 1 where it is
  there as much.

Both are of Minder et al. 2025 ("Overcoming Sparsity Artifacts in Crosscoders to Interpret Chat-Tuning", arXiv 2504.02922), who take the
classes of norm differences below. All vectors are in the crosscoder's own units, in which every site has the same scale; those of a model
are its sites that the other model has by the same name, side by side.

Shapes: N positions, L sites, D model width, F features, C numbers of a model (sites in both times D); 2 models: `one`, `other`.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.evaluation.approximations import written_layers
from pipeline.language_models import in_its_model, sites_of

ONLY, SHARED_FROM, SHARED_TO = 0.1, 0.4, 0.6
"""Norm differences up to the first (or from one minus it) are of a feature of one model alone, those from the second to the third of a
shared one."""
ABSENT_FROM_ERROR, ABSENT_FROM_RECONSTRUCTION = 0.2, 0.5
"""Limits of nu_error and nu_reconstruction below which a feature is called absent from the foreign model."""
NUMBERS_AT_A_TIME = 1 << 24
"""At most so many numbers of features_NF are looked at at once, a few times over: 64 MiB each."""


class FeatureClass(NamedTuple):
    """Features whose norm difference lies in one range, of those that fire on the held-out text and write in either model."""

    name: str
    """`only_<model>`, `shared` or `between`."""
    features: int
    fraction: float
    """Of all that fire and write."""
    nu_error: float | None
    """Median; None where none has one."""
    nu_reconstruction: float | None
    absent: int | None
    """How many of them are absent from the foreign model by both limits."""


class ModelDifference(NamedTuple):
    """Of two models; columns are float64 on the CPU."""

    one: str
    other: str
    sites: list[str]
    """Those that both have, as each model knows them, and that the crosscoder writes in both."""
    fires_F: Tensor
    """Whether the feature fires on the held-out text and writes in either model."""
    norm_difference_F: Tensor
    beta_error_F2: Tensor
    """NaN where the feature doesn't fire, or where the models have no site in common; so are the other three."""
    beta_reconstruction_F2: Tensor
    nu_error_F: Tensor
    nu_reconstruction_F: Tensor

    @property
    def name(self) -> str:
        return f"{self.one}-{self.other}"

    def classes(self) -> list[FeatureClass]:
        """The features by norm difference, from those of `one` alone to those of `other` alone, then those between."""
        difference_F = self.norm_difference_F
        ranges = {
            f"only_{self.one}": difference_F <= ONLY,
            "shared": (difference_F >= SHARED_FROM) & (difference_F <= SHARED_TO),
            f"only_{self.other}": difference_F >= 1 - ONLY,
        }
        ranges["between"] = ~torch.stack(list(ranges.values())).any(0)
        return [self._class(name, chosen_F & self.fires_F) for name, chosen_F in ranges.items()]

    def _class(self, name: str, chosen_F: Tensor) -> FeatureClass:
        count, total = int(chosen_F.sum()), int(self.fires_F.sum())
        fraction = count / max(total, 1)
        known_F = chosen_F & self.nu_error_F.isfinite() & self.nu_reconstruction_F.isfinite()
        error, reconstruction = self.nu_error_F[known_F], self.nu_reconstruction_F[known_F]
        if not len(error):
            return FeatureClass(name, count, fraction, None, None, None)
        absent = (error < ABSENT_FROM_ERROR) & (reconstruction < ABSENT_FROM_RECONSTRUCTION)
        return FeatureClass(name, count, fraction, error.median().item(), reconstruction.median().item(), int(absent.sum()))


class ModelDiffing:
    """Adds up what latent scaling needs of two models, over positions."""

    def __init__(self, trained: TrainedCrosscoder, one: str, other: str) -> None:
        self._trained, self._names = trained, (one, other)
        W_dec_FLD = trained.crosscoder.W_dec_FLD
        written = [trained.layers[layer] for layer in written_layers(trained)]
        sites = [sites_of(name, written) for name in self._names]
        norms_F2 = torch.stack([_side_by_side(W_dec_FLD, trained, own).double().norm(dim=1) for own in sites], dim=1)
        self._norms_F2 = norms_F2
        in_both = [in_its_model(site) for site in sites[0] if in_its_model(site) in map(in_its_model, sites[1])]
        self.sites = in_both
        self._sites = [[site for name in in_both for site in own if in_its_model(site) == name] for own in sites]
        self._decoders_2FC = [_side_by_side(W_dec_FLD, trained, own) for own in self._sites]
        self._own_F = norms_F2.argmax(1)
        """Which of the two is the feature's own model."""
        self._direction_FC = torch.where(self._own_F[:, None] == 0, self._decoders_2FC[0], self._decoders_2FC[1])
        zeros_2F = torch.zeros(2, trained.num_features, dtype=torch.float64, device=norms_F2.device)
        self._errors_2F, self._reconstructions_2F = zeros_2F.clone(), zeros_2F.clone()
        """Sums of f <d, x - x_hat> and of f <d, x_hat>."""
        self._squares_F = zeros_2F[0].clone()

    def add(self, acts_NLD: Tensor, features_NF: Tensor) -> None:
        """Adds positions: their raw activations and what fires there."""
        rows = max(1, NUMBERS_AT_A_TIME // self._trained.num_features)
        for part_NLD, part_NF in zip(torch.split(acts_NLD, rows), torch.split(features_NF, rows), strict=True):
            self._add(self._trained.normalizer.normalize(part_NLD), part_NF)

    def _add(self, acts_NLD: Tensor, features_NF: Tensor) -> None:
        self._squares_F += features_NF.square().sum(0, dtype=torch.float64)
        reconstruction_NLD = self._trained.crosscoder.decode(features_NF, acts_NLD)
        for model, sites in enumerate(self._sites):
            reconstruction_NC = _side_by_side(reconstruction_NLD, self._trained, sites)
            error_NC = _side_by_side(acts_NLD, self._trained, sites) - reconstruction_NC
            for sums_2F, shown_NC in ((self._errors_2F, error_NC), (self._reconstructions_2F, reconstruction_NC)):
                sums_2F[model] += (features_NF * (shown_NC @ self._direction_FC.T)).sum(0, dtype=torch.float64)

    def results(self) -> ModelDifference:
        direction_FC = self._direction_FC.double()
        energy_F = self._squares_F * direction_FC.square().sum(1)
        with_own_2F = torch.stack([(direction_FC * decoder_FC).sum(1) for decoder_FC in self._decoders_2FC]) * self._squares_F
        # 0 / 0 is NaN: of a feature that doesn't fire, or that writes at no site which both models have.
        error_F2, reconstruction_F2 = ((sums_2F / energy_F).T for sums_2F in (self._errors_2F + with_own_2F, self._reconstructions_2F))
        own_F1 = self._own_F[:, None]
        nus_F = [(beta_F2.gather(1, 1 - own_F1) / beta_F2.gather(1, own_F1))[:, 0].cpu() for beta_F2 in (error_F2, reconstruction_F2)]
        greatest_F = self._norms_F2.amax(1)
        change_F = (self._norms_F2[:, 1] - self._norms_F2[:, 0]) / greatest_F.clamp(min=torch.finfo(torch.float64).tiny)
        fires_F = (self._squares_F > 0) & (greatest_F > 0)
        return ModelDifference(
            *self._names, self.sites, fires_F.cpu(), ((1 + change_F) / 2).cpu(), error_F2.cpu(), reconstruction_F2.cpu(), *nus_F
        )


def diffings_of(trained: TrainedCrosscoder, models: list[str]) -> list[ModelDiffing]:
    """One for each two of the models at whose sites the crosscoder writes; none of a single model."""
    written = [trained.layers[layer] for layer in written_layers(trained)]
    return [ModelDiffing(trained, *pair) for pair in itertools.combinations([name for name in models if sites_of(name, written)], 2)]


def _side_by_side(vectors_NLD: Tensor, trained: TrainedCrosscoder, sites: list[str]) -> Tensor:
    """The vectors at these of the crosscoder's sites as one, [N, C]."""
    return vectors_NLD[:, [trained.layers.index(site) for site in sites]].flatten(1)
