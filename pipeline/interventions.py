"""Changes to a language model's run: what takes the place of a layer's activations, and where.

An intervention maps the activations that a block gave to those that the next one gets; `LanguageModel.logits` applies one a
layer. Position 0 of a context (whose norm is many times the others') and padding are left as they are, by everything here.

Where every position from 1 on of a layer's residual stream is replaced, no replacement at an earlier layer can reach beyond it.
So replacing several layers together gives the cross-entropy of replacing the last of them alone, as long as replacements come
from one clean run.

B contexts in a batch, S positions in a context, N chosen positions, L layers, D model width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.language_model import LanguageModel

Intervention = Callable[[Tensor], Tensor]
"""acts_BSD to acts_BSD; it must not change what it is given."""


class CleanRun(NamedTuple):
    """What the unchanged model gives for some contexts."""

    hidden_BSD: Tensor
    """What its head is given; `LanguageModel.head` makes logits of chosen positions."""
    acts_BSLD: Tensor


def clean_run(language_model: LanguageModel, tokens_BS: Tensor, layers: Sequence[str], *, cache: Any = None) -> CleanRun:
    """The last hidden states and the activations of `layers`, from one forward pass; with a `cache` the tokens go on from those in it."""
    read: dict[str, Tensor] = {}

    def reader(layer: str) -> Intervention:
        def read_acts(acts_BSD: Tensor) -> Tensor:
            # A copy, since a later block may add to the residual stream in place.
            read[layer] = acts_BSD.clone()
            return acts_BSD

        return read_acts

    hidden_BSD = language_model.before_head(tokens_BS, {layer: reader(layer) for layer in layers}, cache=cache)
    # In the dtype in which they are trained on: Mamba's blocks give float32 whatever the model's dtype is.
    return CleanRun(hidden_BSD, torch.stack([read[layer] for layer in layers], dim=2).to(language_model.dtype))


def replaceable(lengths_B: Tensor, context_tokens: int) -> Tensor:
    """replaced_BS: true from position 1 to the end of each context, false at position 0 and in the padding after it."""
    position_S = torch.arange(context_tokens, device=lengths_B.device)
    return (position_S >= 1) & (position_S < lengths_B[:, None])


def put(values: Tensor, replaced_BS: Tensor) -> Intervention:
    """Puts `values` in place of the activations where `replaced_BS` is true.

    Either values_ND, a row for each true position in the order of `acts_BSD[replaced_BS]`, or one vector [D], or a scalar.
    """

    def intervene(acts_BSD: Tensor) -> Tensor:
        changed_BSD = acts_BSD.clone()
        changed_BSD[replaced_BS] = values.to(acts_BSD)
        return changed_BSD

    return intervene


def zero(replaced_BS: Tensor) -> Intervention:
    """Zero ablation."""
    return put(torch.zeros(()), replaced_BS)
