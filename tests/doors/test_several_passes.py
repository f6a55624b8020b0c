"""Several backward passes before a step: refused by default, with the line to write, and summed with in_step=True."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.ddp_run import Run
from support.models import Given, integers
from support.one_rank import WIDE, one
from support.ranks import run_ranks
from support.training import SHAPES, assert_replicas_equal, seed_of

CONFIG = dgc.DGCConfig(density=1 / 64, dense_below=1000)


def in_step(net, config=CONFIG, **sgd):
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.05)
    optimizer = dgc.SGD(ddp.parameters(), **(sgd or {"lr": 0.5, "momentum": 0.5}))
    state = dgc.DGCState(ddp.named_parameters(), optimizer, config)
    state.register(ddp, in_step=True)
    return ddp, optimizer, state


def test_a_second_pass_is_refused_with_the_line_that_takes_it(gloo):
    model, _, state = one()
    model(integers(WIDE, 0)).backward()
    with pytest.raises(RuntimeError, match=r"state\.register\(model, in_step=True\)"):
        model(integers(WIDE, 1)).backward()
    assert state.pending


def by_parts(rank, world_size):
    """The loss in three parts, each with a backward pass, against one pass of their sum under the usual hook."""
    net = Given(SHAPES)
    ddp, optimizer, state = in_step(net)
    usual = Run(CONFIG)
    for i in range(6):
        parts = [integers(SHAPES, seed_of(3 * i + j, rank)) for j in range(3)]
        optimizer.zero_grad()
        ddp(parts[0]).backward()
        two = [ddp(part) for part in parts[1:]]  # called twice, then two passes: plain DDP exchanges the first alone
        for loss in two:
            loss.backward()
        optimizer.step()
        usual.train({n: sum(part[n] for part in parts) for n in SHAPES})
    same = all(torch.equal(p, q) for p, q in zip(net.parameters(), usual.net.parameters(), strict=True))
    same = same and torch.equal(state.memory.residual.norm(), usual.state.memory.residual.norm())
    called_twice = twice(rank)
    return {"parameters": {n: p.detach() for n, p in net.named_parameters()}, "same": same, "twice": called_twice}


def twice(rank):
    """One module called twice in a step, with one pass of the sum, under the usual hook."""
    run, once = Run(CONFIG), Run(CONFIG)
    for i in range(3):
        a, b = integers(SHAPES, seed_of(2 * i, rank)), integers(SHAPES, seed_of(2 * i + 1, rank))
        run.optimizer.zero_grad()
        (run.ddp(a) + run.ddp(b)).backward()
        run.optimizer.step()
        once.train({n: a[n] + b[n] for n in SHAPES})
    return all(torch.equal(p, q) for p, q in zip(run.net.parameters(), once.net.parameters(), strict=True))


def gan(rank, world_size):
    """Two DDP modules in one group, the loop as people write it; conservation of each."""
    torch.manual_seed(0)
    make = {"lr": 1.0, "momentum": 0.0}
    nets = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)
    (g, g_step, g_state), (d, d_step, d_state) = (in_step(net, **make) for net in nets)
    start = [net.weight.detach().double().clone() for net in nets]
    given = [torch.zeros_like(w) for w in start]
    generator = torch.Generator().manual_seed(rank)
    for _ in range(4):
        real, noise = torch.randn(8, 128, generator=generator), torch.randn(8, 64, generator=generator)
        d_step.zero_grad()
        d(real).square().mean().backward()
        (-d(g(noise).detach()).square().mean()).backward()
        given[1] += nets[1].weight.grad.double()
        d_step.step()
        g_step.zero_grad()
        d(g(noise)).square().mean().backward()  # leaves gradients in d, which its zero_grad() removes
        given[0] += nets[0].weight.grad.double()
        g_step.step()
    moved = [w - net.weight.detach().double() for w, net in zip(start, nets, strict=True)]
    waits = [state.memory.residual_of("weight").double() for state in (g_state, d_state)]
    return {
        "parameters": {str(i): net.weight.detach() for i, net in enumerate(nets)},
        "moved": moved,
        "waits": waits,
        "given": given,
        "sent": [state.stats.sent_density for state in (g_state, d_state)],
    }


def all_of(rank, world_size):
    return by_parts(rank, world_size), gan(rank, world_size)


def test_in_step_sums_all_passes_and_sends_each_once():
    parts, gans = zip(*run_ranks(3, all_of), strict=True)
    assert_replicas_equal(parts)
    assert all(run["same"] for run in parts)
    assert all(run["twice"] for run in parts)
    assert_replicas_equal(gans)
    for i in range(2):
        given = sum(run["given"][i] for run in gans)
        waits = sum(run["waits"][i] for run in gans)
        torch.testing.assert_close(3 * gans[0]["moved"][i] + waits, given, rtol=0, atol=1e-5)
        assert 0 < gans[0]["sent"][i] < 0.02
        assert float(waits.norm()) > 0.1 * float(given.norm())


def test_in_step_wants_a_module_without_a_hook(gloo):
    model, _, state = one()
    state.register(model)
    with pytest.raises(ValueError, match="in_step=True, got one that has one"):
        state.register(model, in_step=True)


def test_after_detach_ddp_averages_again(gloo):
    ddp, optimizer, state = in_step(Given(WIDE))
    ddp(integers(WIDE, 0)).backward()
    optimizer.step()
    state.detach()
    optimizer.zero_grad()
    ddp(integers(WIDE, 1)).backward()
    assert torch.equal(ddp.module.a.grad, integers(WIDE, 1)["a"])
