"""Payloads and the damage that hypothesis draws for them, the same at each run.

What a payload means is decided by a decoder of its own, in numpy and float64, written from docs/wire.md.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from support.buckets import FLOATS, Args, make
from support.roads import ops

fuzz = functools.partial(
    settings, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
# built: the CUDA kernels on the emulator, with fewer examples, since it is slow.
every_road = pytest.mark.parametrize(("road", "examples"), [("native", 600), ("built", 60)])
# Sizes of the parameters, and the density.
BUCKETS = [
    ((1,), 0.01),
    ((31,), 0.1),
    ((65_535,), 0.001),
    ((65_537,), 0.002),
    ((33, 65_537, 1, 2_000, 31), 0.001),
    ((40, 1, 300), 1.0),
]
# What a careless reader would overflow on.
EDGES = [0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**47, 2**62, 2**63 - 1, -1, -(2**63)]
# NaNs, infinities, the largest finite number, the least denormal, and -0.
VALUES = {
    torch.float32: [0x7FC00000, 0x7F800001, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00000001, 0x80000000],
    torch.bfloat16: [0x7FC0, 0x7F81, 0x7F80, 0xFF80, 0x7F7F, 0x0001, 0x8000],
    torch.float16: [0x7E00, 0x7C01, 0x7C00, 0xFC00, 0x7BFF, 0x0001, 0x8000],
}


def unpack(
    road: Any,
    args: Args,
    payloads: Tensor,
    rank: int,
    out: list[Tensor],
    segments: Tensor | None = None,
    scale: float = 1.0,
) -> list[int]:
    """Calls unpack, for all of this file, and returns each rank's code, and whether an average overflowed."""
    status = torch.full((len(payloads) + 1,), 9, dtype=torch.int32)
    segments = args.segments if segments is None else segments
    road.unpack(payloads, rank, segments, args.workspace, torch.tensor([scale]), args.wire_dtype, out, status)
    return status.tolist()


@functools.cache
def honest(road: str, bucket: int, wire_dtype: torch.dtype) -> tuple[Args, Tensor]:
    """Returns a bucket and the payloads of four ranks: uint8 [4, bytes]. Not to be changed."""
    sizes, density = BUCKETS[bucket]
    ranks = [make(list(sizes), density, wire_dtype=wire_dtype, offset=3, seed=seed) for seed in range(4)]
    for args in ranks:
        ops.compress_(*args.list())
    return ranks[0], torch.stack([args.payload for args in ranks])


def sections(row: np.ndarray, segments: Tensor, wire_dtype: torch.dtype) -> list[np.ndarray]:
    """Returns views of a payload, as docs/wire.md has them: header, used, tile ends, indices, values as integers."""
    sizes, counts = segments[:, 3].numpy(), segments[:, 4].numpy()
    at, views = 0, []
    for dtype, count in (
        ("<i8", 4),
        ("u1", len(sizes)),
        ("<u4", (-(-sizes // 65_536)).sum()),
        ("<u2", counts.sum()),
        (f"<u{wire_dtype.itemsize}", counts.sum()),
    ):
        nbytes = np.dtype(dtype).itemsize * int(count)
        views.append(row[at : at + nbytes].view(dtype))
        at = -(-(at + nbytes) // 16) * 16
    assert at == len(row)
    return views


def tiles_of(segments: Tensor) -> list[tuple[int, int, int]]:
    """Returns each tile's (parameter, first element, elements)."""
    return [(i, at, min(65_536, n - at)) for i, n in enumerate(segments[:, 3].tolist()) for at in range(0, n, 65_536)]


def as_float64(raw: np.ndarray, wire_dtype: torch.dtype) -> np.ndarray:
    if wire_dtype == torch.bfloat16:
        raw, wire_dtype = raw.astype(np.uint32) << 16, torch.float32
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return raw.view(np.float32 if wire_dtype == torch.float32 else np.float16).astype(np.float64)


def decode(row: np.ndarray, own: np.ndarray, segments: Tensor, wire_dtype: torch.dtype):
    """Returns the code of a payload and, where it is sound, each parameter's (used, positions, values)."""
    header, used, ends, indices, raw = sections(row, segments, wire_dtype)
    expected = (int.from_bytes(b"DGCWIRE2", "little"), own[1], own[2])
    for code, (mine, theirs) in enumerate(zip(header[:3], expected, strict=True), start=1):
        if mine != theirs:
            return code, None
    tiles = tiles_of(segments)
    owed = np.cumsum(segments[:, 4].numpy())
    begin, bounds = 0, []
    for t, (i, _, _) in enumerate(tiles):
        end = int(ends[t])
        last_of_parameter = t + 1 == len(tiles) or tiles[t + 1][0] != i
        if end < begin or end > owed[-1] or (last_of_parameter and end != owed[i]):
            return 4, None
        bounds.append((begin, end))
        begin = end
    positions = indices.astype(np.int64)
    for (begin, end), (_, at, n) in zip(bounds, tiles, strict=True):
        inside = positions[begin:end]
        if (np.diff(inside) <= 0).any() or (inside >= n).any():
            return 5, None
        inside += at
    values = as_float64(raw, wire_dtype)
    if not np.isfinite(values).all():
        return 6, None
    parts = zip(used, np.split(positions, owed[:-1]), np.split(values, owed[:-1]), strict=True)
    return 256 * int(header[3] & 1), list(parts)


def encode(row: np.ndarray, segments: Tensor, wire_dtype: torch.dtype, seed: int) -> None:
    """Writes a sound payload below the header: any positions, any finite values."""
    random = np.random.default_rng(seed)
    _, used, ends, indices, raw = sections(row, segments, wire_dtype)
    used[:] = random.integers(0, 256, len(used)) * random.integers(0, 2, len(used))
    entry = tile = 0
    for n, k in segments[:, 3:5].tolist():
        chosen = np.sort(random.choice(n, k, replace=False))
        indices[entry : entry + k] = chosen % 65_536
        tiles = -(-n // 65_536)
        ends[tile : tile + tiles] = entry + np.searchsorted(chosen, 65_536 * np.arange(1, tiles + 1))
        entry, tile = entry + k, tile + tiles
    raw[:] = random.integers(0, 2 ** (8 * wire_dtype.itemsize), len(raw))
    raw[~np.isfinite(as_float64(raw, wire_dtype))] = 0x8000


def damage(rows: np.ndarray, args: Args, rank: int, what: str, at: int, value: int) -> None:
    """Changes one row in place. `at` says where, modulo what there is, and `value` what is written."""
    row = rows[rank]
    header, used, ends, indices, raw = sections(row, args.segments, args.wire_dtype)
    if what == "flip":
        row[at % len(row)] ^= 1 + value % 255
    elif what in ("magic", "step", "fingerprint", "flags"):
        header[("magic", "step", "fingerprint", "flags").index(what)] = value
    elif what == "used":
        used[at % len(used)] = value % 256
    elif what == "end":
        ends[at % len(ends)] = value % 2**32
    elif what == "end by one":
        ends[at % len(ends)] = (int(ends[at % len(ends)]) + (1 if value % 2 else -1)) % 2**32
    elif what == "index":
        indices[at % len(indices)] = value % 2**16
    elif what == "index by one":
        indices[at % len(indices)] = (int(indices[at % len(indices)]) + (1 if value % 2 else -1)) % 2**16
    elif what == "indices swapped":
        i = at % len(indices)
        indices[[i, i - 1]] = indices[[i - 1, i]]
    elif what == "index twice":
        indices[at % len(indices)] = indices[at % len(indices) - 1]
    elif what == "value":
        specials = VALUES[args.wire_dtype]
        raw[at % len(raw)] = specials[value % len(specials)]
    elif what == "noise":
        begin = at % len(row)
        row[begin:] = np.random.default_rng(value % 2**32).integers(0, 256, len(row) - begin)
    elif what == "cut":
        row[at % len(row) :] = 0
    elif what == "rolled":
        row[:] = np.roll(row, 1 + at % 64)
    elif what == "of another rank":
        row[:] = rows[at % len(rows)]
    elif what == "sound":
        encode(row, args.segments, args.wire_dtype, value % 2**32)


DAMAGES = [
    *("flip", "magic", "step", "fingerprint", "flags", "used", "end", "end by one", "index", "index by one"),
    *("indices swapped", "index twice", "noise", "cut", "rolled", "of another rank"),
    # Oftener, since they are reached only where all else is right.
    *["fingerprint", "flags", "value", "sound"] * 2,
]
everywhere = st.integers(-3, 2**20)
int64 = st.one_of(st.sampled_from(EDGES), st.integers(-(2**63), 2**63 - 1), st.integers(0, 300))
some_damage = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(DAMAGES), everywhere, int64), max_size=4)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    ranks = draw(st.integers(1, 4))
    return {
        "bucket": draw(st.integers(0, len(BUCKETS) - 1)),
        "wire_dtype": draw(st.sampled_from(FLOATS)),
        "out_dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        "ranks": ranks,
        "rank": draw(st.integers(0, ranks - 1)),
        "scale": draw(st.sampled_from([1.0, 0.5, 1024.0])),
        "damage": draw(some_damage),
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def refused(road: Any, args: Args, payloads: Tensor, rank: int, segments: Tensor | None = None) -> bool:
    """Returns whether unpack raised; if it did, the gradient has to be as it was."""
    before = torch.arange(1.0, len(args.gradients[0]) + 1)
    out = before.clone()
    try:
        unpack(road, args, payloads, rank, [out], segments)
    except (RuntimeError, ValueError):
        assert torch.equal(out, before)
        return True
    return False
