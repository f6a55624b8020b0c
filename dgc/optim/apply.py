"""The application of updates: in one op where possible, and not at all where the device leaves the step out."""

from __future__ import annotations

from collections.abc import Iterable

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


def advance(us: list[Tensor], gradients: list[Tensor], mu: float, skip: Tensor | None, alpha: float = 1) -> None:
    """Advances momenta as torch.optim.SGD does, u <- mu*u + alpha*gradient, unless `skip` on the device is not 0."""
    if skip is None:
        _multiply(us, mu)
        if us:
            torch._foreach_add_(us, gradients, alpha=alpha)
        return
    for u, gradient in zip(us, gradients, strict=True):  # one by one: copies of all would need their memory again
        torch.where(skip != 0, u, u.mul(mu).add_(gradient, alpha=alpha), out=u)


def with_momentum(
    gradients: list[Tensor], us: list[Tensor | None], mu: float, nesterov: bool, skip: Tensor | None
) -> list[Tensor]:
    """Advances the momenta that there are, and returns the updates, which without momentum are the gradients."""
    both = [(u, gradient) for u, gradient in zip(us, gradients, strict=True) if u is not None]
    advance([u for u, _ in both], [gradient for _, gradient in both], mu, skip)
    return [
        gradient if u is None else gradient.add(u, alpha=mu) if nesterov else u
        for u, gradient in zip(us, gradients, strict=True)
    ]


def shrink(parameters: list[Tensor], factor: float, skip: Tensor | None) -> None:
    """Multiplies each parameter by a factor, unless `skip` on the device is not 0."""
    if skip is None:
        _multiply(parameters, factor)
        return
    for p in parameters:
        torch.where(skip != 0, p, p.mul(factor), out=p)


def _multiply(tensors: list[Tensor], factor: float) -> None:
    """Multiplies each tensor: all float32 ones at once, others one by one, since torch would round the factor too."""
    if together := [tensor for tensor in tensors if tensor.dtype == torch.float32]:
        # On the CPU it would make a tensor of the number for each multiplication. Not torch's default type and device.
        on_cpu = together[0].device.type == "cpu"
        torch._foreach_mul_(together, torch.tensor(factor, dtype=torch.float32, device="cpu") if on_cpu else factor)
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            tensor.mul_(factor)


def subtract(
    parameters: list[Tensor], updates: list[Tensor], lr: float, skip: Tensor | None, shrink: float = 1.0
) -> None:
    """Multiplies each parameter by `shrink` and subtracts lr * update, in one op where contiguous and float32."""
    together: list[Tensor] = []
    their_updates: list[Tensor] = []
    for p, update in zip(parameters, updates, strict=True):
        if p.dtype == update.dtype == torch.float32 and p.is_contiguous() and update.is_contiguous():
            together.append(p)
            their_updates.append(update)
            continue
        changed = p if skip is None else p.clone()
        if shrink != 1:
            changed.mul_(shrink)
        changed.add_(update, alpha=-lr)
        if skip is not None:  # the host does not wait to read it
            torch.where(skip != 0, p, changed, out=p)
    if together:
        ops.subtract_(together, their_updates, lr, shrink, skip)
