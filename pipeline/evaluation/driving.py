"""By how many layers each feature is really driven: what is left of its activation when a layer is taken away from the encoder.

A crosscoder whose features each read one layer is no more than several sparse autoencoders side by side; decoder norms alone
do not tell (after Demou et al. 2026, "fmxcoders", arXiv 2605.09438, whose functional coherence this follows in its idea: the
formula here is this project's own).

Where a feature fires, its activation is gain * pre + shift (see `pipeline.crosscoder.activation_functions`), and pre is a sum
over layers. With the mean of layer l in place of its activation x_l the value is therefore f - gain * (x_l - mean_l) . W_enc_l,
which fires or does not; no further encoding, and no run of the language model, is needed.

Shapes: N positions, L layers, D model width, F features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.crosscoder.weights import layer_norms

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
NUMBERS_AT_A_TIME = 1 << 24
"""At most so many numbers of contributions_NF exist at once, a few times over: 64 MiB each."""


class DrivingLayers(NamedTuple):
    """Over the features that fire on the held-out text; see `pipeline.evaluation.definitions`. None where there is none."""

    num_features: int
    layers_driving: float | None
    quantiles: dict[str, float]
    """Of the layers that drive a feature; by percentage."""
    functional_coherence: float | None
    """None for one layer."""
    layers_by_decoder_norm: float | None
    drop_L: list[float]
    survives_alone_L: list[float]


class Driving:
    """Adds up, over the firings of each feature, what each layer contributes."""

    def __init__(self, trained: TrainedCrosscoder, mean_LD: Tensor) -> None:
        """mean_LD : what stands in place of a layer that is masked, in the language model's units."""
        self._trained = trained
        crosscoder = trained.crosscoder
        self._W_enc_LDF, W_dec_FLD = crosscoder.weights()
        self._gain_F, shift_F, self._threshold_F = crosscoder.inference_form()
        self._mean_LD = trained.normalizer.normalize(mean_LD)
        self._value_of_means_F = crosscoder.pre_activations(self._mean_LD[None], self._W_enc_LDF)[0] * self._gain_F + shift_F
        self._decoder_norms_FL = layer_norms(W_dec_FLD)
        num_layers, device = len(trained.layers), self._threshold_F.device
        self.firings_F = torch.zeros(trained.num_features, dtype=torch.int64, device=device)
        self.sum_activation_F = torch.zeros(trained.num_features, dtype=torch.float64, device=device)
        self.max_activation_F = torch.zeros(trained.num_features, device=device)
        self.drop_FL = torch.zeros(trained.num_features, num_layers, dtype=torch.float64, device=device)
        self.alone_FL = torch.zeros(trained.num_features, num_layers, dtype=torch.int64, device=device)

    def add(self, acts_NLD: Tensor, features_NF: Tensor) -> None:
        """Adds positions: their raw activations, and what all layers together made fire there."""
        rows = max(1, NUMBERS_AT_A_TIME // self._trained.num_features)
        for part_NLD, part_NF in zip(torch.split(acts_NLD, rows), torch.split(features_NF, rows), strict=True):
            self._add(self._trained.normalizer.normalize(part_NLD) - self._mean_LD, part_NF)

    def _add(self, centered_NLD: Tensor, features_NF: Tensor) -> None:
        fires_NF = features_NF > 0
        self.firings_F += fires_NF.sum(0)
        self.sum_activation_F += features_NF.sum(0, dtype=torch.float64)
        self.max_activation_F = torch.maximum(self.max_activation_F, features_NF.amax(0)) if len(features_NF) else self.max_activation_F
        for layer, W_enc_DF in enumerate(self._W_enc_LDF):
            contribution_NF = (centered_NLD[:, layer] @ W_enc_DF) * self._gain_F
            without_NF = features_NF - contribution_NF
            lost_NF = torch.where(without_NF > self._threshold_F, contribution_NF, features_NF)
            self.drop_FL[:, layer] += torch.where(fires_NF, lost_NF, 0.0).sum(0, dtype=torch.float64)
            alone_NF = (contribution_NF + self._value_of_means_F > self._threshold_F) & fires_NF
            self.alone_FL[:, layer] += alone_NF.sum(0)

    @property
    def drop_by_layer_FL(self) -> Tensor:
        """The share of a feature's summed activation that goes when the layer is masked, float64; 0 of one that never fires."""
        return self.drop_FL / self.sum_activation_F.clamp(min=torch.finfo(torch.float64).tiny)[:, None]

    @property
    def survives_alone_FL(self) -> Tensor:
        """The share of a feature's firings that are left when only this layer is encoded, float64; 0 of one that never fires."""
        return self.alone_FL.double() / self.firings_F.clamp(min=1)[:, None]

    def results(self) -> DrivingLayers:
        drops_FL = self.drop_by_layer_FL.clamp(min=0)
        living_F = (self.firings_F > 0) & (drops_FL.sum(1) > 0)
        if not bool(living_F.any()):
            nothing = [0.0] * drops_FL.shape[1]
            return DrivingLayers(0, None, {}, None, None, nothing, nothing)
        number_F = effective_number(drops_FL[living_F])
        places = torch.tensor(QUANTILES, dtype=torch.float64, device=number_F.device)
        quantiles = torch.quantile(number_F, places).tolist()
        return DrivingLayers(
            num_features=int(living_F.sum()),
            layers_driving=number_F.mean().item(),
            quantiles={f"{round(100 * place)}": value for place, value in zip(QUANTILES, quantiles, strict=True)},
            functional_coherence=(number_F.mean().item() - 1) / (drops_FL.shape[1] - 1) if drops_FL.shape[1] > 1 else None,
            layers_by_decoder_norm=effective_number(self._decoder_norms_FL[living_F].double()).mean().item(),
            drop_L=self.drop_by_layer_FL[living_F].mean(0).tolist(),
            survives_alone_L=self.survives_alone_FL[living_F].mean(0).tolist(),
        )


def effective_number(weights_FL: Tensor) -> Tensor:
    """[F]: how many layers share a feature, exp of the entropy of its weights (0 or more), from 1 to L; 1 where all are 0."""
    shares_FL = weights_FL / weights_FL.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    number_F: Tensor = torch.special.entr(shares_FL).sum(1).exp()
    return number_F
