"""detach(): torch's optimizer is back with the ranks' mean, DDP is dense again, and what waits goes on elsewhere."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.messages import Messages, error_of
from support.models import Given, normals
from support.ranks import run_ranks
from support.training import SHAPES, assert_equal, assert_replicas_equal, outcome, seed_of

CONFIG = dgc.DGCConfig(density=0.01, warmup_steps=4, warmup_densities=(0.25,))
KINDS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1},
}


def train(model, optimizer, rank, steps):
    for step in steps:
        optimizer.zero_grad()
        model(normals(SHAPES, seed_of(step, rank))).backward()
        optimizer.step()


def attached(name, wrapped=True, **settings):
    net = Given(SHAPES)
    model = DistributedDataParallel(net) if wrapped else net
    optimizer = getattr(torch.optim, name)(model.parameters(), **{**KINDS[name], **settings})
    return net, model, dgc.attach(model, optimizer, CONFIG)


def mean_of(tensor):
    total = tensor.detach().double()
    dist.all_reduce(total)
    return (total / dist.get_world_size()).float()


def back_to_dense(rank, world_size, name):
    """Some steps with DGC, then dense ones; beside them torch's optimizer and DDP, from what should be there."""
    messages = Messages()
    net, model, optimizer = attached(name)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, rank, range(6))
    state = optimizer.dgc
    expected, named = {}, dict(net.named_parameters())
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        kept = state.memory.of(next(n for n, q in named.items() if q is p))
        if name == "SGD":
            expected[i] = {"momentum_buffer": mean_of(kept["momentum"]) + optimizer.state[p]["decay_momentum"]}
        else:
            expected[i] = {kind: mean_of(kept[kind]) for kind in ("exp_avg", "exp_avg_sq")}
    residual = {n: state.memory.residual_of(n).clone() for n in state.memory.compressed}
    (waiting,) = state.detach()["ranks"].values()
    saved = optimizer.state_dict()["state"]
    for i, tensors in expected.items():
        for kind, tensor in tensors.items():
            torch.testing.assert_close(saved[i][kind], tensor, rtol=1e-5, atol=1e-6)
    twin = Given(SHAPES)
    twin.load_state_dict(net.state_dict())
    other = getattr(torch.optim, name)(twin.parameters(), **KINDS[name])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plain = DistributedDataParallel(twin)
    for step in range(6, 9):
        train(model, optimizer, rank, [step])
        scheduler.step()
        train(plain, other, rank, [step])
        other.param_groups[0]["lr"] /= 2
    return {
        "is torch's": type(optimizer) is getattr(torch.optim, name),
        "parameters": {n: p.detach().clone() for n, p in net.named_parameters()},
        "dense": {n: p.detach().clone() for n, p in twin.named_parameters()},
        "kept": residual.keys() == waiting["residual"].keys()
        and all(t.any() and torch.equal(t, waiting["residual"][n]) for n, t in residual.items()),
        "memory": state.memory.residual.numel() + sum(t.numel() for t in state.memory.kinds.values()),
        "lines": messages.lines,
        "after": error_of(state.state_dict),
        "again": error_of(state.detach),
        "no sync": state.registered,
    }


@pytest.mark.parametrize("name", KINDS)
def test_ddp_goes_on_densely_with_torch_s_optimizer_and_the_mean_of_the_ranks(name):
    results = run_ranks(2, back_to_dense, name)
    assert_replicas_equal(results)
    for r in results:
        assert r["is torch's"]
        assert r["kept"]
        assert r["memory"] == 0
        for n, p in r["dense"].items():
            assert torch.equal(p, r["parameters"][n]), n
        assert "got one after detach()" in r["after"]
        assert "got one after detach()" in r["again"]
        assert not r["no sync"]
    (line,) = (line for line in results[0]["lines"] if "detached" in line)
    assert f"after step 6: torch.optim.{name} again" in line
    assert "DDP averages gradients densely" in line


def there_and_back(rank, world_size, name, wrapped, detaches):
    decay = {"weight_decay": 0.0} if name == "SGD" else {}  # its momentum goes into that of the gradients
    net, model, optimizer = attached(name, wrapped, **decay)
    train(model, optimizer, rank, range(6))
    for _ in range(2 if detaches else 0):  # twice: DDP keeps the first hook
        waiting = optimizer.dgc.detach()
        dgc.attach(model, optimizer, CONFIG)
        optimizer.dgc.load_state_dict(waiting)
    train(model, optimizer, rank, range(6, 9))
    return outcome(net, optimizer.dgc)


@pytest.mark.parametrize(("name", "wrapped"), [("SGD", True), ("SGD", False), ("AdamW", True)])
def test_what_waits_goes_on_in_a_later_state_with_the_bits_of_a_run_that_was_not_detached(name, wrapped):
    assert_equal(run_ranks(2, there_and_back, name, wrapped, False), run_ranks(2, there_and_back, name, wrapped, True))


class Plain(torch.optim.SGD):
    """A subclass, which attach leaves as it is."""


def without_ddp(rank, world_size):
    messages = Messages()
    net = Given(SHAPES)
    optimizer = dgc.attach(net, Plain(net.parameters(), lr=0.5), CONFIG)
    train(net, optimizer, rank, range(2))
    optimizer.zero_grad()
    net(normals(SHAPES, rank)).backward()
    outstanding = error_of(optimizer.dgc.detach)
    optimizer.step()
    optimizer.dgc.detach()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    own = normals(SHAPES, seed_of(9, rank))
    train(net, optimizer, rank, [9])
    wrong = [n for n, p in net.named_parameters() if not torch.equal(p, before[n] - 0.5 * own[n])]
    return {"wrong": wrong, "kind": type(optimizer).__name__, "lines": messages.lines, "outstanding": outstanding}


def test_a_plain_module_s_hooks_are_gone_and_the_log_says_that_nobody_exchanges():
    results = run_ranks(2, without_ddp)
    for r in results:
        assert r["wrong"] == []  # each rank's own gradient
        assert r["kind"] == "Plain"
        assert "DGCState.detach: expected to be called between optimizer.step()" in r["outstanding"]
    assert any("nobody exchanges gradients: wrap the model" in line for line in results[0]["lines"])
