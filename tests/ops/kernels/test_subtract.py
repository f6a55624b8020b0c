"""The op subtract_ against plain PyTorch."""

import pytest
import torch

from dgc.ops import reference
from support.roads import ops

pytestmark = pytest.mark.usefixtures("road")


@pytest.mark.parametrize("shrink", [1.0, 0.97])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_subtract_gives_the_bits_of_torch(share, shrink):
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.randn(n, generator=generator) for n in (1, 7, 100, 70_001)]
    updates = [torch.randn(len(p), generator=generator) for p in parameters]
    for g in updates:
        g *= torch.rand(len(g), generator=generator) < share
        g[0] = -0.0
    updates[2][50], updates[2][3] = float("inf"), float("nan")
    if shrink != 1:  # else what is not updated is left as it is, -0 too, where torch may make 0 of it
        parameters[3][1] = -0.0
    expected = [p.clone().mul_(shrink).add_(g, alpha=-0.1) for p, g in zip(parameters, updates, strict=True)]
    plain = [p.clone() for p in parameters]
    reference.subtract_(plain, updates, 0.1, shrink, None)
    ops.subtract_(parameters, updates, 0.1, shrink)
    for p, q, r in zip(parameters, expected, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(r, q, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(p.signbit(), q.signbit())


def test_shrink_reaches_memory_that_is_not_aligned():
    parameters, updates = torch.ones(101), torch.zeros(102)
    ops.subtract_([parameters[1:]], [updates[2:]], 0.1, 0.5)
    assert parameters.tolist() == [1.0] + [0.5] * 100


def test_subtract_does_nothing_where_skip_says_so():
    p = torch.ones(5000)
    skip = torch.ones(1, dtype=torch.uint8)
    ops.subtract_([p], [torch.ones(5000)], 0.5, 0.5, skip)
    assert (p == 1).all()
    ops.subtract_([p], [torch.ones(5000)], 0.5, 0.5, skip - 1)
    assert (p == 0.0).all()


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
