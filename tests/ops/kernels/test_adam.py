"""The rule of dgc.AdamW in compress_: moments with torch.optim.AdamW's bits, and its equations in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dgc.ops import Accumulation, wire, wire_layout
from support.buckets import compress_both, make
from support.roads import ops

pytestmark = pytest.mark.usefixtures("road")

SIZES = [31, 5_000]


@pytest.fixture
def exact_sqrt(monkeypatch):
    """Makes torch's sqrt on a CPU round correctly, which that of MKL does not: one in five differs in the last bit."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: x.double().pow(0.5).float())


def made(sizes=SIZES, density=1.0, **options):
    """Returns a bucket as at the first step: nothing kept, nothing left behind."""
    args = make(sizes, density, rule=Accumulation.ADAM, **options)
    for tensor in (*args.kept, args.residual):
        tensor.zero_()
    return args


def sent(args, row):
    """Returns the values of one parameter in the payload."""
    at, first = wire_layout(args.segments, args.wire_dtype).values, int(args.segments[:row, 4].sum())
    return args.payload[at:].view(args.wire_dtype)[first : first + int(args.segments[row, 4])]


@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.3, 0.0])
def test_moments_have_torch_s_bits_and_what_is_sent_is_torch_s_step_without_momentum(beta1, exact_sqrt):
    lr, beta2, eps, decay = 0.01, 0.99, 1e-8, 0.1
    args = made(masking=False)
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.randn(n, generator=generator) for n in SIZES]
    theirs = [p.clone() for p in parameters]
    with_momentum = [p.clone() for p in parameters]
    optimizers = [
        torch.optim.AdamW(held, lr=lr, betas=(b, beta2), eps=eps, weight_decay=decay, foreach=False, fused=False)
        for held, b in ((theirs, 0.0), (with_momentum, beta1))
    ]
    for step in range(1, 6):
        gradient = torch.randn(sum(SIZES), generator=generator)
        for p, q, g in zip(theirs, with_momentum, gradient.split(SIZES), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        for optimizer in optimizers:
            optimizer.step()
        numbers = (1.0, 1 - beta1, beta2, 1 - beta2, 0.0, lr, (1 - beta2**step) ** 0.5, eps)
        args.numbers = torch.tensor(numbers)[:, None].repeat(1, len(SIZES))
        args.gradients[0].copy_(gradient)
        ops.compress_(*args.list())
        updates = [sent(args, row) for row in range(len(SIZES))]
        ops.subtract_(parameters, updates, 1.0, 1 - lr * decay)
        every = zip(args.segments.tolist(), parameters, theirs, with_momentum, strict=True)
        for (_, _, state, n, *_), p, q, r in every:
            kept = optimizers[1].state[r]
            assert torch.equal(args.kept[0][state : state + n], kept["exp_avg"])
            assert torch.equal(args.kept[1][state : state + n], kept["exp_avg_sq"])
            assert torch.equal(p, q)
        assert args.residual.count_nonzero() == 0


@pytest.mark.parametrize("density", [0.01, 1.0])
def test_the_equations_in_float64(density):
    args = make([4_000, 3_000], density, rule=Accumulation.ADAM, decay=0.75, scale=0.5, seed=1)
    expected = {}
    for row, (_, offset, state, n, k) in enumerate(args.segments.tolist()):
        mine = slice(state, state + n)
        m, s, v = (x[mine].double().numpy() for x in (*args.kept, args.residual))
        decay, weight, b2, c1, c2, step, root, eps = args.numbers[:, row].double().numpy()
        h = 0.5 * args.gradients[0][offset : offset + n].double().numpy()
        m = (1 - weight) * m + weight * h
        s = b2 * s + c1 * h**2 + c2 * m**2
        v = decay * v + step * h / (np.sqrt(s) / root + eps)
        expected[row] = m, s, v, np.argsort(-np.abs(v), kind="stable")[:k]
    ops.compress_(*args.list())
    for row, (_, _, state, n, *_) in enumerate(args.segments.tolist()):
        m, s, v, chosen = expected[row]
        assert set(args.entries(row)) == set(chosen.tolist())
        np.testing.assert_allclose(sent(args, row).numpy(), v[np.sort(chosen)], rtol=1e-5, atol=1e-6)
        m[chosen] = v[chosen] = 0
        for tensor, right in ((args.kept[0], m), (args.kept[1], s), (args.residual, v)):
            np.testing.assert_allclose(tensor[state : state + n].numpy(), right, rtol=1e-5, atol=1e-6)


def test_masking_clears_m_and_not_s():
    args = made([1000], 0.01)
    h = args.gradients[0].clone()
    m, s = torch.lerp(torch.zeros(1000), h, float(args.numbers[1])), h * args.numbers[3] * h
    ops.compress_(*args.list())
    chosen = sorted(args.entries(0))
    assert torch.equal(args.sent, m[chosen])
    m[chosen] = 0
    assert torch.equal(args.kept[0][:1000], m)
    torch.testing.assert_close(args.kept[1][:1000], s, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [1e25, 3e38, math.inf, math.nan])
def test_what_overflows_in_s_keeps_m_s_and_v(value):
    args = make([200, 64], 0.01, rule=Accumulation.ADAM)
    args.gradients[0][[5, 199, 230]] = value
    at = torch.tensor([5, 199, 224 + 30])
    args.residual[at] = 1e-6  # too small to be sent
    before = [x[at] for x in (*args.kept, args.residual)]
    compress_both(args)
    for tensor, kept in zip((*args.kept, args.residual), before, strict=True):
        assert torch.equal(tensor[at], kept)
        assert tensor.isfinite().all()
    assert args.flags == wire.NON_FINITE
    assert args.used == [wire.USED | wire.LEFT_OUT] * 2


@pytest.mark.parametrize("blind", [3, 4])
def test_what_overflows_in_m_shows_in_s(blind):
    args = make([64], 0.1, rule=Accumulation.ADAM)
    args.numbers[blind] = 0  # s does not see h; or m
    args.kept[0][7], args.gradients[0][7] = -3e38, 3e38
    before = [x[7].clone() for x in (*args.kept, args.residual)]
    compress_both(replace(args, sent=None))
    assert [x[7] for x in (*args.kept, args.residual)] == before
    assert args.flags == wire.NON_FINITE


def test_a_parameter_whose_gradient_is_zero_is_not_used():
    args = make([100, 70_000], 0.001, rule=Accumulation.ADAM)
    args.gradients[0][:100] = -0.0
    compress_both(args)
    assert args.used == [0, wire.USED]
