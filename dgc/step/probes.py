"""Probes: what is remembered of the reduced gradients, to notice who changes or zeroes them before step()."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dgc.memory.slots import Slot, has_strides

LENGTH = 16384
"""Elements of a stretch: at 0.1 % some sixteen of them were sent, so that scaling shows as well as adding does."""
PER_BUCKET = 4
"""Parameters of a bucket that are looked at in one pass. What trainers do to gradients they do to all of them, and
what is done to one comes to light when its turn comes."""


class Probes:
    """What one backward pass has handed back: of every gradient one element, of some a stretch.

    A changed gradient is looked for in the stretches. A gradient of zeros has been thrown away where the one element
    was not zero.
    """

    def __init__(self, stretches: bool) -> None:
        """Starts with nothing.

        Args:
            stretches: whether changes are looked for.
        """
        self._with_stretches = stretches
        self._stretches: list[tuple[Slot, int, Tensor]] = []
        self._witnesses: list[tuple[Sequence[Slot], Tensor, Tensor]] = []

    def take(
        self, slots: Sequence[Slot], gradients: Sequence[Tensor], witnesses: tuple[Tensor, Tensor], step: int
    ) -> None:
        """Remembers one bucket's compressed gradients.

        Args:
            slots: of the parameters.
            gradients: theirs, flat, in the order in which they lie in memory.
            witnesses: an element of each, int64 [slots], and whether it is not zero, bool [slots].
            step: of this pass. Parameters and stretches take turns by it.
        """
        self._witnesses.append((slots, *witnesses))
        if not self._with_stretches:
            return
        for turn in range(min(PER_BUCKET, len(slots))):
            i = (step * PER_BUCKET + turn) % len(slots)
            gradient = gradients[i]
            stretches = -(-gradient.numel() // LENGTH)
            start = (step % stretches) * LENGTH
            self._stretches.append((slots[i], start, gradient[start : start + LENGTH].clone()))

    def zeroed(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns which gradients consist of zeros now, and did not before; on a GPU without waiting for it.

        Args:
            parameters: by name. Those without .grad are left out.

        Returns:
            By name, for those that may: a bool scalar on the device.
        """
        found: dict[str, Tensor] = {}
        for slots, first, nonzero in self._witnesses:
            stretches = {i: _stretch(parameters[slot.name], slot, 0, slot.numel) for i, slot in enumerate(slots)}
            flat = {i: gradient for i, gradient in stretches.items() if gradient is not None}
            if first.is_cuda:
                # All of it: which element to look at is known to the device alone.
                for i, norm in zip(flat, torch._foreach_norm(list(flat.values()), torch.inf), strict=True):
                    found[slots[i].name] = (norm == 0) & nonzero[i]
                continue
            elements, marks = first.tolist(), nonzero.tolist()
            for i, gradient in flat.items():
                if marks[i] and not gradient[elements[i]] and not gradient.any():
                    found[slots[i].name] = nonzero[i]
        return found

    def compare(self, parameters: Mapping[str, Tensor], unscale: Tensor | None) -> dict[str, Tensor]:
        """Compares the stretches with what .grad holds now; on a GPU without waiting for it.

        Args:
            parameters: by name. Those without .grad are left out.
            unscale: float32 [1]: what a GradScaler may have multiplied gradients with.

        Returns:
            By name, for those that were looked at: whether the gradient has changed, a bool scalar on the device.
        """
        changed: dict[str, Tensor] = {}
        for slot, start, before in self._stretches:
            now = _stretch(parameters[slot.name], slot, start, before.numel())
            if now is not None:
                same = _same(now, before)
                if unscale is not None:
                    same |= _same(now, (before.float() * unscale).to(before.dtype))
                changed[slot.name] = ~same
        return changed


def _stretch(p: Tensor, slot: Slot, start: int, numel: int) -> Tensor | None:
    """Returns a stretch of a parameter's gradient in the order of memory; None where it has none, or another order."""
    grad = p.grad
    if grad is None or grad.layout != torch.strided or tuple(grad.shape) != slot.shape:
        return None
    if not has_strides(grad, slot.strides):
        return None
    return grad.detach().as_strided((numel,), (1,), grad.storage_offset() + start)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Returns whether all elements are equal, where NaN equals NaN: a bool scalar."""
    a = a.to(b.dtype)
    return ((a == b) | (a.isnan() & b.isnan())).all()
