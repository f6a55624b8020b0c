"""The op compress_ against plain PyTorch, bit for bit, and against the equations."""

import itertools
import math

import pytest
import torch

from dgc.ops import Accumulation, Segments, cuda, wire, wire_layout
from support.buckets import FLOATS, compress_both, make, unpack_both
from support.roads import AVAILABLE, ops

pytestmark = pytest.mark.usefixtures("road")

# Where much is tried, jit is left out: its kernels are built's.
every_kernel = pytest.mark.parametrize("road", [name for name in AVAILABLE if name != "jit"], indirect=True)
SIZES = [[1], [31], [33, 1, 64], [65535], [65537], [100_000, 1, 33, 70_000]]


@every_kernel
@pytest.mark.parametrize(
    ("sizes", "density"),
    [(sizes, density) for sizes in SIZES for density in (0.001, 0.01, 0.25, 1.0) if sum(sizes) * density < 20_000],
    ids=str,
)
def test_op_equals_reference_for_every_type(sizes, density):
    for dtype, wire_dtype, rule in itertools.product(FLOATS, FLOATS, Accumulation):
        args = make(sizes, density, dtype, wire_dtype, rule=rule, offset=3, scale=0.7, decay=0.9)
        compress_both(args)
        other = args.clone()
        other.gradients[0].neg_()
        compress_both(other)
        unpack_both(args, torch.stack([args.payload, other.payload, args.payload]), 2, dtype)


def special(kind: str, n: int) -> torch.Tensor:
    index = torch.arange(n)
    return {
        "zeros": torch.zeros(n),
        "negative zeros": torch.full((n,), -0.0),
        "all equal": torch.full((n,), -2.5),
        "few values": (index % 7 - 3).float(),
        "one": (index == n - 1).float(),
        "fewer than k": torch.where(index % 5000 == 17, index.float(), 0.0),
        "large then zeros": torch.where(index < 40, 3.0, 0.0),
        "denormal": index.float() * 1e-42,
        "rising": index.float(),
        # Every second group is in the sample, and only there are large entries, too few: the guess must be refused.
        "misleading sample": torch.where((index % 64 == 0) & (index < 64 * 500), 100.0, 1e-3 * (index % 97)),
        # The threshold is guessed from the first tile, and then from every 16th.
        "loud first tile": (index % 997 - 498.0) * (1 + 9 * (index < 65_536)),
        "quiet first tile": (index % 997 - 498.0) * (10 - 9 * (index < 65_536)),
        "ever louder tiles": (index % 997 - 498.0) * (1 + index // 65_536),
        "ever quieter tiles": (index % 997 - 498.0) / (1 + index // 65_536),
        "nearly overflowing": torch.where(index % 2 == 0, 3e38, -3e38),
        "half overflow": 65504.0 + index.float(),
        "half tiny": 2.0**-26 * (index % 64).float(),
    }[kind]


KINDS = [
    "zeros",
    "negative zeros",
    "all equal",
    "few values",
    "one",
    "fewer than k",
    "large then zeros",
    "denormal",
    "rising",
    "misleading sample",
    "loud first tile",
    "quiet first tile",
    "ever louder tiles",
    "ever quieter tiles",
    "nearly overflowing",
    "half overflow",
    "half tiny",
]


@every_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.001, 0.02, 0.3], ids=str)
def test_op_equals_reference_on_hard_data(road, kind, density):
    # 700,000 elements have groups enough for the CPU to guess the threshold from a sample; the kernels guess nothing.
    rules = [*[Accumulation.MOMENTUM] * 3, Accumulation.ADAM]
    sizes = (70_000, 140_000 if road == "built" else 700_000, 100, 3_000)
    for wire_dtype, n, rule in zip([*FLOATS, torch.float32], sizes, rules, strict=True):
        args = make([n], density, wire_dtype=wire_dtype, rule=rule)
        args.gradients[0].copy_(special(kind, n))
        for tensor in (*args.kept, args.residual):
            tensor.zero_()
        compress_both(args)
        compress_both(args)
        unpack_both(args, args.payload.view(1, -1))


@every_kernel
@pytest.mark.parametrize("seed", range(40))
def test_op_equals_reference_on_random_shapes(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [int(10 ** (5 * torch.rand(1, generator=generator))) for _ in range(6)]
    density = float(10 ** (-3.5 * torch.rand(1, generator=generator)))
    args = make(
        sizes,
        density,
        FLOATS[seed % 3],
        FLOATS[seed // 3 % 3],
        seed=seed,
        masking=seed % 8 < 4,
        offset=seed,
        rule=Accumulation(seed % 4),
    )
    for _ in range(3):
        compress_both(args)


def test_exactly_the_k_largest_are_sent_ties_to_the_smaller_index():
    args = make([1000], 0.005)
    args.gradients[0].copy_(torch.arange(1000) % 10)
    args.momentum.zero_()
    args.residual.zero_()
    compress_both(args)
    # A hundred entries are 9; five are sent.
    assert args.entries(0) == {9: 9.0, 19: 9.0, 29: 9.0, 39: 9.0, 49: 9.0}


@pytest.mark.parametrize("wire_dtype", FLOATS)
def test_nothing_is_lost_to_the_bit(wire_dtype):
    args = make([70_000, 5_000], 0.01, wire_dtype=wire_dtype)
    args.gradients[0] *= 1e5  # beyond what float16 can say
    before = args.residual.double() + 0
    mu_u, gradient = args.momentum.clone(), args.gradients[0].clone()
    ops.compress_(*args.list())
    for row, (_, offset, state, n, k) in enumerate(args.segments.tolist()):
        mine = slice(state, state + n)
        u = args.mu[row] * mu_u[mine] + gradient[offset : offset + n]
        accumulated = (before[mine].float() + u).double()
        sent = torch.zeros(n, dtype=torch.float64)
        for index, value in args.entries(row).items():
            sent[index] = value
        assert len(args.entries(row)) == k
        assert torch.equal(args.residual[mine].double() + sent, accumulated)


def test_masking_zeroes_momentum_only_where_something_was_sent():
    args = make([1000], 0.01)
    u = args.mu[0] * args.momentum[:1000] + args.gradients[0]
    ops.compress_(*args.list())
    sent = sorted(args.entries(0))
    assert args.momentum[sent].tolist() == [0.0] * 10
    assert torch.equal(args.sent, u[sent])
    u[sent] = 0
    assert torch.equal(args.momentum[:1000], u)


def test_a_value_too_small_for_the_wire_is_not_sent_and_not_masked():
    args = make([10], 0.1, wire_dtype=torch.float16)
    args.gradients[0].fill_(1e-9)
    args.momentum.zero_()
    args.residual.zero_()
    compress_both(args)
    assert args.entries(0) == {0: 0.0}
    assert args.residual[0] == args.residual[1] > 0
    assert args.momentum[0] == args.momentum[1] > 0


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rule", list(Accumulation)[1:])
def test_a_non_finite_gradient_leaves_its_entry_alone_and_raises_the_flag(bad, dtype, rule):
    args = make([70_000, 100], 0.001, dtype, rule=rule)
    where = torch.tensor([0, 77, 69_999, 70_050])
    args.gradients[0][where] = bad
    state = torch.tensor([0, 77, 69_999, 70_016 + 50])
    args.residual[state] = 1e-6  # too small to be sent
    before = [x[state] for x in (*args.kept, args.residual)]
    compress_both(args)
    assert args.flags == wire.NON_FINITE
    for x, kept in zip((*args.kept, args.residual), before, strict=True):
        assert torch.equal(x[state], kept)
        assert x.isfinite().all()


def test_finite_gradients_that_overflow_are_left_out_too():
    args = make([64])
    args.residual.fill_(3e38)
    args.momentum.zero_()
    args.gradients[0].fill_(3e38)
    compress_both(args)
    assert args.flags == wire.NON_FINITE
    assert args.used == [wire.USED | wire.LEFT_OUT]
    assert args.momentum.abs().max() == 0


def test_without_non_finite_entries_the_flag_is_taken_down():
    args = make([100])
    args.gradients[0][5] = float("nan")
    ops.compress_(*args.list())
    args.gradients[0][5] = 0.0
    compress_both(args)
    assert args.flags == 0


def test_used_bytes_tell_which_gradients_were_not_zero():
    args = make([100, 70_000, 50])
    args.gradients[0].zero_()
    args.gradients[0][100 + 65_536 + 5] = 1e-30
    args.gradients[0][:100] = -0.0
    compress_both(args)
    assert args.used == [0, 1, 0]
    args.gradients[0].zero_()
    args.gradients[0][-1] = 1.0
    compress_both(args)  # and nothing of the step before
    assert args.used == [0, 0, 1]


def test_the_workspace_is_left_as_the_next_call_expects_it(road):
    if road == "native":
        return  # nothing is expected of it there
    args = make([100, 70_000, 50], 0.001)
    args.gradients[0][5] = float("inf")
    compress_both(args)
    unpack_both(args, args.payload.view(1, -1))
    payload = torch.zeros(Segments(args.segments).payload(4).nbytes, dtype=torch.uint8)
    ops.encode_(args.payload, args.segments, args.workspace, args.residual, torch.float32, 4, payload)
    ops.decode(payload[None], args.segments, args.workspace, torch.float32, 4, args.payload[None])
    sizes = cuda.workspace_sizes(3, 4, int(args.segments[:, 4].sum()))
    segments, _, bucket, states, _, _, histograms, *_ = args.workspace.cpu().split(sizes)
    assert bucket.count_nonzero() == 0
    assert histograms.count_nonzero() == 0
    states = states[: 3 * 48].view(torch.int32).view(3, 12)
    assert states[:, [0, 1, 5, 10, 11]].count_nonzero() == 0  # arrived, used, nonfinite, far, largest
    assert torch.equal(segments[: 3 * 80].view(torch.int64).view(3, 10)[:, :5], args.segments[:, :5])


def test_gradients_become_zero_where_segments_are_and_nowhere_else(road):
    if road != "native":
        return  # unpack fills them there
    for dtype in FLOATS:
        args = make([100, 70_000, 33], 0.01, dtype, offset=3)
        args.gradients[0] = torch.cat([args.gradients[0], torch.ones(40, dtype=dtype)])
        args.gradients[0][50] = math.nan  # an entry that is left out
        before = args.gradients[0].clone()
        args.segments, args.numbers = args.segments[[0, 2]], args.numbers[:, [0, 2]]
        args.workspace = ops.workspace(args.segments)
        args.payload = torch.zeros(wire_layout(args.segments, args.wire_dtype).nbytes, dtype=torch.uint8)
        ops.compress_(*args.list())
        inside = torch.zeros(len(before), dtype=torch.bool)
        inside[3:103] = inside[70_103:70_136] = True
        bits = args.gradients[0].view(torch.uint8).view(len(before), -1)
        assert bits[inside].count_nonzero() == 0
        assert torch.equal(args.gradients[0][~inside], before[~inside])
