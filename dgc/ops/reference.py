"""Every op in plain PyTorch: the fallback where the native library is missing, and the oracle of its tests.

Signatures and meaning are those of dgc/ops/schema.py. Both give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .accumulation import Accumulation, check_rule
from .reference_wire import decode, encode_
from .segments import Segments, checked
from .wire import LEFT_OUT, MAGIC, NON_FINITE, NON_FINITE_STATUS, TILE, USED, header

__all__ = ["compress_", "decode", "encode_", "restore_", "subtract_", "unpack"]


def compress_(
    gradients: list[Tensor],
    rule: int,
    kept: list[Tensor],
    residual: Tensor,
    segments: Tensor,
    numbers: Tensor,
    scale: Tensor,
    payload: Tensor,
    workspace: Tensor,
    sent: Tensor | None,
    wire_dtype: torch.dtype,
) -> None:
    """Accumulates, selects and packs, one parameter after the other: see dgc.ops.compress_."""
    known = checked(segments)
    check_rule(rule, kept, numbers, sent, len(known))
    at = known.wire(wire_dtype)
    ends, all_indices, all_values = _sections(payload, known, wire_dtype)
    entry = tile = 0
    flags = torch.zeros((), dtype=torch.bool, device=payload.device)
    for row, (source, offset, state, numel, k) in enumerate(known.rows):
        gradient = gradients[source].view(-1)[offset : offset + numel]
        h = gradient.float() * scale
        gradient.zero_()
        v = residual[state : state + numel]
        mine = [tensor[state : state + numel] for tensor in kept]
        left_out = accumulate_(rule, mine, v, h, numbers[:, row])
        payload[at.used + row] = USED * (h != 0).any() + LEFT_OUT * left_out
        flags |= left_out

        chosen = select(v, k)
        largest = torch.finfo(wire_dtype).max
        values = v[chosen].clamp(-largest, largest).to(wire_dtype)
        w = values.float()
        v[chosen] -= w
        here = slice(entry, entry + k)
        if sent is not None:
            u = mine[0]
            sent[here] = u[chosen]
            u[chosen] = torch.where(w != 0, 0.0, u[chosen])
        tiles = int(known.tiles[row])
        ends[tile : tile + tiles] = entry + torch.bincount(chosen // TILE, minlength=tiles).cumsum(0).int()
        all_indices[here] = (chosen % TILE).to(torch.int16)
        all_values[here] = values
        entry, tile = entry + k, tile + tiles
    header(payload)[3] = flags * NON_FINITE


def accumulate_(rule: int, kept: list[Tensor], v: Tensor, h: Tensor, numbers: Tensor) -> Tensor:
    """Accumulates one parameter by a rule, in what it keeps and in v; dgc.ops.compress_ has the equations.

    Args:
        rule: an Accumulation.
        kept: the rule's tensors, float32 [numel].
        v: float32 [numel].
        h: the gradient, float32 [numel].
        numbers: float32 [rows]: the decay of v and the rule's own.

    Returns:
        Whether any entry was left as it was because a result is not finite: a bool scalar.
    """
    if rule == Accumulation.ADAM:
        after, update = adam(kept[0], kept[1], h, numbers)
    elif rule == Accumulation.SUM:
        after, update = [], h
    else:
        mu = float(numbers[1])
        u = kept[0] * mu + h
        after, update = [u], torch.add(h, u, alpha=mu) if rule == Accumulation.NESTEROV else u
    results = [*after, v * numbers[0] + update]
    # Adam's m is not looked at, since it shows in s.
    finite = torch.stack([result.isfinite() for result in results[rule == Accumulation.ADAM :]]).all(0)
    for tensor, result in zip([*kept, v], results, strict=True):
        torch.where(finite, result, tensor, out=tensor)
    return ~finite.all()


def adam(m: Tensor, s: Tensor, h: Tensor, numbers: Tensor) -> tuple[list[Tensor], Tensor]:
    """Returns m and s after this gradient, and its direction; arguments as accumulate_ has them."""
    _, weight, b2, c1, c2, step, _, eps = numbers.tolist()
    m = torch.lerp(m, h, weight)
    s = torch.addcmul(s * b2, h * c1, h)
    s = torch.addcmul(s, m * c2, m)
    # In double, since on a CPU sqrt() calls MKL, which does not round correctly. The root is a tensor, since CUDA
    # multiplies by the inverse of a number.
    return [m, s], h * step / (s.double().sqrt().float() / numbers[6] + eps)


def select(v: Tensor, k: int) -> Tensor:
    """Returns the indices of the k entries largest in magnitude, ties to the smaller index, rising: int64 [k]."""
    size = v.abs()
    threshold = size.topk(k).values[-1]
    above = (size > threshold).nonzero().view(-1)
    ties = (size == threshold).nonzero().view(-1)[: k - len(above)]
    return torch.cat([above, ties]).sort().values


def unpack(
    payloads: Tensor,
    rank: int,
    segments: Tensor,
    workspace: Tensor,
    scale: Tensor,
    wire_dtype: torch.dtype,
    out: list[Tensor],
    status: Tensor,
) -> None:
    """Checks all payloads, then averages them in rank order: see dgc.ops.unpack."""
    known = checked(segments)
    at = known.wire(wire_dtype)
    if payloads.size(1) != at.nbytes:
        raise ValueError(f"payloads: expected rows of {at.nbytes} bytes, got {payloads.size(1)}")
    if not 0 <= rank < len(payloads):
        raise ValueError(f"payloads: expected a row for this rank, {rank}, got {len(payloads)}")
    headers = header(payloads).tolist()
    found = [_check(payload, headers[r], headers[rank], known, wire_dtype) for r, payload in enumerate(payloads)]
    codes = [s + NON_FINITE_STATUS * (s == 0 and h[3] & NON_FINITE) for s, h in zip(found, headers, strict=True)]
    status.copy_(torch.tensor([*codes, 0], dtype=torch.int32, device="cpu"))
    if any(found):
        return
    used = (payloads[:, at.used : at.used + len(known)] & USED).any(0).tolist()
    positions = [_positions(payload, known, wire_dtype) for payload in payloads]
    values = [_sections(payload, known, wire_dtype)[2].float() for payload in payloads]
    entry = 0
    for row, (source, offset, _, numel, k) in enumerate(known.rows):
        mine = slice(entry, entry + k)
        entry += k
        if not used[row]:
            continue
        total = torch.zeros(numel, dtype=torch.float32, device=payloads.device)
        for position, value in zip(positions, values, strict=True):
            total.index_put_((position[mine],), value[mine], accumulate=True)
        average = out[source].view(-1)[offset : offset + numel]
        average.copy_(total * (1 / torch.tensor(len(payloads), dtype=torch.float32, device="cpu")) * scale)
        status[-1] |= ~average.isfinite().all()
        if any(codes):
            average[0] = torch.nan


def restore_(
    payload: Tensor,
    which: Tensor,
    segments: Tensor,
    workspace: Tensor,
    sent: Tensor | None,
    momentum: Tensor | None,
    residual: Tensor,
    wire_dtype: torch.dtype,
) -> None:
    """Puts back what was taken out for the chosen parameters: see dgc.ops.restore_."""
    known = checked(segments)
    positions = _positions(payload, known, wire_dtype)
    values = _sections(payload, known, wire_dtype)[2].float()
    chosen = which.tolist()
    entry = 0
    for row, (_, _, state, _, k) in enumerate(known.rows):
        mine = slice(entry, entry + k)
        entry += k
        if not chosen[row]:
            continue
        residual[state + positions[mine]] += values[mine]
        if sent is not None and momentum is not None:
            momentum[state + positions[mine]] = sent[mine]


def subtract_(parameters: list[Tensor], updates: list[Tensor], lr: float, shrink: float, skip: Tensor | None) -> None:
    """Shrinks each parameter and takes lr * update off it: see dgc.ops.subtract_."""
    if skip is not None and skip.item():
        return
    for parameter, update in zip(parameters, updates, strict=True):
        if shrink != 1:
            parameter.mul_(shrink)
        parameter.add_(update, alpha=-lr)


def _sections(payload: Tensor, segments: Segments, wire_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns views of one payload: tile ends int32, indices int16 (unsigned in truth), values in the wire type."""
    at, entries = segments.wire(wire_dtype), segments.n_entries
    return (
        payload[at.ends : at.ends + 4 * segments.n_tiles].view(torch.int32),
        payload[at.indices : at.indices + 2 * entries].view(torch.int16),
        payload[at.values : at.values + wire_dtype.itemsize * entries].view(wire_dtype),
    )


def _positions(payload: Tensor, segments: Segments, wire_dtype: torch.dtype) -> Tensor:
    """Returns each entry's index inside its parameter: int64 [entries]."""
    ends, indices, _ = _sections(payload, segments, wire_dtype)
    counts = ends.diff(prepend=ends.new_zeros(1)).long()
    return torch.repeat_interleave(segments.tile_begin.to(payload.device), counts) + (indices.long() & 0xFFFF)


def _check(payload: Tensor, words: list[int], own: list[int], segments: Segments, wire_dtype: torch.dtype) -> int:
    """Returns the status code of one payload, from dgc.ops.wire.STATUS; 0 where it is sound."""
    for code, (word, expected) in enumerate(zip(words[:3], (MAGIC, *own[1:3]), strict=True), start=1):
        if word != expected:
            return code
    ends, indices, values = _sections(payload, segments, wire_dtype)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]]).long() & 0xFFFFFFFF
    tile_ends = ends.long() & 0xFFFFFFFF
    last_tile = (segments.first_tile + segments.tiles - 1).to(ends.device)
    due = segments.first_entry + segments.entries
    if (tile_ends < begins).any() or not torch.equal(tile_ends[last_tile].cpu(), due):
        return 4
    position = indices.long() & 0xFFFF
    tile = torch.repeat_interleave(torch.arange(len(ends), device=ends.device), tile_ends - begins)
    out_of_bounds = (position >= segments.tile_numel.to(ends.device)[tile]).any()
    if out_of_bounds or ((position.diff() <= 0) & (tile.diff() == 0)).any():
        return 5
    return 0 if values.float().isfinite().all() else 6
