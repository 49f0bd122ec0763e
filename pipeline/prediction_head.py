"""A language model's head in float32: from the hidden states that it is given to logits.

Logits rounded to bfloat16 are off by up to 0.06 where they are 16 to 32: noise that a divergence between two runs counts as
difference. So the head's weights are cast to float32, and what the model does to the head's output is done in float32 too.

A head is taken apart only if a trial shows that this gives the model's own logits; models that do something else between the
head and the logits keep their own (`PredictionHead.is_exact` is false then).

Shapes: B contexts in a batch, S positions in a context, N positions, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import blocks

WEIGHTS_AT_A_TIME = 1 << 26
"""At most so many of the head's weights exist in float32 at once: 256 MiB."""

Processing = Callable[[Tensor], Tensor]
"""What a model does to the output of its head: elementwise."""


class PredictionHead:
    """The head of a model. Made by `of`."""

    def __init__(self, linear: nn.Linear | None, processing: Processing) -> None:
        self.linear = linear
        """The module whose input is read; None where it can't be taken apart."""
        self._processing = processing

    @classmethod
    def of(cls, model: Any) -> "PredictionHead":
        """The head of a Hugging Face causal language model, after a trial on a few tokens."""
        linear = model.get_output_embeddings()
        if isinstance(linear, nn.Linear):
            for processing in _declared(model):
                head = cls(linear, processing)
                if head._agrees_with(model):
                    return head
        return cls(None, _as_it_is)

    @property
    def is_exact(self) -> bool:
        """Whether logits come from float32 products; else they are the model's own, cast."""
        return self.linear is not None

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """logits_NV in float32 of what the head was given; of logits, where the head can't be taken apart, themselves."""
        if self.linear is None:
            return hidden_ND.float()
        weight_VD, bias_V = self.linear.weight, self.linear.bias
        out_NV = torch.empty(len(hidden_ND), len(weight_VD), dtype=torch.float32, device=hidden_ND.device)
        rows = max(1, WEIGHTS_AT_A_TIME // weight_VD.shape[1])
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(weight_VD), rows):
                part = slice(start, start + rows)
                bias = None if bias_V is None else bias_V[part].float()
                out_NV[:, part] = nn.functional.linear(hidden_ND.float(), weight_VD[part].float(), bias)
        return self._processing(out_NV)

    @torch.inference_mode()
    def _agrees_with(self, model: Any) -> bool:
        """Whether the head's own output, processed, is the model's logits, and this head gives nearly the same from its input."""
        assert self.linear is not None
        seen: list[tuple[Tensor, Tensor]] = []
        hook = self.linear.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
        try:
            tokens_1S = torch.arange(min(8, self.linear.out_features), device=self.linear.weight.device)[None]
            logits_1SV = blocks.run(model, tokens_1S, {}).logits
        finally:
            hook.remove()
        if len(seen) != 1 or seen[0][0].dim() != 3 or seen[0][1].shape != logits_1SV.shape:
            return False
        hidden_1SD, output_1SV = seen[0]
        exact = self._processing is _as_it_is
        allowed = 0.0 if exact else 4 * torch.finfo(output_1SV.dtype).eps
        if _relative_difference(self._processing(output_1SV.float()), logits_1SV.float()) > allowed:
            return False
        rounding = max(1e-4, 4 * torch.finfo(output_1SV.dtype).eps)
        return _relative_difference(self.logits(hidden_1SD[0]), logits_1SV[0].float()) <= rounding


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _as_it_is(logits: Tensor) -> Tensor:
    return logits


def _declared(model: Any) -> list[Processing]:
    """What a model of this configuration may do to the output of its head, most particular first; nothing, last."""
    config = model.config.get_text_config()

    def value(*names: str) -> float | None:
        found = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
        return float(found) if isinstance(found, int | float) and found not in (0, 1) else None

    declared: list[Processing] = []
    # Gemma 2 and later, RecurrentGemma, xLSTM: the cap is invisible in a trial of small logits, so what is declared goes first.
    if (cap := value("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")) is not None:
        declared.append(lambda logits: torch.tanh(logits / cap) * cap)
    if (scale := value("logit_scale")) is not None:  # Cohere
        declared.append(lambda logits: logits * scale)
    if (divisor := value("logits_scaling")) is not None:  # Granite
        declared.append(lambda logits: logits / divisor)
    return [*declared, _as_it_is]
