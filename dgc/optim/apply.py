"""The application of updates: in one op where possible, and not at all where the device leaves the step out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from dgc import ops
from dgc.local import gradient_of


def all_zero(parameters: Iterable[Tensor]) -> bool:
    """Returns whether no parameter has a gradient other than zero, so that step() has nothing to apply.

    hvd.broadcast_optimizer_state() calls step() with such gradients, to create the state that it broadcasts.
    """
    gradients = map(gradient_of, parameters)
    return not any(bool(gradient.any()) for gradient in gradients if gradient is not None)


def advance(u: Tensor, gradient: Tensor, mu: float, alpha: float = 1) -> None:
    """Advances a momentum, as torch.optim.SGD does: u <- mu*u + alpha*gradient."""
    u.mul_(mu).add_(gradient, alpha=alpha)


def subtract(
    parameters: list[Tensor], updates: list[Tensor], lr: float, skip: Tensor | None, shrink: float = 1.0
) -> None:
    """Multiplies each parameter by `shrink` and subtracts lr * update, in one op where contiguous and float32."""

    def change(parameter: Tensor, update: Tensor) -> None:
        if shrink != 1:
            parameter.mul_(shrink)
        parameter.add_(update, alpha=-lr)

    together: list[Tensor] = []
    their_updates: list[Tensor] = []
    for p, update in zip(parameters, updates, strict=True):
        if p.dtype == update.dtype == torch.float32 and p.is_contiguous() and update.is_contiguous():
            together.append(p)
            their_updates.append(update)
        else:
            unless(skip, p, partial(change, update=update))
    if together:
        ops.subtract_(together, their_updates, lr, shrink, skip)


def unless(skip: Tensor | None, tensor: Tensor, change: Callable[[Tensor], object]) -> None:
    """Changes a tensor in place, unless `skip` on the device is not 0; the host does not wait to read it."""
    if skip is None:
        change(tensor)
        return
    changed = tensor.clone()
    change(changed)
    torch.where(skip != 0, tensor, changed, out=tensor)
