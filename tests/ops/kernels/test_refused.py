"""Arguments with which an op would read or write out of bounds are refused."""

from dataclasses import replace

import pytest
import torch

from dgc.ops import Accumulation
from support.buckets import make
from support.roads import ops

pytestmark = pytest.mark.usefixtures("road")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("residual", torch.zeros(10)),
        ("residual", torch.zeros(128, dtype=torch.float64)),
        ("rule", 4),
        ("rule", -1),
        ("kept", [torch.zeros(10)]),
        ("kept", [torch.zeros(128, dtype=torch.float64)]),
        ("kept", []),
        ("kept", [torch.zeros(128)] * 2),
        ("numbers", torch.zeros(0, 1)),
        ("numbers", torch.zeros(1, 1)),
        ("numbers", torch.zeros(3, 1)),
        ("numbers", torch.zeros(2, 2)),
        ("numbers", torch.zeros(2)),
        ("numbers", torch.zeros(2, 1, dtype=torch.float64)),
        ("scale", torch.zeros(0)),
        ("payload", torch.zeros(10, dtype=torch.uint8)),
        ("workspace", torch.zeros(1, dtype=torch.uint8)),
        ("sent", torch.zeros(0)),
        ("gradients", [torch.zeros(10)]),
        ("gradients", [torch.zeros(100, dtype=torch.float64)]),
        ("gradients", [torch.zeros(200)[::2]]),
        ("segments", torch.tensor([[0, 0, 0, 100, 101]])),
        ("segments", torch.tensor([[0, 0, 0, -1, 1]])),
        ("segments", torch.tensor([[0, 0, -32, 100, 1]])),
        ("segments", torch.tensor([[0, 2**62, 0, 100, 1]])),
        ("segments", torch.tensor([[1, 0, 0, 100, 1]])),
        ("segments", torch.zeros(1, 5, dtype=torch.int64)),
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


def test_a_rule_that_keeps_nothing_has_nothing_to_mask():
    args = make([100], rule=Accumulation.SUM)
    with pytest.raises(RuntimeError, match="sent: expected None where the rule keeps nothing"):
        ops.compress_(*replace(args, sent=torch.zeros(1)).list())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Accumulation.SUM, "kept: expected 0 tensors for rule 0, got 1"),
        (Accumulation.ADAM, "kept: expected 2 tensors for rule 3, got 1"),
    ],
)
def test_a_rule_with_the_arguments_of_another_one_is_refused(rule, message):
    args = make([100])
    with pytest.raises(RuntimeError, match=message):
        ops.compress_(*replace(args, rule=rule).list())
    args.kept = [torch.zeros(128)] * rule.kept
    with pytest.raises(RuntimeError, match=rf"numbers: expected \[{rule.rows}, 1\] for rule {int(rule)}"):
        ops.compress_(*replace(args, rule=rule).list())


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
        (4, torch.zeros(0), "sent"),
        (5, None, "sent"),
        (5, torch.zeros(10), "momentum"),
        (6, torch.zeros(10), "residual"),
        (7, torch.float64, "wire_dtype"),
    ],
)
def test_restore_refuses_what_would_read_or_write_out_of_bounds(position, value, name):
    args = make([100])
    ops.compress_(*args.list())
    which = torch.ones(1, dtype=torch.uint8)
    call = [args.payload, which, args.segments, args.workspace, args.sent, args.momentum, args.residual]
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
    with pytest.raises(RuntimeError, match="kept: expected memory aligned"):
        ops.compress_(*replace(args, kept=[torch.zeros(1001)[1:]]).list())
