"""Runs of one language model on a batch with activations replaced, and how what is replaced is named where there are several models.

B contexts in a batch, S positions in a context, N positions that are replaced, D model width.
"""

from torch import Tensor

from pipeline.config.sites import SiteName
from pipeline.evaluation.held_out import HeldOutBatch
from pipeline.evaluation.predictions import ReplacedPredictions, Stand
from pipeline.interventions import put
from pipeline.language_model import LanguageModel
from pipeline.language_models import in_its_model
from pipeline.run import Run


class Splicing:
    """Runs of a language model on one batch with activations replaced, at sites of its own."""

    def __init__(
        self, language_model: LanguageModel, predictions: ReplacedPredictions, batch: HeldOutBatch, replaced_BS: Tensor, run: Run
    ) -> None:
        self._language_model, self._predictions, self._batch, self._run = language_model, predictions, batch, run
        self._replaced_BS = replaced_BS
        self._counted_BS = batch.counted_BS & replaced_BS

    def begin(self, clean_BSD: Tensor) -> None:
        """Takes the clean run's last hidden states."""
        self._predictions.begin(clean_BSD[self._counted_BS], self._batch.targets_BS[self._counted_BS])

    def alone(self, stand: Stand, values_ND: Tensor) -> None:
        """Replaces one layer at every position that counts."""
        self._add(stand, {stand.layer: (values_ND, self._replaced_BS)})

    def split(self, stand: Stand, values: dict[str, Tensor], parts_BS: Tensor) -> None:
        """Replaces each layer at its own part of the positions."""
        parts_N = parts_BS[self._replaced_BS]
        at = {layer: self._replaced_BS & (parts_BS == part) for part, layer in enumerate(values)}
        self._add(stand, {layer: (values[layer][parts_N == part], at[layer]) for part, layer in enumerate(values)})

    def _add(self, stand: Stand, values: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._run.check_stop()
        replace = {in_its_model(layer): put(values_ND, where_BS) for layer, (values_ND, where_BS) in values.items()}
        hidden_BSD = self._language_model.before_head(self._batch.tokens_BS, replace)
        self._predictions.add(stand, hidden_BSD[self._counted_BS])


def of_model(name: str, what: str) -> str:
    """`what`, a name that stands in place of a layer, of the model called `name`."""
    return f"{name}/{what}" if name else what


def model_of(layer: str) -> str:
    """The name of the model that a layer, or what stands in its place, is of."""
    return SiteName.parse(layer).model
