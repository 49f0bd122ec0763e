"""What a trainer sees of activations, wherever they come from.

Shapes: B positions in a batch, L layers read, D model width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class ActivationBatch(NamedTuple):
    """Activations of B positions and where each comes from; all on one device."""

    acts_BLD: Tensor
    """In the dtype of the language model."""
    tokens_B: Tensor
    """int64: the id at the position; a separator is the model's end-of-text id."""
    documents_B: Tensor
    """int64: index of the document in the token set."""
    positions_B: Tensor
    """int64: place in its context."""


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of each layer's activations, in float64, on the CPU, without dropped positions and position 0."""

    mean_LD: Tensor
    mean_squared_norm_L: Tensor
    """Mean of |x|^2, x as the model gives it."""
    num_positions: int
    mean_norm_L: Tensor | None = None
    """Mean of |x|; None of a set that was made before this was recorded."""

    @property
    def mean_squared_centered_norm_L(self) -> Tensor:
        """Mean of |x - mean|^2."""
        return self.mean_squared_norm_L - self.mean_LD.square().sum(-1)

    @classmethod
    def from_sums(
        cls, sum_LD: Tensor, sum_squared_norm_L: Tensor, num_positions: int, sum_norm_L: Tensor | None = None
    ) -> "LayerStatistics":
        """The moments that float64 sums over `num_positions` positions give."""
        mean_norm_L = None if sum_norm_L is None else sum_norm_L / num_positions
        return cls(sum_LD / num_positions, sum_squared_norm_L / num_positions, num_positions, mean_norm_L)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; floats keep every bit."""
        return {
            "num_positions": self.num_positions,
            "mean_squared_norm": self.mean_squared_norm_L.tolist(),
            "mean_norm": None if self.mean_norm_L is None else self.mean_norm_L.tolist(),
            "mean_squared_centered_norm": self.mean_squared_centered_norm_L.tolist(),
            "mean": self.mean_LD.tolist(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "LayerStatistics":
        """The inverse of `to_json`."""
        mean_LD, mean_squared_norm_L = (torch.tensor(values[key], dtype=torch.float64) for key in ("mean", "mean_squared_norm"))
        mean_norm = values.get("mean_norm")
        mean_norm_L = None if mean_norm is None else torch.tensor(mean_norm, dtype=torch.float64)
        return cls(mean_LD, mean_squared_norm_L, values["num_positions"], mean_norm_L)


class Provenance(NamedTuple):
    """What activations come from, as far as whoever compares others with them has to do the same; goes along into checkpoints."""

    language_model_hash: str
    tokens_id: str
    """Data id of the token set."""
    tokenizer_hash: str
    """Of the tokenizer that made that token set; empty where none did."""
    context_tokens: int
    """Length of the contexts that the model read."""
    drop_positions: list[int]
    """Positions of every context that are left out."""
    beginning_of_text_id: int | None = None
    """What every context begins with; None: with the text itself."""
    language_models: dict[str, str] | None = None
    """The hash of each model by its name; None of a single one. `language_model_hash` is over all of them then."""
    outlier_norms: list[float] | None = None
    """The norm of each layer above which positions are left out; None: none is."""
    exclude_token_ids: list[int] | None = None
    """Tokens whose positions are left out, ascending; None: none is."""

    @property
    def leaves_out(self) -> bool:
        """Whether positions may be left out for what stands there, so that batches may have fewer rows than positions."""
        return self.outlier_norms is not None or self.exclude_token_ids is not None

    def facts(self) -> dict[str, Any]:
        """As entries of a record; there is none of what is None, so that older identities hold."""
        return {key: value for key, value in self._asdict().items() if value is not None}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Provenance":
        """The inverse of `facts`, from a record that holds more."""
        return cls(**{key: facts[key] for key in cls._fields if key in facts})


class ActivationSource(Protocol):
    """Activations of the same positions in the same order at every call, in batches, from any point on."""

    @property
    def data_id(self) -> str:
        """Identity of the rows and their order."""
        ...

    @property
    def provenance(self) -> Provenance: ...

    @property
    def layers(self) -> list[str]: ...

    @property
    def d_model(self) -> int: ...

    @property
    def num_positions(self) -> int:
        """Positions in an epoch, those counted that are left out for their norm or token."""
        ...

    @property
    def statistics(self) -> LayerStatistics: ...

    def batches(self, *, batch_positions: int, epoch: int, cursor: int) -> Iterator[ActivationBatch]:
        """The rest of an epoch, from the `cursor` positions on that are already consumed; the last batch may be short.

        A batch is of `batch_positions` positions, and has a row for each that is not left out for its norm or token.
        Every position comes exactly once an epoch. Raises `Stopped` when the run was asked to stop while it computes.
        """
        ...
