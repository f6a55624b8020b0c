"""The ops against plain PyTorch, bit for bit, and against the equations."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from support.buckets import FLOATS, Args, compress_both, equal, make, unpack_both
from support.roads import AVAILABLE, ops

from dgc.ops import cuda, reference, wire

pytestmark = pytest.mark.usefixtures("road")
# Where much is tried, jit is left out: its kernels are built's.
every_kernel = pytest.mark.parametrize("road", [name for name in AVAILABLE if name != "jit"], indirect=True)

SIZES = [[1], [31], [33, 1, 64], [65535], [65537], [100_000, 1, 33, 70_000]]
# (Nesterov, with momentum)
MODES = [(False, True), (True, True), (False, False)]


@every_kernel
@pytest.mark.parametrize(
    ("sizes", "density"),
    [(sizes, density) for sizes in SIZES for density in (0.001, 0.01, 0.25, 1.0) if sum(sizes) * density < 20_000],
    ids=str,
)
def test_op_equals_reference_for_every_type(sizes, density):
    for dtype, wire_dtype, (nesterov, momentum) in itertools.product(FLOATS, FLOATS, MODES):
        args = make(sizes, density, dtype, wire_dtype, nesterov=nesterov, momentum=momentum, offset=3, scale=0.7)
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
    "nearly overflowing",
    "half overflow",
    "half tiny",
]


@every_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.001, 0.02, 0.3], ids=str)
def test_op_equals_reference_on_hard_data(kind, density):
    # 700,000 elements have groups enough for the threshold to be guessed from a sample.
    for wire_dtype, n in zip(FLOATS, (70_000, 700_000, 100), strict=True):
        args = make([n], density, wire_dtype=wire_dtype)
        args.gradients[0].copy_(special(kind, n))
        args.momentum.zero_()
        args.residual.zero_()
        compress_both(args)
        compress_both(args)
        unpack_both(args, args.payload.view(1, -1))


@every_kernel
@pytest.mark.parametrize("seed", range(40))
def test_op_equals_reference_on_random_shapes(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [int(10 ** (5 * torch.rand(1, generator=generator))) for _ in range(6)]
    density = float(10 ** (-3.5 * torch.rand(1, generator=generator)))
    args = make(sizes, density, FLOATS[seed % 3], FLOATS[seed // 3 % 3], seed=seed, masking=seed % 2 == 0, offset=seed)
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
    assert torch.equal(args.sent_momentum, u[sent])
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
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_non_finite_gradient_leaves_its_entry_alone_and_raises_the_flag(bad, dtype, nesterov):
    args = make([70_000, 100], 0.001, dtype, nesterov=nesterov)
    where = torch.tensor([0, 77, 69_999, 70_050])
    args.gradients[0][where] = bad
    state = torch.tensor([0, 77, 69_999, 70_016 + 50])
    args.residual[state] = 1e-6  # too small to be sent
    u, v = args.momentum[state].clone(), args.residual[state].clone()
    compress_both(args)
    assert args.flags == wire.NON_FINITE
    assert torch.equal(args.momentum[state], u)
    assert torch.equal(args.residual[state], v)
    assert args.momentum.isfinite().all()
    assert args.residual.isfinite().all()


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
    sizes = cuda.workspace_sizes(3, 4, int(args.segments[:, 4].sum()))
    segments, _, bucket, states, _, _, histograms, *_ = args.workspace.cpu().split(sizes)
    assert bucket.count_nonzero() == 0
    assert histograms.count_nonzero() == 0
    states = states[: 3 * 40].view(torch.int32).view(3, 10)
    assert states[:, [0, 1, 5]].count_nonzero() == 0  # arrived, used, nonfinite
    assert torch.equal(segments[: 3 * 64].view(torch.int64).view(3, 8)[:, :5], args.segments)


def test_gradients_become_zero_where_segments_are_and_nowhere_else(road):
    if road != "native":
        return  # unpack fills them there
    for dtype in FLOATS:
        args = make([100, 70_000, 33], 0.01, dtype, offset=3)
        args.gradients[0] = torch.cat([args.gradients[0], torch.ones(40, dtype=dtype)])
        args.gradients[0][50] = math.nan  # an entry that is left out
        before = args.gradients[0].clone()
        args.segments = args.segments[[0, 2]]
        args.workspace = ops.workspace(args.segments)
        args.payload = torch.zeros(wire.wire_layout(args.segments, args.wire_dtype).nbytes, dtype=torch.uint8)
        ops.compress_(*args.list())
        inside = torch.zeros(len(before), dtype=torch.bool)
        inside[3:103] = inside[70_103:70_136] = True
        bits = args.gradients[0].view(torch.uint8).view(len(before), -1)
        assert bits[inside].count_nonzero() == 0
        assert torch.equal(args.gradients[0][~inside], before[~inside])


def test_a_parameter_that_no_rank_used_gets_zeros():
    # Its momentum made it send something; DDP may throw the result away, so it has to come back.
    args = make([100, 70_000])
    args.gradients[0][:100] = 0
    ops.compress_(*args.list())
    assert max(map(abs, args.entries(0).values())) > 0
    out, _ = unpack_both(args, torch.stack([args.payload] * 2))
    assert out[:100].count_nonzero() == 0
    assert out[100:].count_nonzero() == 700
    other = args.payload.clone()
    other[wire.wire_layout(args.segments, args.wire_dtype).used] = 1
    out, _ = unpack_both(args, torch.stack([args.payload, other]))
    assert out[:100].count_nonzero() == 1


def test_the_average_is_taken_in_rank_order_and_scaled_once():
    # In float32 the order of a sum of three can be seen.
    values = [1.0, 2.0**-24, 2.0**-24]
    args = make([100], 0.01)
    payloads = []
    for value in values:
        args.gradients[0].zero_()
        args.gradients[0][30] = value
        args.momentum.zero_()
        args.residual.zero_()
        ops.compress_(*args.list())
        payloads.append(args.payload.clone())
    forward, _ = unpack_both(args, torch.stack(payloads))
    backward, _ = unpack_both(args, torch.stack(payloads[::-1]))
    third = torch.tensor(1.0) / 3
    assert forward[30] == (torch.tensor(1.0) + 2.0**-24 + 2.0**-24) * third
    assert backward[30] == torch.tensor(1.0 + 2.0**-23) * third
    assert forward[30] != backward[30]
    assert forward.count_nonzero() == 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1024.0, 0.3])
def test_averages_are_handed_back_at_the_loss_scale(dtype, scale):
    args = make([100, 70_000], 0.01)
    args.residual *= 1e-3
    ops.compress_(*args.list())
    payloads = torch.stack([args.payload] * 3)
    plain, _ = unpack_both(args, payloads)
    scaled, status = unpack_both(args, payloads, dtype=dtype, scale=scale)
    assert status == [0, 0, 0, 0]
    assert torch.equal(scaled, (plain * scale).to(dtype))


@pytest.mark.parametrize(
    ("dtype", "value", "scale"),
    [(torch.float16, 60000.0, 2.0), (torch.float32, 3e38, 2.0), (torch.bfloat16, 3e38, 2.0), (torch.float16, 7e4, 1.0)],
)
def test_an_average_that_overflows_is_reported(dtype, value, scale):
    args = make([100, 70_000], 0.01)
    args.gradients[0].fill_(1.0)
    args.momentum.zero_()
    args.residual.zero_()
    args.residual[128 + 66_000] = -value
    ops.compress_(*args.list())
    out, status = unpack_both(args, args.payload.view(1, -1), dtype=dtype, scale=scale)
    assert status == [0, 1]
    assert out[100 + 66_000] == -math.inf
    out, status = unpack_both(args, args.payload.view(1, -1), dtype=dtype, scale=1e-3)
    assert status == [0, 0]


def test_a_sum_of_ranks_that_overflows_is_reported():
    args = make([100], 0.01)
    args.residual.zero_()
    args.residual[7] = 3e38
    ops.compress_(*args.list())
    out, status = unpack_both(args, torch.stack([args.payload] * 2))
    assert status == [0, 0, 1]
    assert out[7] == math.inf


@pytest.mark.parametrize("dtype", FLOATS)
def test_entries_left_out_on_any_rank_make_every_used_gradient_nan(dtype):
    args = make([100, 70_000, 300, 33], 0.01, offset=1)
    args.gradients[0][1 + 100 + 70_000 :][:300] = 0  # not used
    flagged = args.clone()
    flagged.gradients[0][1 + 100 + 65_999] = math.inf
    ops.compress_(*args.list())
    ops.compress_(*flagged.list())
    assert flagged.used == [1, 3, 0, 1]
    out, status = unpack_both(args, torch.stack([args.payload, flagged.payload]), dtype=dtype)
    assert status == [0, wire.NON_FINITE_STATUS, 0]
    assert out.isnan().nonzero().view(-1).tolist() == [1, 1 + 100, 1 + 100 + 70_000 + 300]


def test_unpack_writes_nothing_outside_its_segments():
    args = make([40], offset=10)
    ops.compress_(*args.list())
    out = torch.full((60,), 5.0)
    out[10:50] = 0
    status = torch.zeros(2, dtype=torch.int32)
    ops.unpack(args.payload.view(1, -1), 0, args.segments, args.workspace, torch.ones(1), torch.float32, [out], status)
    assert out[:10].tolist() == [5.0] * 10
    assert out[50:].tolist() == [5.0] * 10
    assert (out[10:50] == 0).sum() == 39


def test_gradients_in_tensors_of_their_own():
    # Horovod's case: one tensor a parameter.
    whole = make([100, 70_000, 33], 0.01)
    apart = whole.clone()
    flat = whole.gradients[0]
    apart.gradients = [flat[:100].clone(), flat[100:70_100].clone(), flat[70_100:].clone()]
    apart.segments[:, 0] = torch.arange(3)
    apart.segments[:, 1] = 0
    apart.workspace = ops.workspace(apart.segments)
    compress_both(whole)
    compress_both(apart)
    assert torch.equal(whole.payload, apart.payload)
    out = [torch.zeros_like(g) for g in apart.gradients]
    status = torch.zeros(2, dtype=torch.int32)
    ops.unpack(apart.payload.view(1, -1), 0, apart.segments, apart.workspace, torch.ones(1), torch.float32, out, status)
    joined, _ = unpack_both(whole, whole.payload.view(1, -1))
    assert torch.equal(torch.cat(out), joined)


@pytest.mark.parametrize("wire_dtype", FLOATS)
@pytest.mark.parametrize("masking", [True, False])
def test_restore_gives_back_every_bit(wire_dtype, masking):
    args = make([70_000, 500, 3_000], 0.01, wire_dtype=wire_dtype, masking=masking)
    args.gradients[0] *= 3e4
    before = args.clone()
    for row, (_, offset, state, n, _) in enumerate(args.segments.tolist()):
        u, v = before.momentum[state : state + n], before.residual[state : state + n]
        reference.accumulate_(u, v, before.gradients[0][offset : offset + n], float(args.mu[row]), False)
    ops.compress_(*args.list())
    after = args.clone()
    which = torch.tensor([1, 0, 1], dtype=torch.uint8)
    for op, a in ((ops, args), (reference, after)):
        op.restore_(a.payload, which, a.segments, a.workspace, a.sent_momentum, a.momentum, a.residual, a.wire_dtype)
    equal(args, after)
    for row, (_, _, state, n, _) in enumerate(args.segments.tolist()):
        mine = slice(state, state + n)
        restored = torch.equal(args.residual[mine], before.residual[mine])
        assert restored == bool(which[row])
        assert not which[row] or torch.equal(args.momentum[mine], before.momentum[mine])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_subtract_gives_the_bits_of_torch(share):
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.randn(n, generator=generator) for n in (1, 7, 100, 70_001)]
    updates = [torch.randn(len(p), generator=generator) for p in parameters]
    for g in updates:
        g *= torch.rand(len(g), generator=generator) < share
        g[0] = -0.0
    updates[2][50], updates[2][3] = float("inf"), float("nan")
    expected = [p.clone() for p in parameters]
    reference.subtract_(expected, updates, 0.1, None)
    ops.subtract_(parameters, updates, 0.1)
    for p, q in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


def test_subtract_does_nothing_where_skip_says_so():
    p = torch.ones(5000)
    skip = torch.ones(1, dtype=torch.uint8)
    ops.subtract_([p], [torch.ones(5000)], 0.5, skip)
    assert (p == 1).all()
    ops.subtract_([p], [torch.ones(5000)], 0.5, skip - 1)
    assert (p == 0.5).all()


def test_subtract_takes_many_parameters():
    parameters = [torch.full((i + 1,), 2.0) for i in range(300)]
    ops.subtract_(parameters, [torch.full_like(p, i) for i, p in enumerate(parameters)], 1.0)
    assert all((p == 2 - i).all() for i, p in enumerate(parameters))


def test_subtract_refuses_what_does_not_fit():
    with pytest.raises(RuntimeError, match="updates: expected one for each"):
        ops.subtract_([torch.zeros(3)], [], 0.1)
    with pytest.raises(RuntimeError, match="updates"):
        ops.subtract_([torch.zeros(3)], [torch.zeros(2)], 0.1)
    with pytest.raises(RuntimeError, match="parameters"):
        ops.subtract_([torch.zeros(3).double()], [torch.zeros(3)], 0.1)


def corrupt(args: Args, what: str) -> torch.Tensor:
    """Returns three payloads of which the middle one is wrong."""
    at = wire.wire_layout(args.segments, args.wire_dtype)
    bad = args.payload.clone()
    ends = bad[at.ends : at.ends + 4 * 3].view(torch.int32)  # two tiles and one
    indices = bad[at.indices : at.values].view(torch.int16)
    values = bad[at.values :][: 4 * int(args.segments[:, 4].sum())].view(torch.float32)
    if what == "magic":
        bad[0] ^= 1
    elif what == "step":
        wire.header(bad)[1] = 6
    elif what == "layout":
        wire.header(bad)[2] = 43
    elif what == "ends fall":
        ends[0] = ends[1] + 1
    elif what == "ends beyond":
        ends[0] = 1_000_000_000
    elif what == "ends negative":
        ends[0] = -5
    elif what == "ends of another parameter":
        ends[1] -= 1
    elif what == "index out of the last tile":
        indices[int(ends[-1]) - 1] = 300
    elif what == "index out of the tensor":
        indices[int(ends[-1]) - 1] = -1
    elif what == "index twice":
        indices[1] = indices[0]
    elif what == "indices fall":
        indices[:2] = indices[:2].flip(0)
    elif what == "nan":
        values[3] = float("nan")
    elif what == "inf":
        values[-1] = float("-inf")
    return torch.stack([args.payload, bad, args.payload])


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("magic", 1),
        ("step", 2),
        ("layout", 3),
        ("ends fall", 4),
        ("ends beyond", 4),
        ("ends negative", 4),
        ("ends of another parameter", 4),
        ("index out of the last tile", 5),
        ("index out of the tensor", 5),
        ("index twice", 5),
        ("indices fall", 5),
        ("nan", 6),
        ("inf", 6),
    ],
)
def test_a_corrupt_payload_is_reported_and_nothing_is_written(what, code):
    args = make([70_000, 300], 0.01)
    ops.compress_(*args.list())
    payloads = corrupt(args, what)
    out, status = unpack_both(args, payloads, before=7.0)
    assert status == [0, code, 0, 0]
    assert (out == 7).all()
    with pytest.raises(wire.PayloadError, match="payload of rank 1: "):
        wire.check_status(status[:-1], payloads)


def test_every_rank_has_a_status_of_its_own():
    args = make([70_000, 300], 0.01)
    ops.compress_(*args.list())
    wrong = ["nan", "step", "index twice", "ends fall", "layout"]
    payloads = torch.stack([args.payload, *(corrupt(args, what)[1] for what in wrong)])
    # Two things wrong with one payload: the smaller code.
    payloads[1] = corrupt(args, "nan")[1]
    at = wire.wire_layout(args.segments, args.wire_dtype).indices
    payloads[1, at : at + 4].view(torch.int16).copy_(torch.tensor([5, 5], dtype=torch.int16))
    _, status = unpack_both(args, payloads)
    assert status == [0, 5, 2, 5, 4, 3, 0]


def test_many_ranks_are_added_in_order():
    # More than a block has threads; values that do not add up exactly.
    args = make([9000], 0.002)
    payloads = []
    for seed in range(5):
        other = make([9000], 0.002, seed=seed)
        ops.compress_(*other.list())
        payloads.append(other.payload)
    unpack_both(args, torch.stack([payloads[i * i % 5] for i in range(600)]), 3)


def test_random_bytes_never_crash_and_never_pass():
    args = make([70_000, 300], 0.01)
    ops.compress_(*args.list())
    generator = torch.Generator().manual_seed(0)
    at = wire.wire_layout(args.segments, args.wire_dtype)
    for _ in range(200):
        payloads = torch.stack([args.payload] * 2)
        noise = torch.randint(0, 256, (at.nbytes - at.ends,), generator=generator, dtype=torch.uint8)
        payloads[1, at.ends :] = noise
        out, status = unpack_both(args, payloads, before=7.0)
        assert status[1] != 0
        assert (out == 7).all()


def test_the_non_finite_flag_of_a_rank_is_reported_beside_the_result():
    args = make([100], 0.01)
    ops.compress_(*args.list())
    flagged = args.payload.clone()
    wire.header(flagged)[3] = wire.NON_FINITE
    out, status = unpack_both(args, torch.stack([args.payload, flagged]))
    assert status == [0, wire.NON_FINITE_STATUS, 0]
    assert wire.check_status(status[:-1], torch.stack([args.payload, flagged])) == [1]
    assert out[0].isnan()
    assert out.count_nonzero() == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("residual", torch.zeros(10)),
        ("residual", torch.zeros(128, dtype=torch.float64)),
        ("momentum", torch.zeros(10)),
        ("mu", torch.zeros(0)),
        ("scale", torch.zeros(0)),
        ("payload", torch.zeros(10, dtype=torch.uint8)),
        ("workspace", torch.zeros(1, dtype=torch.uint8)),
        ("sent_momentum", torch.zeros(0)),
        ("gradients", [torch.zeros(10)]),
        ("gradients", [torch.zeros(100, dtype=torch.float64)]),
        ("gradients", [torch.zeros(200)[::2]]),
        ("segments", torch.tensor([[0, 0, 0, 100, 101]])),
        ("segments", torch.tensor([[0, 0, 0, -1, 1]])),
        ("segments", torch.tensor([[0, 0, -32, 100, 1]])),
        ("segments", torch.tensor([[0, 2**62, 0, 100, 1]])),
        ("segments", torch.tensor([[1, 0, 0, 100, 1]])),
        ("segments", torch.zeros(1, 4, dtype=torch.int64)),
        ("segments", torch.tensor([[0, 0, 0, 50, 1], [0, 50, 32, 50, 1]])),
        ("segments", torch.tensor([[0, 40, 0, 50, 1], [0, 0, 64, 50, 1]])),
    ],
)
def test_compress_refuses_what_would_read_or_write_out_of_bounds(field, value):
    args = make([100])
    setattr(args, field, value)
    before = args.clone()
    with pytest.raises(RuntimeError, match="gradients" if "segments" in field and value[0][0] == 1 else field):
        ops.compress_(*args.list())
    assert torch.equal(args.payload, before.payload)


@pytest.mark.parametrize(
    ("position", "value", "name"),
    [
        (0, torch.zeros(2, 10, dtype=torch.uint8), "payloads"),
        (0, torch.zeros(10, dtype=torch.uint8), "payloads"),
        (1, 2, "payloads"),
        (1, -1, "payloads"),
        (4, torch.ones(0), "scale"),
        (4, torch.ones(1, dtype=torch.float64), "scale"),
        (5, torch.int32, "wire_dtype"),
        (6, [torch.zeros(99)], "out"),
        (6, [], "out"),
        (6, [torch.zeros(100, dtype=torch.float64)], "out"),
        (7, torch.zeros(2, dtype=torch.int32), "status"),
        (7, torch.zeros(3, dtype=torch.int64), "status"),
    ],
)
def test_unpack_refuses_what_would_read_or_write_out_of_bounds(position, value, name):
    args = make([100])
    ops.compress_(*args.list())
    payloads, status = torch.stack([args.payload] * 2), torch.zeros(3, dtype=torch.int32)
    call = [payloads, 0, args.segments, args.workspace, torch.ones(1), torch.float32, [torch.zeros(100)], status]
    call[position] = value
    with pytest.raises(RuntimeError, match=name):
        ops.unpack(*call)


@pytest.mark.parametrize(
    ("position", "value", "name"),
    [
        (0, torch.zeros(10, dtype=torch.uint8), "payload"),
        (1, torch.zeros(0, dtype=torch.uint8), "which"),
        (1, torch.zeros(1), "which"),
        (4, torch.zeros(0), "sent_momentum"),
        (5, None, "sent_momentum"),
        (5, torch.zeros(10), "momentum"),
        (6, torch.zeros(10), "residual"),
        (7, torch.float64, "wire_dtype"),
    ],
)
def test_restore_refuses_what_would_read_or_write_out_of_bounds(position, value, name):
    args = make([100])
    ops.compress_(*args.list())
    which = torch.ones(1, dtype=torch.uint8)
    call = [args.payload, which, args.segments, args.workspace, args.sent_momentum, args.momentum, args.residual]
    call.append(torch.float32)
    call[position] = value
    with pytest.raises(RuntimeError, match=name):
        ops.restore_(*call)


def test_cuda_refuses_what_its_kernels_cannot_do(road):
    if road == "native":
        return
    args = make([100, 50])
    with pytest.raises(RuntimeError, match="workspace: expected the"):
        ops.compress_(*replace(args, workspace=make([100, 50, 3]).workspace).list())
    with pytest.raises(RuntimeError, match="residual: expected memory aligned"):
        ops.compress_(*replace(args, residual=torch.zeros(1001)[1:]).list())
    with pytest.raises(RuntimeError, match=r"state.* multiple of 32"):
        ops.compress_(*replace(args, segments=args.segments + torch.tensor([0, 0, 1, 0, 0])).list())
    with pytest.raises(RuntimeError, match="gradients: expected at most 256 tensors"):
        ops.compress_(*replace(args, gradients=args.gradients * 257).list())
    with pytest.raises(RuntimeError, match="sent_momentum: expected None"):
        ops.compress_(*replace(args, momentum=None).list())


def test_restore_refuses_a_payload_of_other_segments(road):
    args = make([100], 0.05)
    ops.compress_(*args.list())
    at = wire.wire_layout(args.segments, args.wire_dtype)
    args.payload[at.indices : at.indices + 2].view(torch.int16).fill_(-1)
    which = torch.ones(1, dtype=torch.uint8)
    call = (args.payload, which, args.segments, args.workspace, None, None, args.residual, torch.float32)
    if road == "native":
        with pytest.raises(RuntimeError, match="payload"):
            ops.restore_(*call)
    else:  # a kernel can only leave out what does not fit
        before = args.residual.clone()
        ops.restore_(*call)
        assert (args.residual != before).sum() == 4
