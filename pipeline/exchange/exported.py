"""What is written into the files of another library, whichever it is."""

from dataclasses import dataclass

from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.crosscoder.folding import Folded


@dataclass(frozen=True)
class Exported:
    """A trained crosscoder, folded."""

    trained: TrainedCrosscoder
    folded: Folded
    """In float64."""
    language_models: dict[str, str]
    """By the name that sites begin with, empty where there is one model: its name on the hub, with the revision behind an `@` where one
    was given. Without those that are no names on the hub."""

    repository: str | None = None
    """On the hub, where the files are uploaded to."""

    @property
    def k(self) -> int | None:
        """Features that fire at a position in training; None where the activation function has no such number."""
        k: int | None = getattr(self.trained.config.activation_function, "k", None)
        return k

    @property
    def fires_from_0(self) -> bool:
        """Whether every feature fires where its pre-activation is positive, as after a ReLU."""
        return not bool((self.folded.threshold_F > 0).any())
