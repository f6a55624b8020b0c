"""Dense: the half of a bucket that is averaged uncompressed, over the same exchange."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dgc.memory.memory import Memory
from dgc.memory.slots import Gradients, Slot

from .rounding import Rounding

NOT_FINITE = 2
"""Bit of a report's last number: an average of dense gradients is not finite."""


class Dense:
    """The dense gradients of a bucket, averaged in one tensor of their own, or in place.

    The rule's tensors of parameters that were compressed until now differ between ranks, and are averaged with them.
    """

    def __init__(
        self,
        gradients: Gradients,
        members: Sequence[int],
        memory: Memory,
        reducible: Collection[torch.dtype],
        wire_dtype: torch.dtype,
    ) -> None:
        """Lays out what travels.

        Args:
            gradients: the bucket, of which only sizes and places are used.
            members: positions of the dense gradients in the bucket.
            memory: the rule's tensors.
            reducible: dtypes that the all-reduce takes; float32 travels where it does not take `wire_dtype`.
            wire_dtype: type in which float32 gradients travel.
        """
        self._members = members
        self.slots: list[Slot] = [gradients.slots[i] for i in members]
        self.averaged = [slot for slot in self.slots if slot.name in memory.diverged]
        """Slots whose tensors of the rule are averaged too."""
        self._kinds = tuple(memory.kinds) if self.averaged else ()
        self._numel = sum(slot.numel for slot in self.slots)
        dtypes = {gradients.buffers[gradients.places[i][0]].dtype for i in members}
        one_type = len(dtypes) == 1 and dtypes.issubset(reducible)
        # The rule's tensors are float32, and are averaged in float32.
        self._dtype = next(iter(dtypes)) if one_type and not self.averaged else torch.float32
        if self._dtype == torch.float32 and not self.averaged and wire_dtype in reducible:
            self._dtype = wire_dtype
        first = gradients.buffers[0]
        everything = len(members) == len(gradients.slots) and first.numel() == self._numel
        self._flat: Tensor | None = None  # None: in place
        self._rounding: Rounding | None = None
        if not (everything and one_type and dtypes == {self._dtype} and not self.averaged):
            size = self._numel + len(self._kinds) * sum(slot.numel for slot in self.averaged)
            self._flat = torch.empty(size, dtype=self._dtype, device=gradients.buffers[0].device)
            if self._dtype not in dtypes and self._dtype != torch.float32:
                self._rounding = Rounding(self.slots, memory, self._dtype, first.device)
        self.nonfinite: list[str] = []
        """Names of parameters whose last average was not finite; filled on the CPU only."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor that is all-reduced."""
        return (self._numel if self._flat is None else self._flat.numel()) * self._dtype.itemsize

    def load(self, gradients: Gradients, memory: Memory, scale: Tensor | None) -> Tensor:
        """Returns the tensor to average over the ranks: gradients, then the rule's tensors of `averaged`.

        Args:
            gradients: the bucket.
            memory: the rule's tensors.
            scale: float32 [1], the factor by which gradients are multiplied first; None for 1.
        """
        flat = gradients.buffers[0].view(-1) if self._flat is None else self._flat
        if self._rounding is not None:
            exact = torch.cat([gradients.of(i).float() for i in self._members])
            flat.copy_(self._rounding.round(exact if scale is None else exact.mul_(scale), memory))
            return flat
        if self._flat is not None:
            torch.cat([gradients.of(i).to(flat.dtype) for i in self._members], out=flat[: self._numel])
        if scale is not None:
            flat[: self._numel].mul_(scale)
        at = self._numel
        for kept in self._kept(memory):
            flat[at : at + kept.numel()].copy_(kept)
            at += kept.numel()
        return flat

    def store(self, gradients: Gradients, memory: Memory, loss_scale: Tensor | None, report: Tensor) -> None:
        """Writes the averages back, times the loss scale, and reports whether one is not finite.

        Args:
            gradients: the bucket.
            memory: the rule's tensors; those of `averaged` become equal on all ranks.
            loss_scale: float32 [1]; None for 1.
            report: int32 [1], the bucket's last number.
        """
        flat = gradients.buffers[0].view(-1) if self._flat is None else self._flat
        if self._rounding is not None:
            flat = flat.float()  # a loss scale may take it out of float16's range
        self.nonfinite = []
        if loss_scale is not None:
            flat[: self._numel].mul_(loss_scale)
        if flat.numel() > 0:
            low, high = flat.aminmax()  # one pass; both are NaN if any entry is
            report |= NOT_FINITE * ~(low.isfinite() & high.isfinite())
        if not flat.is_cuda and int(report) & NOT_FINITE:
            ends = accumulate(slot.numel for slot in self.slots)
            parts = zip(self.slots, flat[: self._numel].tensor_split(list(ends)), strict=False)
            self.nonfinite = [slot.name for slot, part in parts if not part.isfinite().all()]
        if self._flat is not None:
            at = 0
            for i in self._members:
                gradient = gradients.of(i)
                gradient.copy_(flat[at : at + gradient.numel()])
                at += gradient.numel()
            for kept in self._kept(memory):
                kept.copy_(flat[at : at + kept.numel()])
                at += kept.numel()
        memory.diverged.difference_update(slot.name for slot in self.averaged)

    def restore(self, memory: Memory, which: Tensor | None = None) -> None:
        """Takes back what rounding has done to the residual in the last pass; see Rounding.restore."""
        if self._rounding is not None:
            self._rounding.restore(memory, which)

    def _kept(self, memory: Memory) -> list[Tensor]:
        return [memory.flat(kind, slot.name) for kind in self._kinds for slot in self.averaged]
