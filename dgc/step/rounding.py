"""Rounding: dense gradients in 16 bits, with what that takes waiting in the residual."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dgc.memory.memory import Memory
from dgc.memory.slots import Slot


class Rounding:
    """Rounds the dense gradients of a bucket, and can take its last pass back.

    Error feedback is for parameters that are always dense: e of each waits in their residual. Those that a phase alone
    makes dense have other things in theirs, and are rounded as PyTorch's 16-bit hooks round.
    """

    def __init__(self, slots: Sequence[Slot], memory: Memory, dtype: torch.dtype, device: torch.device) -> None:
        """Finds the parameters with feedback.

        Args:
            slots: of the dense gradients, in their order.
            memory: whose residual is used.
            dtype: bfloat16 or float16.
            device: of the gradients.
        """
        self._dtype = dtype
        fed = [slot.name in memory.waiting and slot.name not in memory.compressed for slot in slots]
        ends = [0, *accumulate(slot.numel for slot in slots)]
        self._parts = [part for part, feed in zip(pairwise(ends), fed, strict=True) if feed]
        self._spans = [slot.span for slot, feed in zip(slots, fed, strict=True) if feed]
        self._sizes = [slot.numel for slot, feed in zip(slots, fed, strict=True) if feed]
        self._lengths = torch.tensor(self._sizes, dtype=torch.int64, device=device)
        self._before: Tensor | None = None
        """e of the parameters with feedback before the last pass, until that is taken back."""

    def round(self, exact: Tensor, memory: Memory) -> Tensor:
        """Returns gradients plus e in 16 bits, and leaves in e what that takes.

        e stays as it is where a sum is not finite, so that the step is found bad, and where all of a parameter's
        gradient is zero, since DDP drops the result of a parameter that no rank has used.

        Args:
            exact: float32 [elements], of all slots. Used up.
            memory: whose residual changes.
        """
        if self._spans:
            before = self._before = torch.cat(self._rests(memory))
            gradients = torch.cat([exact[begin:end] for begin, end in self._parts])
            largest = torch.segment_reduce(gradients.abs(), "max", lengths=self._lengths)
            used = torch.repeat_interleave(largest != 0, self._lengths, output_size=len(before))
            total = gradients + torch.where(used, before, 0.0)
            largest_number = torch.finfo(self._dtype).max
            sent = total.clamp(-largest_number, largest_number).to(self._dtype).float()
            waits = used & total.isfinite()
            self._set(memory, torch.where(waits, total - sent, before))
            sent = torch.where(total.isfinite(), sent, total)
            for (begin, end), part in zip(self._parts, sent.split(self._sizes), strict=True):
                exact[begin:end].copy_(part)
        return exact.to(self._dtype)

    def restore(self, memory: Memory, which: Tensor | None = None) -> None:
        """Sets e to what it was before the last pass.

        Args:
            memory: whose residual changes.
            which: uint8 scalar on the device: only where it is not 0; None: in any case.
        """
        if self._before is not None:
            before, self._before = self._before, None
            if which is not None:
                before = torch.where(which != 0, before, torch.cat(self._rests(memory)))
            self._set(memory, before)

    def _rests(self, memory: Memory) -> list[Tensor]:
        return [memory.residual[begin:end] for begin, end in self._spans]

    def _set(self, memory: Memory, rests: Tensor) -> None:
        for rest, part in zip(self._rests(memory), rests.split(self._sizes), strict=True):
            rest.copy_(part)
