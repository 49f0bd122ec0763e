"""Functions whose forward pass is a step and whose gradient stands in for its derivative, which is zero almost everywhere.

Shapes: B positions in a batch, F features. The stand-in for the derivative of a step at a threshold is a rectangle of height
1 / bandwidth and width bandwidth around it (Rajamanoharan et al. 2024, "Jumping Ahead", section 4).

Each is its value plus a term that is zero and has the gradient: `x - x.detach()`.
"""

from torch import Tensor, where
from torch import relu as rectified


def leaky_gradient_relu(pre_BF: Tensor, share: float) -> Tensor:
    """relu(pre_BF); where pre_BF is negative its gradient is `share` of what comes in."""
    negative_BF = pre_BF.clamp(max=0.0)
    return rectified(pre_BF) + share * (negative_BF - negative_BF.detach())


def jump_relu(pre_BF: Tensor, threshold_F: Tensor, bandwidth: Tensor) -> Tensor:
    """pre_BF where it is above its threshold, else 0; the threshold gets -threshold / bandwidth within the window around it."""
    height_BF = _window(pre_BF, threshold_F, bandwidth) * (threshold_F.detach() / bandwidth).to(pre_BF.dtype)
    return where(pre_BF > threshold_F, pre_BF, 0.0) - height_BF * (threshold_F - threshold_F.detach()).to(pre_BF.dtype)


def step(pre_BF: Tensor, threshold_F: Tensor, bandwidth: Tensor) -> Tensor:
    """1 where pre_BF is above its threshold, else 0, float32; the threshold gets -1 / bandwidth within the window, pre_BF nothing."""
    height_BF = _window(pre_BF, threshold_F, bandwidth) / bandwidth
    return (pre_BF > threshold_F).float() - height_BF * (threshold_F - threshold_F.detach())


def _window(pre_BF: Tensor, threshold_F: Tensor, bandwidth: Tensor) -> Tensor:
    """1 where pre_BF is within half a bandwidth of its threshold, else 0; without a gradient."""
    return ((pre_BF - threshold_F).detach().abs() < bandwidth / 2).to(pre_BF.dtype)
