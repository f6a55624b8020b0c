"""Competitors that are the same on every device: ours, the bare update, and the step in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dgc import ops
from dgc.ops import wire

MU = 0.9


class Step:
    """A competitor: gradients that rotate, u and v."""

    def __init__(self, gradients: list[Tensor], u: Tensor, v: Tensor, k: int) -> None:
        self.gradients, self.u, self.v, self.k, self.at = gradients, u, v, k, 0

    def next(self) -> Tensor:
        self.at += 1
        return self.gradients[self.at % len(self.gradients)]


class Fused(Step):
    """The op of this package."""

    def __init__(self, gradients: list[Tensor], u: Tensor, v: Tensor, segments: Tensor) -> None:
        super().__init__(gradients, u, v, int(segments[:, 4].sum()))
        self.segments = segments
        nbytes = ops.wire_layout(segments, torch.float32).nbytes
        self.payload = torch.zeros(nbytes, dtype=torch.uint8, device=u.device)
        wire.stamp(self.payload, fingerprint=0)
        self.workspace = ops.workspace(segments, u.device)
        self.sent = torch.zeros(self.k, device=u.device)
        self.mu, self.one = torch.full((len(segments),), MU, device=u.device), torch.ones(1, device=u.device)

    def step(self, gradient: Tensor) -> None:
        """Compresses one gradient."""
        ops.compress_(
            [gradient],
            self.u,
            self.v,
            self.segments,
            self.mu,
            self.one,
            self.payload,
            self.workspace,
            self.sent,
            False,
            torch.float32,
        )

    def __call__(self) -> None:
        self.step(self.next())


class Floor(Step):
    """u and v only, by a function that updates them."""

    def __init__(
        self, gradients: list[Tensor], u: Tensor, v: Tensor, update: Callable[[Tensor, Tensor, Tensor], None]
    ) -> None:
        super().__init__(gradients, u, v, k=0)
        self.update = update

    def __call__(self) -> None:
        self.update(self.next(), self.u, self.v)


class EagerExact(Step):
    """The same step in plain PyTorch."""

    def __call__(self) -> None:
        self.u.mul_(MU).add_(self.next())
        self.v.add_(self.u)
        indices = self.v.abs().topk(self.k, sorted=False).indices
        self.values = self.v[indices]
        self.v.index_fill_(0, indices, 0)
        self.u.index_fill_(0, indices, 0)
