"""Unfused: a rule written in plain PyTorch, for an optimizer without an op of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from dgc.ops import Accumulation
from dgc.ops.selection import positions
from dgc.ops.wire import LEFT_OUT, USED

from .base import Rule
from .work import Work


class Unfused(Rule):
    """A rule whose tensors and updates of v are computed in plain PyTorch, one parameter at a time.

    An op then adds the updates to v, selects and packs. This is about three times as slow as a fused rule.
    """

    fused = False

    @abstractmethod
    def advance(
        self, kept: Mapping[str, Tensor], gradient: Tensor, factors: tuple[float, ...]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Returns one parameter's kept tensors after this gradient, and the update of v; changes nothing.

        Args:
            kept: by kind, float32 [numel].
            gradient: float32 [numel], clipped and unscaled.
            factors: factors() of the parameter.
        """

    def compress(self, work: Work) -> None:
        """Advances each parameter where the result is finite, then selects and packs."""
        (updates,) = work.updates
        used = []
        rows = zip(work.receiving.rows, work.sending.rows, work.factors, work.numbers[0], strict=True)
        for row, update_row, factors, decay in rows:
            state, numel, at = row.state, row.numel, update_row.offset
            gradient = work.gradients[row.source].view(-1)[row.offset : row.offset + numel]
            h = gradient.float() * work.scale
            gradient.zero_()
            used.append((h != 0).any())
            kept = {kind: flat[state : state + numel] for kind, flat in work.kinds.items()}
            after, update = self.advance(kept, h, factors)
            finite = (work.residual[state : state + numel] * decay + update).isfinite()
            for tensor in after.values():
                finite &= tensor.isfinite()
            for kind, tensor in kept.items():
                torch.where(finite, after[kind], tensor, out=tensor)
            updates[at : at + numel] = torch.where(finite, update, torch.nan)  # the op leaves NaN out, and reports it
        one = torch.ones(1, dtype=torch.float32, device=updates.device)
        added = work._replace(gradients=work.updates, receiving=work.sending, scale=one, sent={})
        added.compress(Accumulation.SUM)
        layout = work.sending.wire(work.dtype)
        marks = work.selection[layout.used : layout.used + len(used)]
        # The op has marked updates that are not zero. The mark is of gradients: an unused parameter may have updates.
        marks.copy_((marks & LEFT_OUT) | torch.stack(used) * USED)
        self._mask(work)

    def _mask(self, work: Work) -> None:
        """Copies the kept values at sent entries to work.sent, and sets them to 0."""
        if not work.sent:
            return
        where, values = positions(work.selection, work.sending, work.dtype)
        for kind, log in work.sent.items():
            log.copy_(work.kinds[kind][where])
            work.kinds[kind][where] = torch.where(values != 0, 0.0, log)
