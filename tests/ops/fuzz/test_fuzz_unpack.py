"""Bytes from elsewhere are not to be trusted: neither unpack nor load_state_dict crash, or write what they should not.

The damage is drawn by hypothesis, the same at each run. What a payload means is decided by a decoder of its own, in
numpy and float64, written from docs/wire.md.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.alone import Alone
from support.buckets import Args, make
from support.models import normals
from support.roads import ops
from torch import Tensor

import dgc
from dgc.ops import reference, wire

fuzz = functools.partial(
    settings, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
# built: the CUDA kernels on the emulator, with fewer examples, since it is slow.
every_road = pytest.mark.parametrize(("road", "examples"), [("native", 600), ("built", 60)])

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
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


@pytest.fixture(autouse=True)
def one_thread_and_native_afterwards():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    yield
    torch.set_num_threads(threads)
    ops.take("native")


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
    expected = (int.from_bytes(b"DGCWIRE1", "little"), own[1], own[2])
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
    for n, k in segments[:, 3:].tolist():
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


def average(
    parts: list[Any], segments: Tensor, before: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Returns the averages that docs/wire.md asks for; those of the magnitudes, which bound rounding errors.

    And the places where NaN has to stand if a rank has left entries out.
    """
    result, size = before.copy(), np.zeros_like(before)
    first = []
    for i, (_, offset, _, n, _) in enumerate(segments.tolist()):
        total, magnitudes = np.zeros(n), np.zeros(n)
        if any(rank[i][0] & 1 for rank in parts):
            first.append(offset)
            for _, positions, values in (rank[i] for rank in parts):
                total[positions] += values
                magnitudes[positions] += abs(values)
        result[offset : offset + n] = scale * total / len(parts)
        size[offset : offset + n] = scale * magnitudes / len(parts)
    return result, size, first


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_unpack(road: str, case: dict[str, Any], seen: Counter[str]) -> None:
    args, payloads = honest(road, case["bucket"], case["wire_dtype"])
    payloads, rank = payloads[: case["ranks"]].clone(), case["rank"]
    for victim, what, at, value in case["damage"]:
        damage(payloads.numpy(), args, victim % len(payloads), what, at, value)
    sent = payloads.clone()
    own = wire.header(payloads)[rank].numpy()
    decoded = [decode(row, own, args.segments, args.wire_dtype) for row in payloads.numpy()]
    codes = [code for code, _ in decoded]
    seen.update(map(str, codes))

    before = torch.arange(1, len(args.gradients[0]) + 6).to(case["out_dtype"])
    if not any(code % 256 for code in codes):  # as compress_ leaves them; else whatever is there has to stay
        for _, offset, _, n, _ in args.segments.tolist():
            before[offset : offset + n] = 0
    out, expected = before.clone(), before.clone()
    *statuses, overflowed = unpack(ops, args, payloads, rank, [out], scale=case["scale"])
    assert statuses == codes
    assert unpack(reference, args, payloads, rank, [expected], scale=case["scale"]) == [*codes, overflowed]
    assert torch.equal(payloads, sent)

    wrong = [r for r, code in enumerate(codes) if code % 256]
    if wrong:
        assert overflowed == 0
        assert same_bits(out, before)
        assert same_bits(expected, before)
        with pytest.raises(wire.PayloadError, match=f"^payload of rank {wrong[0]}: "):
            wire.check_status(codes, payloads)
        return
    assert wire.check_status(codes, payloads) == [r for r, code in enumerate(codes) if code]
    parts = [parts for _, parts in decoded]
    exact, size, first = average(parts, args.segments, before.double().numpy(), case["scale"])
    marked = np.zeros(len(before), dtype=bool)
    marked[first] = any(codes)
    assert out[marked].isnan().all()
    assert same_bits(out[~marked], expected[~marked])
    limits = torch.finfo(case["out_dtype"])
    sent_to = size > 0
    if abs(exact[sent_to]).max(initial=0) > 1.001 * limits.max:
        assert overflowed == 1
    if overflowed:
        assert not out[torch.from_numpy(sent_to)].isfinite().all()
    if overflowed or (size * len(payloads)).max() * max(1, 1 / case["scale"]) > 3.4e38:
        seen["overflow"] += 1
        return
    seen["average"] += 1
    # A sum of N in float32, a product, and the rounding to the type of the gradient; 0 where nothing was sent.
    tolerance = (len(payloads) + 1) * 2.0**-24 * size + limits.eps * abs(exact) + limits.smallest_normal * limits.eps
    inside = np.zeros(len(before), dtype=bool)
    for _, offset, _, n, _ in args.segments.tolist():
        inside[offset : offset + n] = True
    error = abs(out.double().numpy()[inside & ~marked] - exact[inside & ~marked])
    assert (error <= np.where(sent_to, tolerance, 0)[inside & ~marked]).all()
    assert same_bits(out[~inside], before[~inside])


@every_road
def test_damaged_payloads_are_refused_by_rank_and_sound_ones_averaged(road, examples):
    ops.take(road)
    seen: Counter[str] = Counter()

    @fuzz(max_examples=examples)
    @given(cases())
    def run(case):
        check_unpack(road, case, seen)

    run()
    # Neither all refused nor all accepted, or this says little.
    assert seen["average"] > examples / 10, seen
    assert seen.keys() >= {"0", "1", "2", "3", "4", "5", "6", "256"} or road != "native", seen


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


@every_road
def test_rows_of_a_wrong_length_and_ranks_that_are_not_there_are_errors(road, examples):
    ops.take(road)

    @fuzz(max_examples=examples // 3)
    @given(
        st.integers(0, len(BUCKETS) - 1),
        st.sampled_from(FLOATS),
        st.one_of(st.just(0), st.integers(-40, 40), st.integers(-(2**17), 2**17)),
        st.one_of(st.integers(-2, 4), int64),
    )
    def run(bucket, wire_dtype, longer, rank):
        args, payloads = honest(road, bucket, wire_dtype)
        rows = torch.zeros(3, max(0, payloads.size(1) + longer), dtype=torch.uint8)
        common = min(rows.size(1), payloads.size(1))
        rows[:, :common] = payloads[:3, :common]
        fits = rows.size(1) == payloads.size(1) and 0 <= rank < 3
        assert refused(ops, args, rows, rank) == (not fits)
        assert refused(reference, args, rows, rank) == (not fits)

    run()


@every_road
def test_payloads_that_are_no_plain_rows_are_errors(road, examples):
    ops.take(road)
    for bucket in range(len(BUCKETS)):
        args, payloads = honest(road, bucket, torch.float32)
        for wrong in (
            payloads[0],
            payloads[None],
            payloads[:0],
            payloads.to(torch.int8),
            payloads.repeat_interleave(2, 1)[:, ::2],
            payloads.t().contiguous().t(),
        ):
            assert refused(ops, args, wrong, 0)
        for away in range(1, 16):  # no header, no value at its own multiple
            elsewhere = torch.zeros(payloads.numel() + away, dtype=torch.uint8)[away:].view_as(payloads)
            assert refused(ops, args, elsewhere.copy_(payloads), 0)


def apart(spans: list[tuple[int, int]], room: int) -> bool:
    """Returns whether spans of (first element, elements) lie in [0, room) and do not overlap."""
    return all(0 <= at <= room - n for at, n in spans) and all(
        a + n <= b or b + m <= a for (a, n), (b, m) in itertools.combinations(spans, 2)
    )


def test_a_malformed_segment_table_is_an_error_for_every_op():
    """The table never comes from another rank, but out of bounds is out of bounds. The reference trusts it."""
    seen: Counter[bool] = Counter()
    which = torch.ones(4, dtype=torch.uint8)
    cells = st.one_of(int64, st.sampled_from([2**32, 2**46, 2**47 - 1, 2**53]), st.integers(-40, 200))

    @fuzz(max_examples=300)
    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), cells), max_size=4))
    def run(changes):
        args = make([64, 32, 100, 1], 0.1)
        ops.compress_(*args.list())
        for row, column, value in changes:
            args.segments[row, column] = value
        table = args.segments.tolist()
        rows_fit = all(0 < entries <= n for *_, n, entries in table)
        state_fits = rows_fit and apart([(state, n) for _, _, state, n, _ in table], len(args.residual))
        gradient_fits = rows_fit and all(source == 0 for source, *_ in table)
        gradient_fits &= apart([(offset, n) for _, offset, _, n, _ in table], len(args.gradients[0]))
        fits = state_fits and gradient_fits
        seen[fits] += 1
        if fits:  # its payload has another size
            args.payload = torch.zeros(wire.wire_layout(args.segments, torch.float32).nbytes, dtype=torch.uint8)
            wire.stamp(args.payload, fingerprint=42).fill_(7)
            args.sent_momentum = torch.zeros(int(args.segments[:, 4].sum()))
            args.workspace = ops.workspace(args.segments)
        state = (args.sent_momentum, args.momentum, args.residual)
        restore = (args.payload, which, args.segments, args.workspace, *state, torch.float32)
        before = args.clone()
        if fits:
            ops.compress_(*args.list())
            assert not refused(ops, args, args.payload.view(1, -1), 0)
            ops.restore_(*restore)
            return
        with pytest.raises(RuntimeError):
            ops.compress_(*args.list())
        if not gradient_fits:
            assert refused(ops, args, args.payload.view(1, -1), 0)
        if not state_fits:
            with pytest.raises(RuntimeError):
                ops.restore_(*restore)
            assert torch.equal(args.residual, before.residual)
        assert torch.equal(args.payload, before.payload)

    run()
    assert min(seen[True], seen[False]) > 3, seen


def test_a_segment_table_whose_sums_overflow_is_an_error():
    # 2^17 rows, each within its limits, of 2^47 entries in all.
    table = torch.tensor([[0, 0, 0, 2**47 - 1, 2**47 - 1]]).repeat(2**17, 1)
    args = make([64])
    assert refused(ops, args, args.payload.view(1, -1), 0, table)
    with pytest.raises(RuntimeError, match="segments"):
        ops.compress_(*replace(args, segments=table).list())


def test_a_huge_segment_is_refused_before_memory_is_taken_for_it():
    args = make([64])
    table = torch.tensor([[0, 0, 0, 2**47 - 1, 1]])
    call = (args.payload, torch.ones(1, dtype=torch.uint8), table, args.workspace, None, None, args.residual)
    with pytest.raises(RuntimeError, match="payload: expected"):
        ops.restore_(*call, torch.float32)


SPECIALS = [
    0.0,
    -0.0,
    1e-45,
    -1e-42,
    1.17549435e-38,
    1e-7,
    1.0,
    65504.0,
    65520.0,
    -7e4,
    3e8,
    1e20,
    torch.finfo(torch.float32).max,
]
NON_FINITE = [float("inf"), float("-inf"), float("nan")]


@st.composite
def gradients(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "bucket": draw(st.sampled_from([0, 1, 4, 4, 5])),
        "dtype": draw(st.sampled_from(FLOATS)),
        "wire_dtype": draw(st.sampled_from(FLOATS)),
        "momentum": draw(st.booleans()),
        "nesterov": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
        "exponent": draw(st.integers(-45, 38)),
        "scale": draw(st.sampled_from([1.0, 1.0, 0.3, 2.0**-16, 2.0**16])),
        "specials": draw(st.lists(st.tuples(everywhere, st.sampled_from(SPECIALS + NON_FINITE)), max_size=20)),
        "which": draw(st.lists(st.integers(0, 1), min_size=5, max_size=5)),
    }


@every_road
def test_restore_undoes_compress_to_the_bit(road, examples):
    ops.take(road)
    seen: Counter[str] = Counter()

    @fuzz(max_examples=examples // 3)
    @given(gradients())
    def run(case):
        sizes, density = BUCKETS[case["bucket"]]
        args = make(
            list(sizes),
            density,
            case["dtype"],
            case["wire_dtype"],
            momentum=case["momentum"],
            nesterov=case["nesterov"],
            scale=case["scale"],
            seed=case["seed"],
        )
        gradient = args.gradients[0]
        gradient *= 10.0 ** case["exponent"]
        for at, value in case["specials"]:
            gradient[at % len(gradient)] = value
        args.residual *= 10.0 ** (case["exponent"] // 2)
        args.residual += 0.0  # no -0: no sum of another number gives it, and it would come back as 0
        accumulated = args.clone()
        for row, (_, offset, state, n, _) in enumerate(args.segments.tolist()):
            u, v = (None if x is None else x[state : state + n] for x in (accumulated.momentum, accumulated.residual))
            h = gradient[offset : offset + n].float() * args.scale
            reference.accumulate_(u, v, h, float(args.mu[row]), case["nesterov"])
        ops.compress_(*args.list())
        seen["non-finite"] += args.flags
        which = torch.tensor(case["which"][: len(sizes)], dtype=torch.uint8)
        compressed = args.clone()
        state = (args.sent_momentum, args.momentum, args.residual)
        ops.restore_(args.payload, which, args.segments, args.workspace, *state, args.wire_dtype)
        for name in ("momentum", "residual"):
            after = getattr(args, name)
            if after is None:
                continue
            assert after.isfinite().all()
            for row, (_, _, at, n, _) in enumerate(args.segments.tolist()):
                expected = getattr(accumulated if which[row] else compressed, name)[at : at + n]
                # Where float16 saturates so far below v, v - w is rounded (docs/wire.md).
                rounded = (expected.abs() >= 2.0**29) & (case["wire_dtype"] == torch.float16)
                result = after[at : at + n]
                torch.testing.assert_close(result[rounded], expected[rounded], rtol=2.0**-23, atol=0)
                assert same_bits(result[~rounded], expected[~rounded]), (name, row)

    run()
    assert examples / 50 < seen["non-finite"] < examples, seen


@every_road
def test_restore_of_a_damaged_payload_stays_inside_its_segments(road, examples):
    ops.take(road)

    @fuzz(max_examples=examples // 3)
    @given(cases())
    def run(case):
        args, payloads = honest(road, case["bucket"], case["wire_dtype"])
        rows = payloads.clone()
        for victim, what, at, value in case["damage"]:
            damage(rows.numpy(), args, victim, what, at, value)
        which = torch.ones(len(args.segments), dtype=torch.uint8)
        row = rows[0].clone()
        _, _, ends, indices, _ = sections(row.numpy(), args.segments, args.wire_dtype)
        entry, fits = 0, True
        for (_, _, n), end in zip(tiles_of(args.segments), ends.tolist(), strict=True):
            fits &= end <= len(indices) and bool((indices[entry:end] < n).all())
            entry = max(entry, end)
        behind = torch.zeros(65_536)
        v = torch.cat([args.residual, behind])
        call = (row, which, args.segments, args.workspace, None, None, v, args.wire_dtype)
        if fits or road != "native":  # a kernel leaves out what does not fit
            ops.restore_(*call)
        else:
            with pytest.raises(RuntimeError, match="payload: expected"):
                ops.restore_(*call)
        assert torch.equal(v[-len(behind) :], behind)

    run()


# state_dict()

STATE_SHAPES = {"a": (30, 7), "b": (5,), "c": (4, 4)}
scalars = st.one_of(st.none(), st.booleans(), st.sampled_from(EDGES), st.floats(), st.text(max_size=5), st.binary())


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.sampled_from([*STATE_SHAPES.values(), (), (0,), (7, 30), (1, 30, 7)]))
    dtype = draw(st.sampled_from([*[torch.float32] * 4, torch.float64, torch.float16, torch.int64, torch.complex64]))
    tensor = torch.full(shape, draw(st.sampled_from([0, 1, 3])), dtype=dtype)
    if tensor.numel() and tensor.is_floating_point():
        at = draw(st.integers(0, tensor.numel() - 1))
        tensor.view(-1)[at] = draw(st.sampled_from([1.0, np.nan, np.inf, -np.inf]))
    disguises = [
        *[lambda t: t] * 4,
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
        lambda t: torch.nested.nested_tensor([t]),
        lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
        lambda t: t[..., :1].expand(t.shape) if t.dim() else t,
    ]
    return draw(st.sampled_from(disguises))(tensor)


values = st.one_of(scalars, tensors(), st.lists(scalars, max_size=3), st.dictionaries(st.text(max_size=2), tensors()))
names = st.one_of(st.sampled_from([*STATE_SHAPES, "z"]), st.integers(0, 3))
KEYS = [
    "version",
    "ranks",
    "rank",
    "world_size",
    "step",
    "dense",
    "density",
    "diverged",
    "momentum",
    "residual",
    "other",
]
# A key, the name below it or none, and what stands there then; without a value it is deleted.
some_edits = st.lists(
    st.tuples(st.sampled_from(KEYS), st.one_of(st.none(), names), st.one_of(st.just(...), values)), max_size=3
)


def own(state: dgc.DGCState) -> dict[str, Any]:
    """Returns the share of the only rank."""
    share: dict[str, Any] = state.state_dict()["ranks"]["0"]
    return share


def edit(state_dict: dict[str, Any], key: str, name: Any, value: Any) -> None:
    """Changes one entry, or one below it."""
    target, where = state_dict, key
    if name is not None and isinstance(state_dict.get(key), dict):
        target, where = state_dict[key], name
    if value is ...:
        target.pop(where, None)
    else:
        target[where] = value


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_damaged_state_dict_is_refused_or_fits():
    config = dgc.DGCConfig(density=0.1, dense_below=0)
    trained, one = (Alone(STATE_SHAPES, config, lr=0.5, momentum=0.5) for _ in range(2))
    for step in range(3):
        trained.train(normals(STATE_SHAPES, step))
    seen: Counter[str] = Counter()

    @fuzz(max_examples=1500)
    @given(st.lists(some_edits, min_size=1, max_size=3), st.booleans())
    def run(edits_by_rank, as_before):
        state_dicts = []
        for rank, edits in enumerate(edits_by_rank):
            share = dict(own(trained.state))
            share.update(rank=rank, world_size=len(edits_by_rank))
            for key in ("momentum", "residual"):
                share[key] = {name: t.clone() for name, t in share[key].items()}
            state_dict = {"version": 1, **share} if as_before else {"version": 2, "ranks": {str(rank): share}}
            for key, name, value in edits:
                edit(state_dict if as_before or key in ("version", "ranks") else share, key, name, value)
            state_dicts.append(state_dict)
        before = own(one.state)
        before = {k: {n: t.clone() for n, t in v.items()} if isinstance(v, dict) else v for k, v in before.items()}
        error = None
        try:
            one.state.load_state_dict(state_dicts)
        except ValueError as caught:
            error = str(caught)
        seen["loaded" if error is None else "refused"] += 1
        if error is not None:
            assert error.startswith("state_dict")
            after = own(one.state)
            for key, value in before.items():
                if isinstance(value, dict):
                    assert all(same_bits(after[key][n].contiguous(), t.contiguous()) for n, t in value.items())
                else:
                    assert after[key] == value
        memory = one.state.memory
        assert memory.residual.isfinite().all()
        assert memory.momentum is None or memory.momentum.isfinite().all()
        assert not memory.residual.requires_grad

    run()
    assert min(seen["refused"], seen["loaded"]) > 30, seen
    one.train(normals(STATE_SHAPES, 9))  # and it goes on
