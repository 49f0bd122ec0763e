"""The tokens that a direction of the residual stream promotes and suppresses: the logit lens (nostalgebraist 2020) on decoders.

The direction goes through the model's last norm and its unembedding: what the model would predict if the stream held nothing else.
Of the norm the part that is odd in the direction is taken, so that its bias doesn't count; a direction's length doesn't count either.

Shapes: F directions, D model width, V vocabulary, K tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.language_model import LanguageModel

NUMBERS_AT_A_TIME = 1 << 26


class LensTokens(NamedTuple):
    """Token ids and what they gain, float32."""

    promoted_FK: Tensor
    promoted_logits_FK: Tensor
    suppressed_FK: Tensor
    suppressed_logits_FK: Tensor


class LogitLens:
    """The unembedding of a language model; `unembedding_VD` is None for a model whose head is not one matrix."""

    def __init__(self, language_model: LanguageModel, vocab_size: int) -> None:
        """vocab_size : rows of the unembedding beyond the tokenizer's vocabulary stand for no token and are left out."""
        head = language_model.model.get_output_embeddings()
        is_matrix = isinstance(head, nn.Linear) and head.weight.shape[1] == language_model.d_model
        self.unembedding_VD: Tensor | None = head.weight[:vocab_size].float() if is_matrix else None
        self.norm = _last_norm(language_model)

    @torch.inference_mode()
    def tokens(self, directions_FD: Tensor, count: int) -> LensTokens:
        """The `count` tokens most promoted, and most suppressed, by each direction, the strongest first."""
        assert self.unembedding_VD is not None
        rows = max(1, NUMBERS_AT_A_TIME // len(self.unembedding_VD))
        count = min(count, len(self.unembedding_VD))
        found = []
        for part_FD in torch.split(directions_FD, rows):
            logits_FV = self.normed(part_FD) @ self.unembedding_VD.T
            most, least = logits_FV.topk(count), (-logits_FV).topk(count)
            found.append((most.indices, most.values, least.indices, -least.values))
        return LensTokens(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def normed(self, directions_FD: Tensor) -> Tensor:
        """The directions behind the last norm, float32; as they are but for their length in a model without one."""
        unit_FD: Tensor = nn.functional.normalize(directions_FD.float(), dim=-1) * directions_FD.shape[1] ** 0.5
        if self.norm is None:
            return unit_FD
        dtype = next(self.norm.parameters()).dtype
        odd_FD: Tensor = (self.norm(unit_FD.to(dtype)).float() - self.norm(-unit_FD.to(dtype)).float()) / 2
        return odd_FD


def _last_norm(language_model: LanguageModel) -> Any:
    """The last norm of the model's width outside its blocks, by the names that models give; None where there is none."""
    found = None
    for name, module in language_model.model.named_modules():
        weight = getattr(module, "weight", None)
        outside = not any(name == block or name.startswith(f"{block}.") for block in language_model.block_names)
        is_norm = "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.shape == (language_model.d_model,)
        found = module if outside and is_norm else found
    return found
