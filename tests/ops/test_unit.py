"""Selection by whole groups of 32 (unit 32): native and reference against an oracle written from the definition."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dgc.ops import Accumulation, Segments, reference, wire, wire_layout
from support.buckets import FLOATS, Args, compress_both, equal, make, unpack_both
from support.roads import CPU, ROADS, ops

UNIT = 32
SIZES = [32, 64, 4096, 65_536, 70_016, 200_000]


def bucket(sizes: list[int], density: float, by_element: tuple[int, ...] = (), **options) -> Args:
    """Returns make()'s bucket with whole groups chosen, but by single elements in the rows named."""
    args = make(sizes, density, **options)
    rows = []
    for row, (source, offset, state, n, k, _) in enumerate(args.segments.tolist()):
        unit = 1 if row in by_element else UNIT
        rows.append((source, offset, state, n, min(n, math.ceil(k / unit) * unit), unit))
    segments = Segments.from_rows(rows)
    args.segments = segments.table
    args.workspace = ops.workspace(segments.table)
    args.payload = torch.zeros(segments.wire(args.wire_dtype).nbytes, dtype=torch.uint8)
    wire.stamp(args.payload, fingerprint=42).fill_(7)
    if args.sent is not None:
        args.sent = torch.zeros(segments.n_entries)
    return args


def oracle_accumulate(args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Returns u and v after u <- mu*u + h, v <- v + u, each operation rounded, where the new v is finite."""
    u, v = args.momentum.numpy().copy(), args.residual.numpy().copy()
    g = args.gradients[0].float().numpy()
    with np.errstate(all="ignore"):
        for (_, offset, state, n, *_), mu in zip(args.segments.tolist(), args.mu.numpy(), strict=True):
            h = g[offset : offset + n] * args.scale.numpy()[0]
            new_u = mu * u[state : state + n] + h
            new_v = v[state : state + n] + new_u
            finite = np.isfinite(new_v)
            u[state : state + n][finite] = new_u[finite]
            v[state : state + n][finite] = new_v[finite]
    return u, v


def oracle_choice(v: np.ndarray, k: int, unit: int) -> list[int]:
    """Returns the k chosen elements, rising: of the k / unit groups with the largest |v|, ties to the smaller index."""
    groups = [max(abs(float(x)) for x in v[at : at + unit]) for at in range(0, len(v), unit)]
    best = sorted(range(len(groups)), key=lambda i: (-groups[i], i))[: k // unit]
    return [i * unit + j for i in sorted(best) for j in range(unit)]


def check_against_the_oracle(args: Args) -> None:
    u, v = oracle_accumulate(args)
    chosen = []
    for _, _, state, n, k, unit in args.segments.tolist():
        chosen.append(oracle_choice(v[state : state + n], k, unit))
    compress_both(args)
    entry = 0
    for row, (_, _, state, _, k, _) in enumerate(args.segments.tolist()):
        sent = args.entries(row)
        assert list(sent) == chosen[row]
        at = state + np.array(chosen[row])
        values = np.array(list(sent.values()), dtype=np.float32)
        largest = torch.finfo(args.wire_dtype).max
        rounded = torch.from_numpy(v[at]).clamp(-largest, largest).to(args.wire_dtype).float().numpy()
        assert np.array_equal(values, rounded)
        assert args.sent[entry : entry + k].tolist() == u[at].tolist()
        v[at] -= values
        u[at] = np.where(values != 0, np.float32(0), u[at])
        entry += k
    assert np.array_equal(args.residual.numpy(), v)
    assert np.array_equal(args.momentum.numpy(), u)


@pytest.mark.parametrize("density", [0.0001, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_the_chosen_groups_are_the_oracles(size, density):
    check_against_the_oracle(bucket([size], density))


@pytest.mark.parametrize("wire_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_for_every_type(dtype, wire_dtype):
    check_against_the_oracle(bucket([70_016, 96], 0.01, dtype=dtype, wire_dtype=wire_dtype))


def test_units_may_differ_from_parameter_to_parameter():
    check_against_the_oracle(bucket([70_016, 5000, 64, 70_001, 131_072], 0.01, by_element=(1, 3)))


def ties(n: int, seed: int, levels: int) -> torch.Tensor:
    return torch.randint(-levels, levels + 1, (n,), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("density", [0.001, 0.05, 0.5])
@pytest.mark.parametrize(
    "fill",
    [
        lambda n: torch.zeros(n),
        lambda n: torch.ones(n),
        lambda n: -torch.ones(n),
        lambda n: ties(n, 1, 1),
        lambda n: ties(n, 2, 40),
        lambda n: torch.arange(n).remainder(64).eq(63).float(),
        lambda n: torch.where(torch.arange(n) < n // 2, 0.0, 1.0),
        lambda n: torch.zeros(n).index_fill_(0, torch.tensor([5, n - 1]), 2.0),
    ],
    ids=["zeros", "ones", "minus ones", "three values", "many values", "periodic", "late", "two"],
)
def test_ties_go_to_the_smaller_index(fill, density):
    args = bucket([140_032, 96], density)
    args.momentum.zero_()
    args.residual.zero_()
    args.gradients[0].copy_(fill(140_128))
    check_against_the_oracle(args)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_left_out_entries_do_not_lift_their_group(bad):
    args = bucket([70_016, 64, 160], 0.01)
    args.gradients[0][[3, 40, 41, 69_000, 70_016 + 33]] = bad
    args.gradients[0][70_016 + 64 :] = bad  # nothing of the last one is finite
    check_against_the_oracle(args)
    assert args.used == [3, 3, 3]
    assert args.flags == wire.NON_FINITE


def test_without_momentum_and_with_nesterov():
    compress_both(bucket([70_016, 96], 0.01, rule=Accumulation.SUM))
    compress_both(bucket([70_016, 96], 0.01, masking=False))
    compress_both(bucket([70_016, 96], 0.01, rule=Accumulation.NESTEROV))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_does_not_matter(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compress_both(bucket([1_500_000 // 32 * 32, 70_016], 0.001))
    finally:
        torch.set_num_threads(before)


def test_many_steps():
    args = bucket([70_016, 320], 0.003)
    for step in range(6):
        args.gradients[0].copy_(torch.randn(70_336, generator=torch.Generator().manual_seed(step)))
        check_against_the_oracle(args)


@pytest.mark.parametrize("wire_dtype", FLOATS)
def test_restore_gives_back_the_groups_of_the_chosen_parameters(wire_dtype):
    args = bucket([70_016, 96, 4096], 0.01, by_element=(1,), wire_dtype=wire_dtype)
    u, v = oracle_accumulate(args)
    compress_both(args)
    taken = args.clone()
    which = torch.tensor([1, 0, 1], dtype=torch.uint8)
    expected = args.clone()
    for road, a in ((reference, expected), (ops, args)):
        call = (a.payload, which, a.segments, a.workspace, a.sent, a.momentum, a.residual, a.wire_dtype)
        road.restore_(*call)
    equal(args, expected)
    for row, (_, _, state, n, *_) in enumerate(args.segments.tolist()):
        mine = slice(state, state + n)
        after_u, after_v = (u, v) if which[row] else (taken.momentum.numpy(), taken.residual.numpy())
        assert np.array_equal(args.momentum.numpy()[mine], after_u[mine])
        assert np.array_equal(args.residual.numpy()[mine], after_v[mine])


def test_unpack_averages_the_groups_of_all_ranks():
    ranks = []
    for seed in range(3):
        args = bucket([70_016, 96, 4096], 0.01, by_element=(1,), seed=seed)
        ranks.append(compress_both(args))
    payloads = torch.stack([a.payload for a in ranks])
    out, status = unpack_both(ranks[0], payloads)
    assert status == [0, 0, 0, 0]
    for row, (_, offset, _, n, *_) in enumerate(ranks[0].segments.tolist()):
        total = np.zeros(n, dtype=np.float32)
        for a in ranks:
            sent = a.entries(row)
            total[list(sent)] += np.array(list(sent.values()), dtype=np.float32)
        assert np.array_equal(out.numpy()[offset : offset + n], total * (np.float32(1) / np.float32(3)))


def test_the_wire_is_the_same():
    args = bucket([70_016], 0.01)
    by_element = replace(args, segments=args.segments.clone()).clone()
    by_element.segments[:, 5] = 1
    assert wire_layout(args.segments, torch.float32) == wire_layout(by_element.segments, torch.float32)


@pytest.mark.parametrize(
    ("numel", "entries", "unit"),
    [(96, 32, 0), (96, 32, 2), (96, 32, -32), (96, 32, 64), (96, 33, 32), (95, 32, 32), (96, 32, 2**40)],
)
@pytest.mark.parametrize("road", ["native", "reference", "built", "jit"])
def test_other_units_are_refused(road, numel, entries, unit):
    args = make([96])
    args.segments = torch.tensor([[0, 0, 0, numel, entries, unit]])
    args.payload = torch.zeros(1000, dtype=torch.uint8)
    op = reference if road == "reference" else ROADS[road]()
    with pytest.raises(RuntimeError, match="segments: expected unit 1, or 32 with numel and entries multiples of it"):
        op.compress_(*args.list())
    assert args.payload.count_nonzero() == 0


@pytest.mark.parametrize("road", ["built", "jit"])
def test_cuda_selects_by_element_only(road):
    op = ROADS[road]()
    args = bucket([96], 0.3)
    for call in (lambda: op.compress_(*args.list()), lambda: op.workspace(args.segments)):
        with pytest.raises(RuntimeError, match="segments: expected unit 1 on CUDA, got 32"):
            call()
    from dgc.ops import cuda

    with pytest.raises(RuntimeError, match="segments: expected unit 1 on CUDA, got 32"):
        cuda.workspace(args.segments, CPU)
