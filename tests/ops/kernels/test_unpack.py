"""The op unpack: averages, scales, overflow, and payloads that are damaged."""

import math

import pytest
import torch

from dgc.ops import wire, wire_layout
from support.buckets import FLOATS, Args, compress_both, make, unpack_both
from support.roads import ops

pytestmark = pytest.mark.usefixtures("road")


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
    other[wire_layout(args.segments, args.wire_dtype).used] = 1
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


def corrupt(args: Args, what: str) -> torch.Tensor:
    """Returns three payloads of which the middle one is wrong."""
    at = wire_layout(args.segments, args.wire_dtype)
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
    at = wire_layout(args.segments, args.wire_dtype).indices
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
    at = wire_layout(args.segments, args.wire_dtype)
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
