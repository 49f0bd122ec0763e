"""The loss of a training: how the reconstruction is measured, and the terms beside it.

Each term is a group of `Loss` named after it; a term whose group is absent (null) is not in the loss. `l1: {coefficient: 2}`
adds one, `loss.l1.coefficient=4` changes it, `loss.auxk=null` takes one out.
"""

from typing import Literal

from pydantic import model_validator

from pipeline.config.crosscoder import CrosscoderConfig, Gated, JumpRelu, Relu
from pipeline.config.schedule import NonNegative, Positive, Schedule
from pipeline.config.schema import Config, Fraction, PositiveCount


class Reconstruction(Config):
    """The squared error between activations and reconstruction, in the crosscoder's units."""

    reduction: Literal["sum", "mean"] = "sum"
    """`sum`: over width and layers, then the mean over positions; `mean`: over all of them."""
    prefixes: list[PositiveCount] = []
    """Matryoshka (Bussmann et al. 2025): the first so many features must reconstruct alone, too. The term is the mean over these
    prefixes and the whole dictionary. In rising order, each below num_features."""


class Term(Config):
    """What every term beside the reconstruction has: a weight, and how the weight moves."""

    coefficient: NonNegative
    """The term's weight in the loss."""
    schedule: Schedule = Schedule()
    """A factor on the coefficient."""

    def fault(self, crosscoder: CrosscoderConfig) -> str | None:
        """Why the term makes no sense for such a crosscoder; None where it does."""
        return None


class L1Schedule(Schedule):
    """A factor on the coefficient: it rises from 0 over the first twentieth of all steps."""

    warmup_fraction: Fraction = 0.05
    """Share of all steps, the first ones, over which the factor moves to 1."""


class TanhSchedule(Schedule):
    """A factor on the coefficient: it rises from 0 over the whole run."""

    warmup_fraction: Fraction = 1.0
    """Share of all steps, the first ones, over which the factor moves to 1."""


class L1(Term):
    """Each feature's activation times its decoder norm over the layers (Lindsey et al. 2024)."""

    schedule: L1Schedule = L1Schedule()
    norm: Literal["l2", "l1"] = "l2"
    """Of a feature's decoder vector in one layer."""
    across_layers: Literal["sum", "l2", "max"] = "sum"
    """How the norms in the layers become one number: their sum, the square root of the sum of their squares, the greatest."""
    decoder_norms: Literal["live", "detached", "absent"] = "live"
    """`live`: the penalty's gradient shrinks decoders too; `detached`: only activations; `absent`: activations alone, unweighted."""
    positions: Literal["mean", "sum"] = "mean"
    """Over the positions of a batch."""


class Tanh(Term):
    """tanh(steepness times activation times decoder norm), summed over features: near a count (Anthropic, January 2025)."""

    schedule: TanhSchedule = TanhSchedule()
    steepness: Positive = 4.0
    """In the inverse of the activation's unit."""


class L0Target(Term):
    """(L0 / target - 1)^2, whose gradient reaches the learned thresholds (as for JumpReLU in Gemma Scope's successors)."""

    target: Positive
    """Features that are to fire at a position, as a mean."""

    def fault(self, crosscoder: CrosscoderConfig) -> str | None:
        if not isinstance(crosscoder.activation_function, JumpRelu):
            return "loss.l0_target moves learned thresholds, which only activation_function.kind jump_relu has"
        return None


class PreActivation(Term):
    """relu(threshold - pre-activation) times the decoder norm, summed over features (Anthropic, January 2025).

    It lifts the features that stay below their threshold.
    """

    coefficient: NonNegative = 3e-6
    """The term's weight in the loss."""

    def fault(self, crosscoder: CrosscoderConfig) -> str | None:
        if not isinstance(crosscoder.activation_function, JumpRelu | Relu):
            return "loss.pre_activation needs a threshold within the training step; use activation_function.kind jump_relu or relu"
        return None


class Orthogonality(Term):
    """Mean squared cosine between the decoders, over all layers, of different features; of a random sample of them in each step."""

    sample: PositiveCount = 1024
    """Features in the sample."""


class Auxk(Term):
    """The `k` strongest dead features of each position reconstruct what the living left over (Gao et al. 2024)."""

    coefficient: NonNegative = 1 / 32
    """Weight of the share of the residual that they leave unexplained, against the share of the activations' variance that
    the crosscoder leaves unexplained."""
    k: PositiveCount | None = None
    """Dead features a position; None takes half the model's width."""
    refresh_steps: PositiveCount = 10
    """Which features are dead is looked up every so many steps; each look-up waits for the device once."""


class GatedAuxiliary(Term):
    """The gate's own pre-activations, rectified, reconstruct through decoders that get no gradient (Rajamanoharan et al. 2024)."""

    coefficient: NonNegative = 1.0
    """The term's weight in the loss."""

    def fault(self, crosscoder: CrosscoderConfig) -> str | None:
        if not isinstance(crosscoder.activation_function, Gated):
            return "loss.gated trains a gate, which only activation_function.kind gated has"
        return None


class Loss(Config):
    """Squared error, plus the terms that are given."""

    reconstruction: Reconstruction = Reconstruction()
    l1: L1 | None = None
    tanh: Tanh | None = None
    l0_target: L0Target | None = None
    pre_activation: PreActivation | None = None
    orthogonality: Orthogonality | None = None
    auxk: Auxk | None = None
    gated: GatedAuxiliary | None = None

    def terms(self) -> dict[str, Term]:
        """The terms that are given, by name, in the order in which they are listed above."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: term for name, term in given.items() if isinstance(term, Term)}

    def fault(self, crosscoder: CrosscoderConfig) -> str | None:
        """Why the loss makes no sense for such a crosscoder; None where it does."""
        prefixes = self.reconstruction.prefixes
        if prefixes != sorted(set(prefixes)) or any(prefix >= crosscoder.num_features for prefix in prefixes):
            return f"loss.reconstruction.prefixes is {prefixes}, expected rising numbers below num_features, {crosscoder.num_features}"
        if isinstance(crosscoder.activation_function, Gated) and self.gated is None:
            return "activation_function.kind gated learns when to fire from loss.gated alone; add `gated: {}` to the loss"
        return next((fault for term in self.terms().values() if (fault := term.fault(crosscoder))), None)

    @model_validator(mode="after")
    def _something_of_each_term(self) -> "Loss":
        for name, term in self.terms().items():
            if term.coefficient == 0:
                raise ValueError(f"{name}.coefficient is 0, which leaves the term out; set {name} to null instead")
        return self
