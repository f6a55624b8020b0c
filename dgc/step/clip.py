"""Local gradient clipping (paper, section 3.2), for gradients that are means over each rank's own batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def squared_norm(gradient: Tensor) -> Tensor:
    """Returns the sum of squares of a gradient's finite entries: a float64 scalar.

    One Inf among the entries would otherwise scale all the others to zero.
    """
    if gradient.is_cuda:  # a test for Inf and NaN would wait for the device
        gradient = gradient.nan_to_num(0, 0, 0)
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    if not gradient.is_cuda and not norm.isfinite():
        norm = torch.linalg.vector_norm(gradient.nan_to_num(0, 0, 0), dtype=torch.float64)
    return norm * norm


def clip_scale(
    squared_norms: Tensor, clip_norm: float, world_size: int, most: float = 1.0, unscale: Tensor | None = None
) -> Tensor:
    """Returns the factor for this rank's gradients, min(most, sqrt(N) * clip_norm / norm) * unscale: float32 [1].

    The paper scales the threshold by N^-1/2, for gradients that are already divided by N. Ours are local means, N times
    as large, so the threshold is scaled by N^1/2. N such gradients of independent samples average to a norm of about
    clip_norm.

    Args:
        squared_norms: float64 [parameters], in the model's order, so that their sum has the same bits for any buckets.
        clip_norm: the threshold for one worker.
        world_size: N.
        most: the factor without clipping: 1, or N where the update is the sum over the ranks.
        unscale: float32 [1], the inverse of the loss scale that the gradients still carry; None for 1.
    """
    norm = squared_norms.cumsum(0)[-1].sqrt()  # cumsum: one after the other, in order
    if unscale is not None:
        norm = norm * unscale.double()
    scale: Tensor = (math.sqrt(world_size) * clip_norm / norm).clamp(max=most).to(torch.float32).view(1)
    return scale if unscale is None else scale * unscale
