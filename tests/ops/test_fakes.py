"""The fakes of the ops: tensors without contents pass where real ones do, and what is wrong is named."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dgc import ops
from dgc.ops import Segments
from support.buckets import make


def calls():
    """Returns sound arguments of every op, by name."""
    args = make([70_000, 64], 0.01)
    chosen = make([70_000, 64], 0.01)
    ops.compress_(*chosen.list())
    sizes = [Segments(args.segments).payload(bits).nbytes for bits in (8, 4)]
    coded, codeds = (torch.zeros(*shape, dtype=torch.uint8) for shape in ((sizes[0],), (2, sizes[1])))
    status = torch.zeros(3, dtype=torch.int32)
    which = torch.ones(2, dtype=torch.uint8)
    payloads = torch.stack([args.payload] * 2)
    state = [args.sent, args.momentum, args.residual]
    return {
        "compress_": args.list(),
        "unpack": [payloads, 1, args.segments, args.workspace, args.scale, torch.float32, args.gradients, status],
        "restore_": [args.payload, which, args.segments, args.workspace, *state, torch.float32],
        "encode_": [chosen.payload, args.segments, args.workspace, args.residual, torch.float32, 8, coded],
        "decode": [codeds, args.segments, args.workspace, torch.float32, 4, payloads],
        "subtract_": [[torch.zeros(5), torch.zeros(2, 3)], [torch.zeros(5), torch.zeros(2, 3)], 0.1, 0.5, which[:1]],
    }


def run(name, arguments):
    """Runs an op on fake tensors."""
    mode = FakeTensorMode()

    def fake(x):
        if isinstance(x, list):
            return [fake(item) for item in x]
        return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

    with mode:
        getattr(torch.ops.dgc, name)(*[fake(x) for x in arguments])


@pytest.mark.parametrize("name", ["compress_", "unpack", "restore_", "encode_", "decode", "subtract_"])
def test_what_the_op_takes_its_fake_takes(name):
    run(name, calls()[name])
    torch.library.opcheck(
        getattr(torch.ops.dgc, name).default, tuple(calls()[name]), test_utils=("test_schema", "test_faketensor")
    )


def test_an_empty_bucket_passes():
    arguments = calls()["compress_"]
    arguments[4], arguments[5] = arguments[4][:0], arguments[5][:, :0]
    run("compress_", arguments)


U8, I64 = torch.uint8, torch.int64


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("compress_", 0, [torch.zeros(9, dtype=I64)], "gradients: expected float32, bfloat16 or float16, got"),
        ("compress_", 1, 4, "rule: expected 0 to 3, got 4"),
        ("compress_", 1, 3, "kept: expected 2 tensors for rule 3, got 1"),
        ("compress_", 2, [torch.zeros(0)], "kept: expected at least"),
        ("compress_", 2, [], "kept: expected 1 tensors for rule 1, got 0"),
        ("compress_", 3, torch.zeros(9, dtype=torch.float64), r"residual: expected torch\.float32, got torch\.float64"),
        ("compress_", 4, torch.zeros(2, 4, dtype=I64), r"segments: expected int64 \[segments, 5\], got"),
        ("compress_", 4, torch.zeros(2, 5), r"segments: expected int64 \[segments, 5\], got"),
        ("compress_", 5, torch.zeros(2, 1), r"numbers: expected \[2, 2\] for rule 1, got \(2, 1\)"),
        ("compress_", 6, torch.zeros(0), "scale: expected at least 1 elements, got 0"),
        ("compress_", 7, torch.zeros(95, dtype=U8), "payload: expected at least 96 elements, got 95"),
        ("compress_", 8, torch.zeros(1, dtype=U8), "workspace: expected at least"),
        ("compress_", 9, torch.zeros(1), "sent: expected at least 2"),
        ("compress_", 10, torch.float64, "wire_dtype: expected float32, bfloat16 or float16"),
        ("unpack", 0, torch.zeros(200, dtype=U8), "payloads: expected a row of"),
        ("unpack", 0, torch.zeros(2, 95, dtype=U8), "payloads: expected a row of"),
        ("unpack", 0, torch.zeros(2, 800), "payloads: expected"),
        ("unpack", 1, 2, "payloads: expected a row of"),
        ("unpack", 2, torch.zeros(6, dtype=I64), "segments: expected"),
        ("unpack", 5, torch.int32, "wire_dtype: expected"),
        ("unpack", 6, [torch.zeros(9, dtype=torch.float64)], "out: expected float32"),
        ("unpack", 7, torch.zeros(2, dtype=torch.int32), "status: expected at least 3 elements, got 2"),
        ("restore_", 0, torch.zeros(95, dtype=U8), "payload: expected at least 96"),
        ("restore_", 1, torch.zeros(1, dtype=U8), "which: expected at least 2"),
        ("restore_", 5, None, "sent: expected None where momentum is None"),
        ("encode_", 0, torch.zeros(95, dtype=U8), "selection: expected at least 96"),
        ("encode_", 5, 5, r"value_bits: expected 32, 8 or 4 for torch\.float32, got 5"),
        ("encode_", 6, torch.zeros(3), r"payload: expected torch\.uint8"),
        ("decode", 0, torch.zeros(99, dtype=U8), "payloads: expected a row for each rank"),
        ("decode", 4, 16, "value_bits: expected 32, 8 or 4"),
        ("decode", 5, torch.zeros(3, 800, dtype=U8), "selections: expected 2 rows"),
        ("subtract_", 1, [torch.zeros(5)], "updates: expected one for each of 2 parameters, got 1"),
        ("subtract_", 1, [torch.zeros(5), torch.zeros(5)], "updates: expected at least 6 elements, got 5"),
        ("subtract_", 4, torch.zeros(0, dtype=U8), "skip: expected at least 1"),
        ("subtract_", 4, None, None),
    ],
)
def test_what_is_wrong_is_named(name, position, value, message):
    arguments = calls()[name]
    arguments[position] = value
    with nullcontext() if message is None else pytest.raises(RuntimeError, match=message):
        run(name, arguments)
