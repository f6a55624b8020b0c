"""The ops encode_ and decode: a selection as the bytes of docs/wire.md and back, to the bit, on every road."""

import numpy as np
import pytest
import torch

from dgc.ops import Segments, reference
from dgc.ops.selection import entries_of
from support.buckets import Args, make
from support.roads import ops
from support.wire_oracle import FORMATS, judge, parts_of

pytestmark = pytest.mark.usefixtures("road")

every_format = pytest.mark.parametrize(("dtype", "bits"), FORMATS)
BUCKETS = [([1], 0.5), ([65_537], 0.002), ([33, 70_000, 1, 31], 0.001), ([40, 1, 300], 1.0), ([131_072, 9_000], 0.25)]
TINY, DENORMAL, LARGEST = 2.0**-126, 2.0**-149, torch.finfo(torch.float32).max


def encode_both(args: Args, bits: int) -> torch.Tensor:
    """Runs encode_ and the reference, compares all bits, and returns the payload; the selection is args.payload."""
    nbytes = Segments(args.segments).payload(bits).nbytes
    payload, expected = torch.zeros(2, nbytes, dtype=torch.uint8)
    selection, residual = args.payload.clone(), args.residual.clone()
    reference.encode_(selection, args.segments, args.workspace, residual, args.wire_dtype, bits, expected)
    ops.encode_(args.payload, args.segments, args.workspace, args.residual, args.wire_dtype, bits, payload)
    assert torch.equal(payload, expected)
    assert torch.equal(args.payload, selection)
    assert torch.equal(args.residual.view(torch.int32), residual.view(torch.int32))
    return payload


def decode_both(args: Args, payloads: torch.Tensor, bits: int) -> torch.Tensor:
    """Runs decode and the reference on sound payloads, compares all that is read, and returns the selections."""
    got, expected = torch.full((2, len(payloads), len(args.payload)), 7, dtype=torch.uint8)
    ops.decode(payloads, args.segments, args.workspace, args.wire_dtype, bits, got)
    reference.decode(payloads, args.segments, args.workspace, args.wire_dtype, bits, expected)
    segments = Segments(args.segments)
    for a, b in zip(got, expected, strict=True):
        for x, y in zip(
            entries_of(a, segments, args.wire_dtype), entries_of(b, segments, args.wire_dtype), strict=True
        ):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        assert torch.equal(a[: 32 + len(segments)], b[: 32 + len(segments)])
    return got


@every_format
@pytest.mark.parametrize(("sizes", "density"), BUCKETS)
def test_a_payload_says_what_was_selected_and_comes_back_as_it_was(sizes, density, dtype, bits):
    ranks = [make(sizes, density, wire_dtype=dtype, seed=seed) for seed in range(2)]
    payloads = []
    for args in ranks:
        ops.compress_(*args.list())
        payloads.append(encode_both(args, bits))
        code, parts = judge(
            payloads[-1].numpy(), args.payload[:32].view(torch.int64).numpy(), args.segments, dtype, bits
        )
        assert code == 0
        for segment, (used, positions, values) in enumerate(parts):
            assert used == 1
            assert dict(zip(positions.tolist(), values.tolist(), strict=True)) == args.entries(segment)
    segments = Segments(ranks[0].segments)
    for args, back in zip(ranks, decode_both(ranks[0], torch.stack(payloads), bits), strict=True):
        for x, y in zip(entries_of(back, segments, dtype), entries_of(args.payload, segments, dtype), strict=True):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def sent(values: list[float], bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Sends these numbers as all of a parameter, and returns what receivers read and what stays, in float64."""
    args = make([len(values)], 1.0)
    args.gradients[0].zero_()
    args.kept[0].zero_()
    args.residual.zero_()
    args.residual[: len(values)] = torch.tensor(values)
    ops.compress_(*args.list())
    payload = encode_both(args, bits)
    _, _, [part] = parts_of(payload.numpy(), args.segments, bits)
    return part.decoded(torch.float32, bits), args.residual[: len(values)].double().numpy()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "values",
    [
        [1.0, -2.0, 3.0, -4.0, 5.5, 60.0],
        [-0.3] * 7,
        [0.0, 0.0, -0.0],
        [0.0, 1e-7, 0.0, -3e-6, 0.0],
        [DENORMAL, -3 * DENORMAL, 100 * DENORMAL, TINY],
        [LARGEST, -LARGEST, LARGEST / 2, LARGEST * (1 - 2.0**-24)],
        [2.0**-60 * 1.37**i for i in range(27)],
    ],
)
def test_what_rounding_takes_stays_exactly(values, bits):
    received, rest = sent(values, bits)
    original = torch.tensor(values).double().numpy()
    assert np.isfinite(received).all()
    assert (received + rest == original).all()
    # The nearest of 127 or 7 levels between the least and the largest, equally far apart as bits.
    size = np.sort(abs(original[original != 0]).astype(np.float32).view(np.uint32).astype(np.int64))
    step = max(1, -(-(size[-1] - size[0]) // (2 ** (bits - 1) - 2))) if len(size) else 1
    error = abs(
        abs(received).astype(np.float32).view(np.uint32).astype(np.int64)
        - abs(original).astype(np.float32).view(np.uint32)
    )
    assert (error <= step // 2).all()
    assert (np.sign(received) == np.sign(original)).all()
    if len({*map(abs, values)}) == 1:
        assert (rest == 0).all()


def test_a_scale_that_is_too_long_saturates_and_loses_no_more_than_a_float_does():
    # 4 bits: six steps of two binades, so 2^12 times the least; what is larger arrives as that.
    values = [1.0, 1.5, 2.0**14, -(2.0**30) * 1.7, 3.0]
    received, rest = sent(values, 4)
    assert received[2:4].tolist() == [2.0**12, -(2.0**12)]
    original = torch.tensor(values).double().numpy()
    assert (abs(received + rest - original) <= 2.0**-24 * abs(original)).all()
    assert (received + rest == original)[[0, 1, 2, 4]].all()


def test_8_bits_span_all_of_float32():
    received, rest = sent([DENORMAL, 1.0, -3.7e38 / 1.2, 2.0**100], 8)
    assert (received != 0).all()
    assert received[2] < -1e37
    assert np.isfinite(rest).all()


@pytest.mark.parametrize("bits", [16, 64, 7, 0])
def test_value_bits_that_do_not_exist_are_errors(bits):
    args = make([100], 0.1)
    payload = torch.zeros(4096, dtype=torch.uint8)
    for road in (ops, reference):
        with pytest.raises(RuntimeError, match=f"value_bits: expected 32, 8 or 4 for .*, got {bits}"):
            road.encode_(args.payload, args.segments, args.workspace, args.residual, torch.float32, bits, payload)
        with pytest.raises(RuntimeError, match=f"value_bits: expected 32, 8 or 4 for .*, got {bits}"):
            road.decode(payload[None], args.segments, args.workspace, torch.float32, bits, args.payload[None])


def test_what_does_not_fit_is_refused():
    args = make([70_000], 0.01)
    ops.compress_(*args.list())
    segments = Segments(args.segments)
    payload = torch.zeros(segments.payload(8).nbytes, dtype=torch.uint8)
    call = (args.segments, args.workspace)
    with pytest.raises(RuntimeError, match="payload: expected"):
        ops.encode_(args.payload, *call, args.residual, torch.float32, 8, payload[:-16])
    with pytest.raises(RuntimeError, match="selection: expected"):
        ops.encode_(args.payload[:-16], *call, args.residual, torch.float32, 8, payload)
    with pytest.raises(RuntimeError, match="residual: expected"):
        ops.encode_(args.payload, *call, args.residual[:-32], torch.float32, 8, payload)
    with pytest.raises(RuntimeError, match=f"payloads: expected a row of {len(payload)} bytes"):
        ops.decode(payload[None, :-16].contiguous(), *call, torch.float32, 8, args.payload[None])
    with pytest.raises(RuntimeError, match=f"selections: expected a row of {len(args.payload)} bytes"):
        ops.decode(payload[None], *call, torch.float32, 8, args.payload[None, :-16].contiguous())
