"""Probes: samples of the reduced gradients, which show whether these are changed or zeroed before step()."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dgc.local import gradient_of, local
from dgc.memory.slots import Slot, has_strides

LENGTH = 16384
"""Number of elements in a stretch. At density 0.1 % about sixteen of them are sent: scaling shows only in these."""
PER_BUCKET = 4
"""Number of a bucket's parameters that are compared in one pass. Trainers usually change all gradients, and a change of
a single one shows when its turn comes."""


class Probes:
    """Samples of the gradients that one backward pass handed back: an element of each, and a stretch of some.

    The stretches show whether a gradient was changed. A gradient that is all zeros was thrown away if its sampled
    element was not zero.
    """

    def __init__(self, stretches: bool) -> None:
        """Starts without samples.

        Args:
            stretches: whether changes are looked for.
        """
        self._with_stretches = stretches
        self._stretches: list[tuple[Slot, int, Tensor]] = []
        self._witnesses: list[tuple[Sequence[Slot], Tensor, Tensor]] = []

    def take(
        self, slots: Sequence[Slot], gradients: Sequence[Tensor], witnesses: tuple[Tensor, Tensor], step: int
    ) -> None:
        """Samples one bucket's compressed gradients.

        Args:
            slots: of the parameters.
            gradients: of the parameters, flat, in the order of their memory.
            witnesses: index of an element of each, int64 [slots], and whether it is not zero, bool [slots].
            step: number of this pass, by which parameters and stretches take turns.
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
        """Returns which gradients are all zeros now, and were not before; on a GPU without waiting for the device.

        Args:
            parameters: by name. Those without .grad are left out.

        Returns:
            Bool scalars on the device, by name, for the gradients that may be.
        """
        found: dict[str, Tensor] = {}
        for slots, first, nonzero in self._witnesses:
            stretches = {i: _stretch(parameters[slot.name], slot, 0, slot.numel) for i, slot in enumerate(slots)}
            flat = {i: gradient for i, gradient in stretches.items() if gradient is not None}
            if first.is_cuda:
                if not flat:
                    continue
                # All of it: which element to look at is known to the device alone. In few launches for all of them.
                norms = torch.stack(torch._foreach_norm(list(flat.values()), torch.inf))
                marked = nonzero if len(flat) == len(slots) else nonzero[list(flat)]
                found.update(zip((slots[i].name for i in flat), ((norms == 0) & marked).unbind(), strict=True))
                continue
            elements, marks = first.tolist(), nonzero.tolist()
            for i, gradient in flat.items():
                if marks[i] and not gradient[elements[i]] and not gradient.any():
                    found[slots[i].name] = nonzero[i]
        return found

    def compare(self, parameters: Mapping[str, Tensor], unscale: Tensor | None) -> dict[str, Tensor]:
        """Compares the stretches with the present .grad; on a GPU without waiting for the device.

        Args:
            parameters: by name. Those without .grad are left out.
            unscale: float32 [1]: the factor by which a GradScaler may have multiplied gradients; None for 1.

        Returns:
            Bool scalars on the device, by name, for the gradients that were compared: whether they have changed.
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
    grad = gradient_of(p)
    if grad is None or grad.layout != torch.strided or grad.shape != local(p).shape:
        return None
    grad = slot.part(grad)
    if not has_strides(grad, slot.strides):
        return None
    return grad.detach().as_strided((numel,), (1,), grad.storage_offset() + start)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Returns whether all elements are equal, where NaN equals NaN: a bool scalar."""
    a = a.to(b.dtype)
    return ((a == b) | (a.isnan() & b.isnan())).all()
