"""Verdict: whether a step may be applied, known at once on the CPU and one step later on a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dgc.exchange.base import Exchange
from dgc.ops.wire import PayloadError

from .bucket import Bucket
from .replicas import Replicas


class Verdict:
    """The reports of the buckets of one backward pass.

    On a GPU the host does not wait: the device itself leaves a bad step out, by `bad`, and the reports are copied to
    the host. The host reads the copy in the next backward pass, while the device still has the next forward pass to do.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        exchange: Exchange,
        step: int,
        zeroed: Mapping[str, Tensor] | None = None,
        changed: Mapping[str, Tensor] | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        """Collects the reports, once all buckets have been received; a collective of ranks that hold a model together.

        Args:
            buckets: of one backward pass; on a GPU, the current stream has to be ordered after them.
            exchange: the collectives.
            step: for messages.
            zeroed: by name, a bool scalar on the device: whether the gradient has been set to zero.
            changed: by name, a bool scalar on the device: whether the gradient has changed in any way.
            replicas: the comparison of the ranks' parameters; None in a step without one.
        """
        self.buckets = buckets
        self._reporting: list[Bucket | Replicas] = [*buckets, *([] if replicas is None else [replicas])]
        self.step = step
        self._exchange = exchange
        self._found: list[str] | None = None
        self._zeroed, self._changed = zeroed or {}, changed or {}
        reports = torch.cat([one.report for one in self._reporting])
        bad = (reports != 0).any().to(torch.int32)
        exchange.sum_in_node(bad)
        self.bad = (bad != 0).to(torch.uint8)
        """uint8 scalar on the device: 1 where nothing of this step may be applied."""
        reports = torch.cat([reports, bad.view(1)])
        if probed := [*self._zeroed.values(), *self._changed.values()]:
            reports = torch.cat([reports, torch.stack(probed).to(reports.dtype)])
        self._copied: torch.cuda.Event | None = None
        if reports.is_cuda:
            # Pinned, since the host would wait for a copy to pageable memory.
            self._reports = torch.empty(reports.shape, dtype=reports.dtype, pin_memory=True)
            self._reports.copy_(reports, non_blocking=True)
            # The stream of the tensors' device, which need not be the current device.
            self._copied = torch.cuda.current_stream(reports.device).record_event()
        else:
            self._reports = reports

    def findings(self) -> list[str]:
        """Returns descriptions of the gradients that were not finite; on a GPU, waits for the copy of the reports.

        Raises:
            wire.PayloadError: a rank sent what does not fit.
        """
        if self._found is not None:
            return self._found
        if self._copied is not None:
            self._copied.synchronize()
        found: set[str] = set()
        reports = self._reports.tolist()
        at, error = 0, ""
        for one in self._reporting:
            report = reports[at : at + len(one.report)]
            at += len(report)
            try:
                found |= one.findings(report)
            except PayloadError as wrong:
                error = error or str(wrong)
        if reports[at]:
            everyone = map(json.loads, self._exchange.everyone_in_node(json.dumps([sorted(found), error])))
            for theirs, their_error in everyone:
                found |= set(theirs)
                error = error or their_error
            if error:
                raise PayloadError(error)
        self._found = sorted(found)
        return self._found

    def thrown_away(self, bucket: Bucket) -> Tensor | None:
        """Returns which gradients of a bucket were set to zero, uint8 [compressed] on the device; None if unprobed."""
        members = () if bucket.sparse is None else bucket.sparse.members
        marks = [self._zeroed.get(m.slot.name) for m in members]
        if not any(mark is not None for mark in marks):
            return None
        never = torch.zeros((), dtype=torch.bool, device=self.bad.device)
        return torch.stack([never if mark is None else mark for mark in marks]).to(torch.uint8)

    @property
    def zeroed(self) -> list[str]:
        """Names of parameters whose gradient has been set to zero; on a GPU, waits as findings() does."""
        return self._marked(self._zeroed, len(self._zeroed) + len(self._changed))

    @property
    def changed(self) -> list[str]:
        """Names of parameters whose gradient has been changed otherwise; on a GPU, waits as findings() does."""
        zeroed = self.zeroed
        return [name for name in self._marked(self._changed, len(self._changed)) if name not in zeroed]

    def _marked(self, probed: Mapping[str, Tensor], from_the_end: int) -> list[str]:
        if self._copied is not None:
            self._copied.synchronize()
        marks = self._reports[len(self._reports) - from_the_end :][: len(probed)].tolist()
        return [name for name, mark in zip(probed, marks, strict=True) if mark]
