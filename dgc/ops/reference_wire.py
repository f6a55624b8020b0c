"""The ops of the wire in plain PyTorch, with the same bits: Elias-Fano indices, and values of 8 and 4 bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .segments import Segments, checked
from .selection import entries_of, positions
from .wire import TILE, PayloadLayout, check_value_bits, low_bits, upper_bits


def encode_(
    selection: Tensor,
    segments: Tensor,
    workspace: Tensor,
    residual: Tensor,
    wire_dtype: torch.dtype,
    value_bits: int,
    payload: Tensor,
) -> None:
    """Makes a payload of a selection: see dgc.ops.encode_."""
    known = checked(segments)
    check_value_bits(wire_dtype, value_bits)
    at = known.payload(value_bits)
    payload.zero_()
    payload[: at.scales].copy_(selection[: at.scales])
    values = entries_of(selection, known, wire_dtype).values
    in_memory, _ = positions(selection, known, wire_dtype)
    for segment, span in zip(known.rows, _spans(known, at, value_bits), strict=True):
        where = in_memory[span.entries] - segment.state
        low = low_bits(segment.numel, segment.entries)
        upper = torch.zeros(8 * (span.upper.stop - span.upper.start), dtype=torch.uint8, device=payload.device)
        upper[(where >> low) + torch.arange(len(where), device=where.device)] = 1
        payload[span.upper] = _packed(upper)
        lower = (where[:, None] >> torch.arange(low, device=where.device)) & 1
        bits = _packed(lower.view(-1).to(torch.uint8))
        payload[span.lower][: len(bits)] = bits
        mine = values[span.entries]
        if value_bits >= 16:
            payload[span.values] = mine.view(torch.uint8)
            continue
        scale = scale_of(mine, value_bits)
        payload[span.scale].view(torch.int32).copy_(scale)
        codes = codes_of(mine, scale, value_bits)
        if value_bits == 4:
            codes = torch.cat([codes, codes.new_zeros(len(codes) % 2)]).view(-1, 2)
            codes = codes[:, 0] | codes[:, 1] << 4
        payload[span.values] = codes
        received = values_of(codes_of(mine, scale, value_bits), scale, value_bits)
        residual[segment.state + where] += mine - received
        mine.copy_(received)


def decode(
    payloads: Tensor,
    segments: Tensor,
    workspace: Tensor,
    wire_dtype: torch.dtype,
    value_bits: int,
    selections: Tensor,
) -> None:
    """Makes selections of payloads: see dgc.ops.decode."""
    known = checked(segments)
    check_value_bits(wire_dtype, value_bits)
    at = known.payload(value_bits)
    for name, rows, nbytes in (
        ("payloads", payloads, at.nbytes),
        ("selections", selections, known.wire(wire_dtype).nbytes),
    ):
        if rows.shape != (len(payloads), nbytes):
            raise RuntimeError(f"{name}: expected a row of {nbytes} bytes for each rank, got {tuple(rows.shape)}")
    for payload, selection in zip(payloads, selections, strict=True):
        selection[: at.scales].copy_(payload[: at.scales])
        ends, indices, values = entries_of(selection, known, wire_dtype)
        tile = 0
        for row, span in enumerate(_spans(known, at, value_bits)):
            _, _, _, numel, k = known.rows[row]
            low, tiles = low_bits(numel, k), int(known.tiles[row])
            mine = ends[tile : tile + tiles]
            tile += tiles
            ones = _bits(payload[span.upper]).nonzero().view(-1)
            if len(ones) == k and ones[-1] < upper_bits(numel, k):
                weights = 1 << torch.arange(low, device=payload.device)
                lower = _bits(payload[span.lower])[: k * low].view(k, low).long() * weights
                where = (ones - torch.arange(k, device=ones.device) << low) | lower.sum(1)
                indices[span.entries] = (where % TILE).to(torch.int16)
                counts = torch.bincount(where // TILE, minlength=tiles)
                mine.copy_(span.entries.start + counts.cumsum(0))
            else:
                mine[-1] = -1
            got = payload[span.values]
            if value_bits >= 16:
                values[span.entries] = got.view(wire_dtype)
                continue
            if value_bits == 4:
                got = torch.stack([got & 15, got >> 4], dim=1).view(-1)[:k]
            values[span.entries] = values_of(got, payload[span.scale].view(torch.int32), value_bits)


class Span(NamedTuple):
    """The bytes of one parameter in a payload, and its entries."""

    entries: slice
    scale: slice
    upper: slice
    lower: slice
    values: slice


def _spans(known: Segments, at: PayloadLayout, value_bits: int) -> list[Span]:
    spans = []
    words = (known.first_upper, known.upper_words, known.first_lower, known.lower_words, known.first_entry)
    columns = zip(*(column.tolist() for column in words), strict=True)
    for row, (upper, uppers, lower, lowers, entry) in enumerate(columns):
        k = known.rows[row].entries
        first = at.values + ((entry + row) // 2 if value_bits == 4 else entry * value_bits // 8)
        spans.append(
            Span(
                slice(entry, entry + k),
                slice(at.scales + 8 * row, at.scales + 8 * row + 8),
                slice(at.upper + 4 * upper, at.upper + 4 * (upper + uppers)),
                slice(at.lower + 4 * lower, at.lower + 4 * (lower + lowers)),
                slice(first, first + (k * value_bits + 7) // 8),
            )
        )
    return spans


def _packed(bits: Tensor) -> Tensor:
    """Returns bits, uint8 [n], as bytes, the first bit lowest: uint8 [n / 8, rounded up]."""
    padded = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1).to(torch.uint8)


def _bits(packed: Tensor) -> Tensor:
    """Returns the bits of bytes, the lowest first: uint8 [8 n]."""
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1).view(-1)


MAGNITUDE, INFINITY, MOST_STEP = 0x7FFFFFFF, 0x7F800000, 1 << 24


def scale_of(values: Tensor, bits: int) -> Tensor:
    """Returns the scale of a parameter's values: the bits of its least magnitude, and a step: int32 [2]."""
    sizes = values.view(torch.int32) & MAGNITUDE
    sizes = sizes[sizes != 0].long()
    least, largest = (int(sizes.min()), int(sizes.max())) if len(sizes) else (0, 0)
    step = -(-(largest - least) // (2 ** (bits - 1) - 2))
    return torch.tensor([least, min(max(step, 1), MOST_STEP)], dtype=torch.int32, device=values.device)


def codes_of(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Returns the codes of values: uint8 [n]."""
    base, step = scale.tolist()
    raw, most = values.view(torch.int32).long(), 2 ** (bits - 1) - 1
    size = raw & MAGNITUDE
    level = ((size - base + step // 2) // step + 1).clamp(max=most)
    return (torch.where(size == 0, 0, level) | (raw < 0).long() << (bits - 1)).to(torch.uint8)


def values_of(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Returns the values that codes say, float32 [n]; NaN where the scale is none."""
    base, step = scale.tolist()
    if not (0 <= base < INFINITY and 1 <= step <= MOST_STEP):
        return torch.full(codes.shape, torch.nan, dtype=torch.float32, device=codes.device)
    wide, most = codes.long(), 2 ** (bits - 1) - 1
    level = wide & most
    size = torch.where(level == 0, 0, (base + (level - 1) * step).clamp(max=INFINITY - 1))
    return (size - (wide >> (bits - 1) << 31)).to(torch.int32).view(torch.float32)
