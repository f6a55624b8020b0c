"""How updates are applied: in one op where it can, and not at all where the device says that the step is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from dgc import ops


def all_zero(gradients: Iterable[Tensor]) -> bool:
    """Returns whether there is nothing to apply, and so nothing that DGC could have missed.

    hvd.broadcast_optimizer_state() steps on such gradients, to have the state made that it broadcasts then.
    """
    return not any(bool(gradient.any()) for gradient in gradients)


def advance(u: Tensor, gradient: Tensor, mu: float, alpha: float = 1) -> None:
    """Advances a momentum, as torch.optim.SGD does: u <- mu*u + alpha*gradient."""
    u.mul_(mu).add_(gradient, alpha=alpha)


def subtract(parameters: list[Tensor], updates: list[Tensor], lr: float, skip: Tensor | None) -> None:
    """Takes lr * update off each parameter, together where the op can."""
    together: list[Tensor] = []
    their_updates: list[Tensor] = []
    for p, update in zip(parameters, updates, strict=True):
        if p.dtype == update.dtype == torch.float32 and p.is_contiguous() and update.is_contiguous():
            together.append(p)
            their_updates.append(update)
        else:
            unless(skip, p, partial(torch.Tensor.add_, other=update, alpha=-lr))
    if together:
        ops.subtract_(together, their_updates, lr, skip)


def unless(skip: Tensor | None, tensor: Tensor, change: Callable[[Tensor], object]) -> None:
    """Changes a tensor in place, unless the device says that this step is to be skipped; the host never knows."""
    if skip is None:
        change(tensor)
        return
    changed = tensor.clone()
    change(changed)
    torch.where(skip != 0, tensor, changed, out=tensor)
