"""The op restore_: every bit of what was sent comes back."""

import pytest
import torch

from dgc.ops import reference, wire_layout
from support.buckets import FLOATS, equal, make
from support.roads import ops

pytestmark = pytest.mark.usefixtures("road")


@pytest.mark.parametrize("wire_dtype", FLOATS)
@pytest.mark.parametrize("masking", [True, False])
def test_restore_gives_back_every_bit(wire_dtype, masking):
    args = make([70_000, 500, 3_000], 0.01, wire_dtype=wire_dtype, masking=masking)
    args.gradients[0] *= 3e4
    before = args.clone()
    for row, (_, offset, state, n, *_) in enumerate(args.segments.tolist()):
        *kept, v = (x[state : state + n] for x in (*before.kept, before.residual))
        reference.accumulate_(args.rule, kept, v, before.gradients[0][offset : offset + n], args.numbers[:, row])
    ops.compress_(*args.list())
    after = args.clone()
    which = torch.tensor([1, 0, 1], dtype=torch.uint8)
    for op, a in ((ops, args), (reference, after)):
        op.restore_(a.payload, which, a.segments, a.workspace, a.sent, a.momentum, a.residual, a.wire_dtype)
    equal(args, after)
    for row, (_, _, state, n, *_) in enumerate(args.segments.tolist()):
        mine = slice(state, state + n)
        restored = torch.equal(args.residual[mine], before.residual[mine])
        assert restored == bool(which[row])
        assert not which[row] or torch.equal(args.momentum[mine], before.momentum[mine])


def test_restore_refuses_a_payload_of_other_segments(road):
    args = make([100], 0.05)
    ops.compress_(*args.list())
    at = wire_layout(args.segments, args.wire_dtype)
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
