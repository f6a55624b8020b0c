"""A decoder of payloads in numpy and Python's integers, written from docs/wire.md alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import log2

import numpy as np
import torch
from torch import Tensor

FORMATS = [(torch.float32, 32), (torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 8), (torch.float32, 4)]
"""The type of the values in a selection, and the bits of a value on the wire."""
LARGEST = 0x7F7FFFFF
"""The bits of the largest finite float32."""


def payload_bytes(shapes: Iterable[tuple[int, int]]) -> int:
    """Returns the bytes of a payload with float32 values, of parameters with so many elements and entries each."""
    low = [(n, k, min(int(log2(n // k)), 16)) for n, k in shapes]
    upper = sum(4 * -(-(k + (n - 1 >> b)) // 32) for n, k, b in low)
    lower = sum(4 * -(-k * b // 32) for _, k, b in low)
    sections = 32 + len(low), upper, lower, 4 * sum(k for _, k, _ in low)
    return sum(-(-nbytes // 16) * 16 for nbytes in sections)


@dataclass
class Part:
    """One parameter of a payload: views of its bytes."""

    numel: int
    entries: int
    low: int
    scale: np.ndarray
    upper: np.ndarray
    lower: np.ndarray
    values: np.ndarray

    def positions(self) -> np.ndarray | int:
        """Returns its indices, or the code of what is wrong with them."""
        ones = np.flatnonzero(bits_of(self.upper))
        if len(ones) != self.entries or ones[-1] >= self.entries + (self.numel - 1 >> self.low):
            return 4
        low = bits_of(self.lower)[: self.entries * self.low].reshape(self.entries, self.low).astype(np.int64)
        found = (ones - np.arange(self.entries)) * 2**self.low + (low * 2 ** np.arange(self.low)).sum(1)
        return 5 if (np.diff(found) <= 0).any() or found[-1] >= self.numel else found

    def decoded(self, dtype: torch.dtype, bits: int) -> np.ndarray:
        """Returns its values in float64, NaN where its scale is none."""
        if bits == 16 and dtype == torch.bfloat16:
            return (self.values.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        if bits >= 16:
            return self.values.view({32: "<f4", 16: "<f2"}[bits]).astype(np.float64)
        base, step = (int(x) for x in self.scale.view("<u4"))
        if not (base <= LARGEST and 1 <= step <= 2**24):
            return np.full(self.entries, np.nan)
        raw = self.values if bits == 8 else np.stack([self.values & 15, self.values >> 4], axis=1).reshape(-1)
        found = []
        for code in raw[: self.entries].tolist():
            level = code % 2 ** (bits - 1)
            size = min(base + (level - 1) * step, LARGEST) if level else 0
            found.append((-1.0) ** (code >> (bits - 1)) * float(np.uint32(size).view(np.float32)))
        return np.array(found)


def bits_of(packed: np.ndarray) -> np.ndarray:
    return np.unpackbits(packed, bitorder="little")


def parts_of(row: np.ndarray, segments: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray, list[Part]]:
    """Returns a payload's header, its byte of each parameter, and its parameters."""
    at = 0

    def section(nbytes: int) -> np.ndarray:
        nonlocal at
        begin, at = at, -(-(at + nbytes) // 16) * 16
        return row[begin : begin + nbytes]

    sizes, counts = segments[:, 3].tolist(), segments[:, 4].tolist()
    low = [min(int(log2(n // k)), 16) for n, k in zip(sizes, counts, strict=True)]
    uppers = [4 * -(-(k + (n - 1 >> b)) // 32) for n, k, b in zip(sizes, counts, low, strict=True)]
    lowers = [4 * -(-k * b // 32) for k, b in zip(counts, low, strict=True)]
    head = row[: 32 + len(sizes)]
    section(len(head))
    scales = section(8 * len(sizes) * (bits < 16)).reshape(len(sizes), -1)
    upper, lower = section(sum(uppers)), section(sum(lowers))
    first = [sum(counts[:i]) for i in range(len(counts))]
    begins = [(e + i) // 2 if bits == 4 else e * bits // 8 for i, e in enumerate(first)]
    values = section((sum(counts) + len(counts) + 1) // 2 if bits == 4 else sum(counts) * bits // 8)
    assert at == len(row)
    parts = []
    for i, (n, k) in enumerate(zip(sizes, counts, strict=True)):
        u, w, v = sum(uppers[:i]), sum(lowers[:i]), begins[i]
        mine = values[v : v + -(-k * bits // 8)]
        parts.append(Part(n, k, low[i], scales[i], upper[u : u + uppers[i]], lower[w : w + lowers[i]], mine))
    return head[:32].view("<i8"), head[32:], parts


def judge(row: np.ndarray, own: np.ndarray, segments: Tensor, dtype: torch.dtype, bits: int):
    """Returns the code of a payload and, where it is sound, each parameter's (used, positions, values)."""
    header, used, parts = parts_of(row, segments, bits)
    expected = (int.from_bytes(b"DGCWIRE2", "little"), own[1], own[2])
    for code, (theirs, mine) in enumerate(zip(header[:3], expected, strict=True), start=1):
        if theirs != mine:
            return code, None
    positions = [part.positions() for part in parts]
    if wrong := [code for code in positions if isinstance(code, int)]:
        return min(wrong), None
    values = [part.decoded(dtype, bits) for part in parts]
    if not all(np.isfinite(v).all() for v in values):
        return 6, None
    return 256 * int(header[3] & 1), list(zip(used, positions, values, strict=True))
