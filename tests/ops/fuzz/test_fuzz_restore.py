"""The op restore_ undoes compress_ to the bit, and stays inside its segments whatever the payload says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dgc.ops import Accumulation, reference
from support.buckets import FLOATS, make
from support.payloads import (
    BUCKETS,
    cases,
    damage,
    every_road,
    everywhere,
    fuzz,
    honest,
    same_bits,
    sections,
    tiles_of,
)
from support.roads import ops

pytestmark = pytest.mark.usefixtures("one_thread")

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
        "rule": draw(st.sampled_from(Accumulation)),
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
            rule=case["rule"],
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
        for row, (_, offset, state, n, *_) in enumerate(args.segments.tolist()):
            *kept, v = (x[state : state + n] for x in (*accumulated.kept, accumulated.residual))
            h = gradient[offset : offset + n].float() * args.scale
            reference.accumulate_(case["rule"], kept, v, h, args.numbers[:, row])
        ops.compress_(*args.list())
        seen["non-finite"] += args.flags
        which = torch.tensor(case["which"][: len(sizes)], dtype=torch.uint8)
        compressed = args.clone()
        state = (args.sent, args.momentum, args.residual)
        ops.restore_(args.payload, which, args.segments, args.workspace, *state, args.wire_dtype)
        for name in ("momentum", "residual"):
            after = getattr(args, name)
            if after is None:
                continue
            assert after.isfinite().all()
            for row, (_, _, at, n, *_) in enumerate(args.segments.tolist()):
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
