"""What is done about the size of gradients, without the device being waited for."""

import torch
from torch import Tensor, nn

from pipeline.config.train_crosscoder import AbsoluteClipping, ClippingConfig, NoClipping, NormalizedGradient, RelativeClipping
from pipeline.crosscoder.running_mean import update_running_mean


class Clipping(nn.Module):
    """Scales gradients to norm 1, or to a largest norm. Buffers: the running mean of norms that the relative kind is measured by."""

    mean_norm: Tensor
    num_updates: Tensor

    def __init__(self, settings: ClippingConfig) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("mean_norm", torch.zeros(()))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def clip(self, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """The norm of all gradients together before clipping, and whether it was over the limit; float32 scalars."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(self.settings, NormalizedGradient):
            torch._foreach_mul_(gradients, 1.0 / norm.clamp(min=torch.finfo(torch.float32).tiny))
            return norm, torch.zeros_like(norm)
        limit = self._limit(norm)
        if limit is None:
            return norm, torch.zeros_like(norm)
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
        if isinstance(self.settings, RelativeClipping):
            update_running_mean(self.mean_norm, self.num_updates, torch.minimum(norm, limit), self.settings.momentum)
        return norm, (norm > limit).float()

    def _limit(self, norm: Tensor) -> Tensor | None:
        if isinstance(self.settings, NoClipping | NormalizedGradient):
            return None
        if isinstance(self.settings, AbsoluteClipping):
            return torch.full_like(norm, self.settings.norm)
        # The first gradient has nothing to be measured by.
        return torch.where(self.num_updates > 0, self.settings.factor * self.mean_norm, norm)
