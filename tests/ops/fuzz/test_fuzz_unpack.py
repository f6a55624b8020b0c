"""Payloads from elsewhere are not to be trusted: unpack does not crash on them, or write what it should not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dgc.ops import reference, wire
from support.buckets import FLOATS
from support.payloads import (
    BUCKETS,
    cases,
    damage,
    decode,
    every_road,
    fuzz,
    honest,
    int64,
    refused,
    same_bits,
    unpack,
)
from support.roads import ops

pytestmark = pytest.mark.usefixtures("one_thread")


def average(
    parts: list[Any], segments: Tensor, before: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Returns the averages that docs/wire.md asks for; those of the magnitudes, which bound rounding errors.

    And the places where NaN has to stand if a rank has left entries out.
    """
    result, size = before.copy(), np.zeros_like(before)
    first = []
    for i, (_, offset, _, n, *_) in enumerate(segments.tolist()):
        total, magnitudes = np.zeros(n), np.zeros(n)
        if any(rank[i][0] & 1 for rank in parts):
            first.append(offset)
            for _, positions, values in (rank[i] for rank in parts):
                total[positions] += values
                magnitudes[positions] += abs(values)
        result[offset : offset + n] = scale * total / len(parts)
        size[offset : offset + n] = scale * magnitudes / len(parts)
    return result, size, first


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
        for _, offset, _, n, *_ in args.segments.tolist():
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
    for _, offset, _, n, *_ in args.segments.tolist():
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
