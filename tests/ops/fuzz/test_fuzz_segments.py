"""Segment tables that are malformed or too large are errors for every op."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dgc.ops import wire, wire_layout
from support.buckets import make
from support.payloads import (
    fuzz,
    int64,
    refused,
)
from support.roads import ops

pytestmark = pytest.mark.usefixtures("one_thread")


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
        state_fits = rows_fit and apart([(state, n) for _, _, state, n, *_ in table], len(args.residual))
        gradient_fits = rows_fit and all(source == 0 for source, *_ in table)
        gradient_fits &= apart([(offset, n) for _, offset, _, n, *_ in table], len(args.gradients[0]))
        fits = state_fits and gradient_fits
        seen[fits] += 1
        if fits:  # its payload has another size
            args.payload = torch.zeros(wire_layout(args.segments, torch.float32).nbytes, dtype=torch.uint8)
            wire.stamp(args.payload, fingerprint=42).fill_(7)
            args.sent = torch.zeros(int(args.segments[:, 4].sum()))
            args.workspace = ops.workspace(args.segments)
        state = (args.sent, args.momentum, args.residual)
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
