"""Contexts through the language model to rows of activations, one model batch after the other.

Shapes: B contexts in a model batch, S positions in a context, R rows (kept positions), L layers read, D model width.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.activations.layer_sums import counted
from pipeline.activations.left_out import Exclusion, left_out_for_norm
from pipeline.activations.order import ModelBatch, Order
from pipeline.activations.outliers import LEADING_TOKENS, limits_from, norms
from pipeline.activations.source import ActivationBatch, Provenance
from pipeline.activations.token_check import check_models_tokens
from pipeline.config.activation_source import Harvest
from pipeline.config.errors import UserError
from pipeline.contexts import Contexts, beginning_of_text
from pipeline.language_models import Models, each, hashes
from pipeline.tokens import TokenSet


class Harvested(NamedTuple):
    """A model batch's positions in the order of contexts and positions."""

    rows: ActivationBatch
    """Of all positions, those to be left out among them."""
    reasons_B: Tensor
    """uint8: the `Reason` for which each has no row."""


class Harvester:
    """Computes the rows of any generation. Raises `UserError` when token set, model and settings don't fit together.

    Where `settings` leave outliers out, `leave_out` has to say above which norms before the first row is asked for.
    """

    def __init__(self, tokens: TokenSet, model: Models, settings: Harvest, check_stop: Callable[[], None]) -> None:
        model.check_use(settings.layers, settings.context_tokens)
        beginning = beginning_of_text(settings.beginning_of_text, tokens)
        on_tokens = check_models_tokens(tokens, model, settings, beginning_of_text_id=beginning.token_id)
        self.remarks = [*model.remarks, *on_tokens, beginning.remark]
        """Sentences for the log."""
        self.tokens = tokens
        self.model = model
        self.settings = settings
        self.layers = settings.layers
        self.contexts = Contexts(tokens, settings.context_tokens, beginning_of_text_id=beginning.token_id)
        drop_positions = settings.drop_positions
        if beginning.token_id is not None and 0 not in drop_positions:
            drop_positions = [0, *drop_positions]  # it is no token of the text
        self.order = Order(self.contexts.lengths, settings, drop_positions=drop_positions)
        self.provenance = Provenance(
            model.hash, tokens.data_id, tokens.tokenizer_hash, settings.context_tokens, drop_positions, beginning.token_id, hashes(model),
            exclude_token_ids=sorted(settings.exclude_token_ids) or None,
        )  # fmt: skip
        self._check_stop = check_stop
        self._exclusion = Exclusion(settings.exclude_token_ids, None, model.device)
        self._check_token_ids()

    @property
    def row_shape(self) -> tuple[int, int]:
        """(L, D)"""
        return len(self.layers), self.model.d_model

    @property
    def exclusion(self) -> Exclusion:
        return self._exclusion

    def _check_token_ids(self) -> None:
        num_ids = min(model.vocab_size for model in each(self.model).values())
        for place, token_id in enumerate(self.settings.exclude_token_ids):
            if token_id >= num_ids:
                raise UserError(
                    f"exclude_token_ids[{place}] is {token_id:,}, but {self.model.name} has the ids 0 to {num_ids - 1:,}; "
                    "correct it or leave it out"
                )

    def leave_out(self, outlier_norms: list[float] | None) -> None:
        """Leaves out positions over these norms, a layer each, from now on; None leaves out none for its norm."""
        self.provenance = self.provenance._replace(outlier_norms=outlier_norms)
        self._exclusion = Exclusion(self.settings.exclude_token_ids, outlier_norms, self.model.device)

    def measured_norms(self, say: Callable[[str], None]) -> list[float] | None:
        """`outlier_norm_ratio` times each layer's median norm over the order's leading contexts; None where no outliers are left out.

        The median is of the positions that statistics count, excluded tokens not among them. What the limits leave out of these
        positions is said.
        """
        ratio = self.settings.outlier_norm_ratio
        if ratio is None:
            return None
        found, num_positions = list[Tensor](), 0
        exclusion = Exclusion(self.settings.exclude_token_ids, None, self.model.device)
        for batch in (batch for generation in range(self.order.num_generations) for batch in self.order.model_batches(generation)):
            self._check_stop()
            rows = self._rows_of(batch)
            _FiniteCheck.of(rows, self.layers, batch).raise_if_not_finite()
            found.append(norms(counted(rows, self.settings, exclusion.reasons(rows))))
            num_positions += len(found[-1])
            if num_positions >= LEADING_TOKENS:
                break
        if num_positions == 0:
            raise UserError(f"{self.settings.tokens} has no position left when those of exclude_token_ids are left out; exclude fewer ids")
        norms_NL = torch.cat(found).cpu()
        limits_L = limits_from(norms_NL, ratio)
        outlier_N = (norms_NL > limits_L).any(1)
        squares_NL = norms_NL.double().square()
        shares_L = (squares_NL[outlier_N].sum(0) / squares_NL.sum(0)).tolist()
        say(f"leading contexts: {left_out_for_norm(int(outlier_N.sum()), num_positions, shares_L, self.layers)}")
        return limits_L.tolist()

    def rows(self, generation: int) -> Iterator[Harvested]:
        """The generation's positions in the order of contexts and positions, a model batch at a time.

        Raises `UserError` at an activation that is not finite, at the latest when the iterator ends: the check of one
        model batch waits until the next is on its way, so that a GPU never runs dry.
        """
        pending: _FiniteCheck | None = None
        for batch in self.order.model_batches(generation):
            self._check_stop()
            rows = self._rows_of(batch)
            check = _FiniteCheck.of(rows, self.layers, batch)
            if pending is not None:
                pending.raise_if_not_finite()
            pending = check
            yield Harvested(rows, self._exclusion.reasons(rows))
        if pending is not None:
            pending.raise_if_not_finite()

    def _rows_of(self, batch: ModelBatch) -> ActivationBatch:
        read = self.contexts.read(batch.contexts_B)
        kept = self.order.kept_positions
        row_of_context, place = np.nonzero(np.arange(len(kept)) < batch.kept_B[:, None])
        cells_R = row_of_context * self.settings.context_tokens + kept[place]
        try:
            acts_BSLD = self.model.activations(self._to_device(read.tokens_BS), self.layers)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.model.device} has too little memory for {self.model.name} on {len(read.tokens_BS)} contexts at once; set "
                "model_batch_contexts or contexts_per_generation lower"
            ) from error
        return ActivationBatch(
            acts_BSLD.flatten(0, 1).index_select(0, self._to_device(cells_R)),
            self._to_device(read.tokens_BS.reshape(-1)[cells_R]),
            self._to_device(read.documents_BS.reshape(-1)[cells_R].astype(np.int64)),
            self._to_device(kept[place]),
        )

    def _to_device(self, values: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
        tensor = torch.from_numpy(values)
        if self.model.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.model.device, non_blocking=True)


class _FiniteCheck(NamedTuple):
    """Whether a model batch's activations are finite: computed on the device, looked at later."""

    finite_RL: Tensor
    rows: ActivationBatch
    layers: list[str]
    batch: ModelBatch

    @classmethod
    def of(cls, rows: ActivationBatch, layers: list[str], batch: ModelBatch) -> "_FiniteCheck":
        # The greatest magnitude of a row is NaN or infinite if any of its values is.
        return cls(rows.acts_BLD.abs().amax(-1).isfinite(), rows._replace(acts_BLD=rows.acts_BLD[:0]), layers, batch)

    def raise_if_not_finite(self) -> None:
        if bool(self.finite_RL.all()):
            return
        row, layer = (~self.finite_RL).nonzero()[0].tolist()
        context = int(self.batch.contexts_B[np.searchsorted(np.cumsum(self.batch.kept_B), row, side="right")])
        raise UserError(
            f"the activations of {self.layers[layer]} are not finite (NaN or infinite) in context {context:,}, position "
            f"{int(self.rows.positions_B[row])}, document {int(self.rows.documents_B[row]):,}: check the model's weights, "
            "or choose a dtype with a wider range (bfloat16 or float32)"
        )
