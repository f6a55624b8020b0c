"""Verdict: whether a step may be applied, known at once on the CPU and one step later on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bucket import Bucket


class Verdict:
    """What the buckets of one backward pass report.

    On a GPU nobody waits: the device itself leaves a bad step out, by `bad`, and a copy of the reports travels to the
    host. It is read at the next backward pass, when the device has the next forward pass left to do.
    """

    def __init__(
        self, buckets: Sequence[Bucket], step: int, probed: Sequence[str] = (), changed: Tensor | None = None
    ) -> None:
        """Collects the reports, once all buckets have been received.

        Args:
            buckets: of one backward pass; on a GPU, this stream has to be behind them.
            step: for messages.
            probed: names of parameters that were looked at.
            changed: bool [probed] on the device: whether somebody has changed their gradient since.
        """
        self.buckets = buckets
        self.step = step
        self._probed = probed
        reports = torch.cat([bucket.report for bucket in buckets])
        self.bad = (reports != 0).any().to(torch.uint8)
        """uint8 scalar on the device: 1 where nothing of this step may be applied."""
        if changed is not None:
            reports = torch.cat([reports, changed.to(reports.dtype)])
        self._copied: torch.cuda.Event | None = None
        if reports.is_cuda:
            # Pinned, or the copy would wait.
            self._reports = torch.empty(reports.shape, dtype=reports.dtype, pin_memory=True)
            self._reports.copy_(reports, non_blocking=True)
            # Of the tensors' device, which need not be the current one.
            self._copied = torch.cuda.current_stream(reports.device).record_event()
        else:
            self._reports = reports

    def findings(self) -> list[str]:
        """Returns in words where gradients were not finite; on a GPU, waits until the step is through.

        Raises:
            wire.PayloadError: a rank sent what does not fit.
        """
        if self._copied is not None:
            self._copied.synchronize()
        found: set[str] = set()
        reports = self._reports.tolist()
        for bucket in self.buckets:
            found |= bucket.findings(reports[: len(bucket.report)])
            del reports[: len(bucket.report)]
        return sorted(found)

    @property
    def changed(self) -> list[str]:
        """Names of parameters whose gradient somebody has changed; on a GPU, waits as findings() does."""
        if not self._probed:
            return []
        if self._copied is not None:
            self._copied.synchronize()
        marks = self._reports[-len(self._probed) :].tolist()
        return [name for name, mark in zip(self._probed, marks, strict=True) if mark]
