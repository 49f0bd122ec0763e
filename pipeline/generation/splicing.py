"""A crosscoder spliced into a language model's pass: layers replaced by their reconstruction, or features edited in them.

A crosscoder reads several layers at once, so what it makes of an early one needs what a later one would have been. Two ways to have it:

    clean      features are read from a pass over the same text in which nothing is changed. All layers' changes follow from the
               same features, however they act on one another.
    spliced    features are read again at every layer that is changed: from what the changed pass gave there and at the layers before
               it, each before its own change, and for layers to come from the clean pass. At the first layer that is changed this is
               the same as `clean` as long as the text before was changed nowhere; at the last, nothing comes from the clean pass.

Of a crosscoder of several language models one writes, and its layers alone are changed; the others read the same text unchanged.

Shapes: N positions that a pass reads, L layers, D model width, F features, K edited features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.errors import UserError
from pipeline.config.generate_text import EncodeFrom
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.crosscoder.folding import Folded, fold
from pipeline.generation.editing import Edit
from pipeline.language_model import Replacements
from pipeline.language_models import in_its_model, sites_of


@dataclass(frozen=True)
class Intervention:
    """What is done to a pass."""

    layers: Sequence[str]
    """Where; names among the crosscoder's layers."""
    edit: Edit | None = None
    keep_error: bool = True
    """Whether an edit is added to the activation; without, and where there is no edit, the reconstruction takes the activation's place."""
    first_position: int = 1
    """Positions before it stay as they are. Position 0 always does."""
    encode_from: EncodeFrom = "clean"


class Splicer:
    """A trained crosscoder as it is spliced into passes: normalization and parameterization are folded in once, on raw activations."""

    def __init__(self, trained: TrainedCrosscoder, written_by: str = "") -> None:
        """written_by : the name of the model whose passes are changed, where there are several."""
        self._of_writer = set(sites_of(written_by, trained.layers))
        self.layers = trained.layers
        self.num_features = trained.num_features
        device = trained.normalizer.scale_L.device
        self._folded = Folded(*(None if part is None else part.to(device) for part in fold(trained.crosscoder, trained.normalizer)))  # type: ignore[arg-type]
        groups = trained.crosscoder.groups
        written = [layer for number, layer in enumerate(self.layers) if groups is None or bool(groups.written_L[number])]
        self.written = [layer for layer in written if layer in self._of_writer]
        """The layers that some feature writes, of the model that writes: those that can be changed."""

    def check(self, layers: Sequence[str], features: Sequence[int] = (), *, field: str = "layers") -> None:
        """Raises `UserError` for a layer that the crosscoder doesn't write and for a feature that it doesn't have."""
        for layer in layers:
            if layer not in self.written:
                elsewhere = "has in a model that only reads" if layer in self.layers else "doesn't know"
                does = "reads but doesn't write" if layer in self._of_writer else elsewhere
                raise UserError(f"{field} names {layer}, which the crosscoder {does}; name {' or '.join(self.written)}")
        for feature in features:
            if not 0 <= feature < self.num_features:
                raise UserError(f"feature {feature:,} is none of the crosscoder's, which has features 0 to {self.num_features - 1:,}")

    def replacements(self, intervention: Intervention, clean_acts_NLD: Tensor, first: int) -> Replacements:
        """By the layer's name in its model, what a changed pass over the positions from `first` on is to give in place of its activations.

        clean_acts_NLD : of the same positions, in the language model's dtype.
        """
        pass_ = _ChangedPass(self._folded, self.layers, intervention, clean_acts_NLD, first)
        # A layer that is not changed needs to be read only where features are read from what the changed pass gives.
        touched = self.layers if intervention.encode_from == "spliced" else intervention.layers
        here = self._of_writer.intersection(touched)
        return {in_its_model(layer): pass_.at(number) for number, layer in enumerate(self.layers) if layer in here}


class _ChangedPass:
    """One changed pass: what it has read so far, and what it puts in place."""

    def __init__(self, folded: Folded, layers: Sequence[str], intervention: Intervention, clean_acts_NLD: Tensor, first: int) -> None:
        self._folded, self._intervention = folded, intervention
        self._dtype = clean_acts_NLD.dtype
        self._is_changed_L = [layer in intervention.layers for layer in layers]
        self._read_NLD = clean_acts_NLD.float().clone()
        positions_N = torch.arange(first, first + len(clean_acts_NLD), device=clean_acts_NLD.device)
        self._stays_N1 = (positions_N < max(1, intervention.first_position))[:, None]
        self._features_NF: Tensor | None = None

    def at(self, layer: int) -> "_AtLayer":
        return _AtLayer(self, layer)

    def change(self, acts_1ND: Tensor, layer: int) -> Tensor:
        """What takes the place of the activations that the pass gave at `layer`."""
        if self._intervention.encode_from == "spliced":
            # In the dtype in which the crosscoder was trained on them: Mamba's blocks give float32 whatever the model's dtype is.
            self._read_NLD[:, layer] = acts_1ND[0].to(self._dtype).float()
            self._features_NF = None
        if not self._is_changed_L[layer]:
            return acts_1ND
        if self._features_NF is None:
            self._features_NF = self._folded.encode(self._read_NLD)
        acts_ND = acts_1ND[0]
        return torch.where(self._stays_N1, acts_ND, self._changed(acts_ND, self._features_NF, layer).to(acts_ND))[None]

    def _changed(self, acts_ND: Tensor, features_NF: Tensor, layer: int) -> Tensor:
        edit = self._intervention.edit
        if edit is not None and self._intervention.keep_error:
            base_ND = acts_ND.float()
        else:
            base_ND = self._folded.decode(features_NF, self._read_NLD)[:, layer]
        if edit is None:
            return base_ND
        return base_ND + edit.change(features_NF) @ self._folded.W_dec_FLD[list(edit.features), layer]


class _AtLayer:
    """The changed pass at one layer, as `LanguageModel.before_head` calls it."""

    def __init__(self, changed_pass: _ChangedPass, layer: int) -> None:
        self._pass, self._layer = changed_pass, layer

    def __call__(self, acts_1ND: Tensor) -> Tensor:
        return self._pass.change(acts_1ND, self._layer)
