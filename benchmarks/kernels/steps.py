"""Competitors that are the same on every device: ours, the bare update, and the step in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dgc import ops
from dgc.ops import Accumulation, wire

MU = 0.9
ADAM = {"weight": 0.1, "b2": 0.999, "c1": 0.001, "c2": 0.0, "step": 0.001, "root": 0.9, "eps": 1e-8}
NUMBERS = {Accumulation.MOMENTUM: (1.0, MU), Accumulation.ADAM: (1.0, *ADAM.values())}


class Step:
    """A competitor: gradients that rotate, u and v."""

    def __init__(self, gradients: list[Tensor], u: Tensor, v: Tensor, k: int) -> None:
        self.gradients, self.u, self.v, self.k, self.at = gradients, u, v, k, 0

    def next(self) -> Tensor:
        self.at += 1
        return self.gradients[self.at % len(self.gradients)]


class Fused(Step):
    """The op of this package."""

    def __init__(
        self,
        gradients: list[Tensor],
        kept: list[Tensor],
        v: Tensor,
        segments: Tensor,
        rule: Accumulation = Accumulation.MOMENTUM,
    ) -> None:
        super().__init__(gradients, kept[0], v, int(segments[:, 4].sum()))
        self.rule, self.kept, self.segments = rule, kept, segments
        nbytes = ops.wire_layout(segments, torch.float32).nbytes
        self.payload = torch.zeros(nbytes, dtype=torch.uint8, device=v.device)
        wire.stamp(self.payload, fingerprint=0)
        self.workspace = ops.workspace(segments, v.device)
        # dgc.AdamW masks nothing, so that nothing has to be kept of it.
        self.sent = None if rule is Accumulation.ADAM else torch.zeros(self.k, device=v.device)
        self.numbers = torch.tensor(NUMBERS[rule], device=v.device)[:, None].repeat(1, len(segments))
        self.one = torch.ones(1, device=v.device)

    def step(self, gradient: Tensor) -> None:
        """Compresses one gradient."""
        ops.compress_(
            [gradient],
            self.rule,
            self.kept,
            self.v,
            self.segments,
            self.numbers,
            self.one,
            self.payload,
            self.workspace,
            self.sent,
            torch.float32,
        )

    def __call__(self) -> None:
        self.step(self.next())


class Floor(Step):
    """What a rule keeps and v only, by a function that updates them."""

    def __init__(self, gradients: list[Tensor], kept: list[Tensor], v: Tensor, update: Callable[..., None]) -> None:
        super().__init__(gradients, kept[0], v, k=0)
        self.kept, self.update = kept, update

    def __call__(self) -> None:
        self.update(self.next(), *self.kept, self.v)


class EagerExact(Step):
    """The same step in plain PyTorch."""

    def __call__(self) -> None:
        self.u.mul_(MU).add_(self.next())
        self.v.add_(self.u)
        indices = self.v.abs().topk(self.k, sorted=False).indices
        self.values = self.v[indices]
        self.v.index_fill_(0, indices, 0)
        self.u.index_fill_(0, indices, 0)
