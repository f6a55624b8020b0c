"""Probes: a few stretches of the reduced gradients, to notice who changes them between backward() and step()."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .memory import dense_strides

LENGTH = 16384
"""Elements of a stretch: at 0.1 % some sixteen of them were sent, so that scaling shows as well as adding does."""
PER_BUCKET = 4
"""Parameters of a bucket that are looked at in one pass. What trainers do to gradients they do to all of them, and
what is done to one comes to light when its turn comes."""


class Probes:
    """Copies of stretches of the gradients that one backward pass has handed back."""

    def __init__(self) -> None:
        """Starts with none."""
        self._stretches: list[tuple[str, int, Tensor]] = []

    def take(self, names: Sequence[str], gradients: Sequence[Tensor], step: int) -> None:
        """Copies stretches of one bucket's compressed gradients.

        Args:
            names: of the parameters.
            gradients: theirs, flat, in the order in which they lie in memory.
            step: of this pass. Parameters and stretches take turns by it.
        """
        for turn in range(min(PER_BUCKET, len(names))):
            i = (step * PER_BUCKET + turn) % len(names)
            gradient = gradients[i]
            stretches = -(-gradient.numel() // LENGTH)
            start = (step % stretches) * LENGTH
            self._stretches.append((names[i], start, gradient[start : start + LENGTH].clone()))

    def compare(self, parameters: Mapping[str, Tensor], unscale: Tensor | None) -> tuple[list[str], Tensor | None]:
        """Compares the copies with what .grad holds now; on a GPU without waiting for it.

        Args:
            parameters: by name. Those without .grad are left out.
            unscale: float32 [1]: what a GradScaler may have multiplied gradients with.

        Returns:
            Names, and a bool for each on the device: whether its gradient has changed. None where there are none.
        """
        names, changed = [], []
        for name, start, before in self._stretches:
            now = _stretch(parameters[name], start, before.numel())
            if now is not None:
                same = _same(now, before)
                if unscale is not None:
                    same |= _same(now, (before.float() * unscale).to(before.dtype))
                names.append(name)
                changed.append(~same)
        return names, torch.stack(changed) if changed else None


def _stretch(p: Tensor, start: int, numel: int) -> Tensor | None:
    """Returns a stretch of a parameter's gradient in the order of memory; None where it has none, or another order."""
    grad = p.grad
    if grad is None or grad.layout != torch.strided or grad.shape != p.shape:
        return None
    if any(n > 1 and a != b for n, a, b in zip(p.shape, grad.stride(), dense_strides(p), strict=True)):
        return None
    return grad.detach().as_strided((numel,), (1,), grad.storage_offset() + start)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Returns whether all elements are equal, where NaN equals NaN: a bool scalar."""
    a = a.to(b.dtype)
    return ((a == b) | (a.isnan() & b.isnan())).all()
