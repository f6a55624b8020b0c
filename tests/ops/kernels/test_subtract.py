"""The op subtract_ against plain PyTorch."""

import pytest
import torch

from dgc.ops import reference
from support.roads import ops

pytestmark = pytest.mark.usefixtures("road")


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
