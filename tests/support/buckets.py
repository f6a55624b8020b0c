"""Arguments for the ops: a bucket of given sizes, with state and payload; and calls that compare with the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dgc.ops import Accumulation, reference, wire, wire_layout
from support.roads import ops

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Args:
    """The arguments of compress_, in its order."""

    gradients: list[Tensor]
    rule: Accumulation
    kept: list[Tensor]
    residual: Tensor
    segments: Tensor
    numbers: Tensor
    scale: Tensor
    payload: Tensor
    workspace: Tensor
    sent: Tensor | None
    wire_dtype: torch.dtype

    def list(self) -> list[Any]:
        return list(vars(self).values())

    def clone(self) -> Args:
        copies = {k: v.clone() for k, v in vars(self).items() if isinstance(v, Tensor)}
        lists = {name: [x.clone() for x in getattr(self, name)] for name in ("gradients", "kept")}
        return replace(self, **lists, **copies)

    @property
    def momentum(self) -> Tensor | None:
        """The first of the rule's tensors, which masking clears."""
        return self.kept[0] if self.kept else None

    @property
    def mu(self) -> Tensor:
        """The momentum factor of each parameter."""
        return self.numbers[1]

    @property
    def state(self) -> dict[str, Tensor | None]:
        """All that the op changes, besides gradients and workspace."""
        kept = {f"kept {i}": x for i, x in enumerate(self.kept)}
        return {**kept, "residual": self.residual, "payload": self.payload, "sent": self.sent}

    def entries(self, segment: int) -> dict[int, float]:
        """Returns what the payload says of one parameter: value by index."""
        at = wire_layout(self.segments, self.wire_dtype)
        numel, k = self.segments[:, 3].tolist(), self.segments[:, 4].tolist()
        tiles = [math.ceil(n / 65536) for n in numel]
        ends = [0, *self.payload[at.ends : at.ends + 4 * sum(tiles)].view(torch.int32).tolist()]
        indices = self.payload[at.indices : at.indices + 2 * sum(k)].view(torch.uint16).tolist()
        values = self.payload[at.values : at.values + self.wire_dtype.itemsize * sum(k)].view(self.wire_dtype).tolist()
        first = sum(tiles[:segment])
        return {
            65536 * t + indices[e]: values[e]
            for t in range(tiles[segment])
            for e in range(ends[first + t], ends[first + t + 1])
        }

    @property
    def flags(self) -> int:
        return int(wire.header(self.payload)[3])

    @property
    def used(self) -> list[int]:
        at = wire_layout(self.segments, self.wire_dtype)
        return self.payload[at.used : at.used + len(self.segments)].tolist()


def numbers_of(rule: Accumulation, parameters: int, decay: float = 1.0) -> Tensor:
    """Returns numbers as compress_ takes them, other ones for each parameter."""
    if rule == Accumulation.ADAM:
        # 1 - b1 on both sides of 0.5, b2, c1, c2, step, root, eps.
        spans = [(0.1, 0.7), (0.99, 0.9), (0.01, 0.1), (0.0, 0.2), (0.003, 1.0), (0.1, 0.9), (1e-8, 1e-3)]
    else:
        spans = [(0.5, 0.95)] * (rule.rows - 1)
    rows = [torch.full((parameters,), decay), *(torch.linspace(*span, parameters) for span in spans)]
    return torch.stack(rows)


def make(
    sizes: list[int],
    density: float = 0.01,
    dtype: torch.dtype = torch.float32,
    wire_dtype: torch.dtype = torch.float32,
    *,
    rule: Accumulation = Accumulation.MOMENTUM,
    masking: bool = True,
    decay: float = 1.0,
    scale: float = 1.0,
    offset: int = 0,
    seed: int = 0,
) -> Args:
    """Returns a bucket of parameters of these sizes, filled with normal numbers, gradients `offset` elements in."""
    generator = torch.Generator().manual_seed(seed)
    rows, at, state = [], offset, 0
    for n in sizes:
        rows.append((0, at, state, n, max(1, math.ceil(density * n))))
        at += n
        state += wire.align_up(n, 32)
    segments = torch.tensor(rows)
    entries = int(segments[:, 4].sum())
    payload = torch.zeros(wire_layout(segments, wire_dtype).nbytes, dtype=torch.uint8)
    wire.stamp(payload, fingerprint=42).fill_(7)
    return Args(
        gradients=[torch.randn(at, generator=generator).to(dtype)],
        rule=rule,
        kept=[torch.randn(state, generator=generator).pow(1 + i) for i in range(rule.kept)],  # a second one is >= 0
        residual=torch.randn(state, generator=generator),
        segments=segments,
        numbers=numbers_of(rule, len(sizes), decay),
        scale=torch.tensor([scale]),
        payload=payload,
        workspace=ops.workspace(segments),
        sent=torch.zeros(entries) if rule.kept and masking else None,
        wire_dtype=wire_dtype,
    )


def equal(a: Args, b: Args) -> None:
    for (name, x), y in zip(a.state.items(), b.state.values(), strict=True):
        # As integers: NaN and the sign of zero count.
        if x is not None:
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), name


def compress_both(args: Args) -> Args:
    """Runs the op and the reference, compares all bits, and returns the op's, with the gradients from before."""
    expected, before = args.clone(), args.clone()
    reference.compress_(*expected.list())
    ops.compress_(*args.list())
    equal(args, expected)
    for gradient, kept in zip(args.gradients, before.gradients, strict=True):
        gradient.copy_(kept)
    return args


def unpack_both(
    args: Args,
    payloads: torch.Tensor,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    before: float = 0.0,
):
    """Runs the op and the reference, compares all bits, and returns the averages and the status."""
    numel = int((args.segments[:, 1] + args.segments[:, 3]).max())
    out = torch.full((numel,), 7.0, dtype=dtype)
    for _, offset, _, n, *_ in args.segments.tolist():
        out[offset : offset + n] = before
    expected = out.clone()
    status, reference_status = torch.full((2, len(payloads) + 1), 9, dtype=torch.int32)
    scale = torch.tensor([scale])
    ops.unpack(payloads, rank, args.segments, args.workspace, scale, args.wire_dtype, [out], status)
    reference.unpack(
        payloads, rank, args.segments, args.workspace, scale, args.wire_dtype, [expected], reference_status
    )
    assert torch.equal(status, reference_status)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    return out, status.tolist()
