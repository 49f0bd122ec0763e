"""How a value moves in the course of training: one type for learning rate, coefficients, k, bandwidth and mask rate."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.schema import Config, Fraction

NonNegative = Annotated[float, Field(ge=0.0)]
"""A number from 0 on."""
Positive = Annotated[float, Field(gt=0.0)]
"""A number above 0."""


class Schedule(Config):
    """A factor on a value, as a function of the step alone. The default leaves the value as it is all through the run.

    The factor moves linearly from `initial_fraction` to 1 over the first `warmup_fraction` of all steps, and from 1 to
    `final_fraction` over the last `decay_fraction`. An `initial_fraction` above 1 anneals: `{initial_fraction: 8,
    warmup_fraction: 0.3}` on k = 64 begins with 512 and reaches 64 after three tenths of the run.
    """

    warmup_fraction: Fraction = 0.0
    """Share of all steps, the first ones, over which the factor moves to 1."""
    initial_fraction: NonNegative = 0.0
    """The factor that the warm-up begins from; without meaning where `warmup_fraction` is 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """The form of the way to `final_fraction`; `constant` stays at 1."""
    decay_fraction: Fraction = 0.2
    """Share of all steps, the last ones, over which it moves to `final_fraction`; 1 takes the whole run."""
    final_fraction: NonNegative = 0.0
    """The factor when training ends; without meaning where `decay` is `constant`."""

    @model_validator(mode="after")
    def _phases_fit(self) -> "Schedule":
        if self.decay != "constant" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction and decay_fraction add up to more than 1; make one of them smaller")
        return self
