"""Training loops behind Horovod: synchronize(), closures, broadcasts, other optimizers, and passes that break off."""

import warnings
import weakref

import pytest
import torch
from torch import nn

import dgc
from support.horovod_run import Run, dgc_hvd, hvd
from support.models import Given, integers, normals
from support.training import (
    LARGE,
    SHAPES,
    assert_close_to,
    assert_conserved,
    assert_equal,
    assert_replicas_equal,
    oracle_for,
    seed_of,
)


def by_hand():
    """synchronize(), skip_synchronize(), zero_grad() and closures, against the ordinary loop."""
    ordinary, other = Run(), Run()
    notes = {}
    for step in range(6):
        g = normals(SHAPES, seed_of(step, hvd.rank()))
        ordinary.train(g)
        if step % 2:

            def closure(g=g):
                other.optimizer.zero_grad(set_to_none=False)
                loss = other.net(g)
                loss.backward()
                return float(loss)

            notes["loss"] = isinstance(other.optimizer.step(closure), float)
            continue
        other.optimizer.zero_grad()
        other.net(g).backward()
        try:
            other.optimizer.zero_grad()
        except AssertionError as error:
            notes["guard"] = str(error)
        other.optimizer.synchronize()
        notes["reduced"] = [p.grad.count_nonzero().item() for n, p in other.net.named_parameters() if n in LARGE]
        with other.optimizer.skip_synchronize():
            other.optimizer.step()
    # A step that is left out on purpose: its gradient stays.
    other.net(normals(SHAPES, 7)).backward()
    other.optimizer.synchronize()
    other.state.discard(drop_gradient=False)
    other.optimizer.zero_grad()
    notes["steps"] = other.state.step
    results = ordinary.result(), other.result()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Horovod's, of a step() after synchronize()
        other.train(normals(SHAPES, 8))
    return *results, notes


def keep_gradients():
    run = Run()
    run.train(normals(SHAPES, hvd.rank()))
    gradients = [weakref.ref(p.grad) for p in run.net.parameters()]
    run.optimizer.zero_grad()
    return [g() is None for g in gradients]


def test_zero_grad_frees_the_gradients(horovod):
    assert horovod(2, keep_gradients) == [[True] * 5] * 2


def test_synchronize_and_closures_give_the_ordinary_loops_bits(horovod):
    for ordinary, other, notes in horovod(2, by_hand):
        for name, p in ordinary["parameters"].items():
            assert torch.equal(p, other["parameters"][name]), name
        assert "prohibited" in notes["guard"]
        assert all(200 <= n <= 1400 for n in notes["reduced"])  # of two ranks, 1 % each
        assert notes["steps"] == 6
        assert notes["loss"]


def broadcast(weight_decay):
    """Broadcasts a fresh and a used optimizer's state, before and after it is wrapped, as Horovod's examples do."""
    net = Given(SHAPES, seed=hvd.rank())
    start = Given(SHAPES, seed=0)
    optimizer = dgc.SGD(net.parameters(), lr=0.1 * (1 + hvd.rank()), momentum=0.5, weight_decay=weight_decay)
    hvd.broadcast_parameters(net.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    equal = all(torch.equal(p, q) for p, q in zip(net.parameters(), start.parameters(), strict=True))
    run = Run(module=net, lr=0.1 * (1 + hvd.rank()), weight_decay=weight_decay)
    hvd.broadcast_optimizer_state(run.optimizer, root_rank=0)
    lr = run.optimizer.param_groups[0]["lr"]
    for step in range(3):
        run.train(normals(SHAPES, seed_of(step, hvd.rank())))
    if weight_decay:
        buffers = [run.optimizer.state[p]["decay_momentum"] for p in net.parameters()]
        if hvd.rank():
            for b in buffers:
                b.zero_()
        hvd.broadcast_optimizer_state(run.optimizer, root_rank=0)
        assert all(b.any() for b in buffers)
    return {**run.result(), "equal": equal, "lr": lr}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_parameters_and_optimizer_state_are_broadcast(horovod, weight_decay):
    results = horovod(2, broadcast, weight_decay)
    assert [r["equal"] for r in results] == [True, True]
    assert [r["lr"] for r in results] == [0.1, 0.1]
    assert_replicas_equal(results)


def broadcast_adamw():
    """Broadcasts the state of a worker that has trained to one that has not, as Horovod's elastic state does."""
    rank = hvd.rank()
    run = Run(module=Given(SHAPES, seed=rank), optimizer=dgc.AdamW, lr=0.01 * (1 + rank), betas=(0.8, 0.99))
    hvd.broadcast_parameters(run.net.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(run.optimizer, root_rank=0)
    for step in range(3):
        run.train(normals(SHAPES, seed_of(step, rank)))
    if rank:  # as a newcomer
        for state in run.optimizer.state.values():
            state["step"].zero_()
    hvd.broadcast_optimizer_state(run.optimizer, root_rank=0)
    for step in range(3, 6):
        run.train(normals(SHAPES, seed_of(step, rank)))
    steps = [float(state["step"]) for state in run.optimizer.state.values()]
    return {**run.result(), "steps": steps, "lr": run.optimizer.param_groups[0]["lr"]}


def test_the_number_of_gradients_is_broadcast(horovod):
    results = horovod(2, broadcast_adamw)
    assert_replicas_equal(results)
    assert [(r["lr"], r["steps"]) for r in results] == [(0.01, [6.0] * 5)] * 2


def foreign(kind):
    net = Given(SHAPES)
    plain = (
        torch.optim.SGD(net.parameters(), lr=0.25) if kind == "SGD" else torch.optim.Adagrad(net.parameters(), lr=0.01)
    )
    calls = []
    named = [(f"{kind}.{n}", p) for n, p in net.named_parameters()]
    optimizer = dgc_hvd.DistributedOptimizer(plain, named, dgc_hvd.DGCCompressor(dgc.DGCConfig(density=0.008)))
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer.register_step_pre_hook(lambda *_: calls.append(net.a.grad.count_nonzero().item()))
    for step in range(10):
        optimizer.zero_grad()
        net(integers(SHAPES, seed_of(step, hvd.rank()))).backward()
        optimizer.step()
    result = {"parameters": {n: p.detach() for n, p in net.named_parameters()}, "momentum": {}}
    return {**result, "residual": {n: optimizer.dgc_state.memory.residual_of(f"{kind}.{n}") for n in LARGE}}, calls


@pytest.mark.parametrize("kind", ["SGD", "Adagrad"])
@pytest.mark.filterwarnings("ignore:dgc. Adagrad gets averages")
def test_optimizers_of_torch_get_plain_accumulation(horovod, kind):
    results, calls = zip(*horovod(2, foreign, kind), strict=True)
    assert_replicas_equal(results)
    assert all(len(c) == 10 and max(c) <= 400 for c in calls)  # hooks of step() see the reduced gradient, once
    if kind == "SGD":
        exact = {"densities": lambda s: 0.008, "masking": lambda s: True, "momentum": 0.0, "lr": 0.25}
        assert_close_to(oracle_for(2, 10, integers, **exact), results, 0.0)


def misuse():
    """Ways through synchronize() and step() that are not the ordinary one; what they leave is compared with that."""
    ordinary, other = Run(), Run()
    for step in range(5):
        g = normals(SHAPES, seed_of(step, hvd.rank()))
        ordinary.train(g)
        other.optimizer.zero_grad()
        if step == 3:  # a gradient that lies otherwise in memory than its parameter
            other.net.a.grad = torch.zeros(SHAPES["a"][::-1]).t()
        other.net(g).backward()
        if step == 0:  # Horovod warns, and goes on
            other.optimizer.synchronize()
            other.optimizer.synchronize()
            with pytest.warns(UserWarning, match="skip_synchronize"):
                other.optimizer.step()
        elif step == 1:  # nobody waited
            with other.optimizer.skip_synchronize():
                other.optimizer.step()
            other.optimizer.synchronize()
        elif step == 2:  # another tensor in its place
            for p in other.net.parameters():
                p.grad = torch.full_like(p.grad, 7.0)
            other.optimizer.step()
        else:
            other.optimizer.step()
    return ordinary.result(), other.result()


def test_other_orders_of_synchronize_and_step_apply_reduced_gradients_too(horovod):
    ordinary, other = zip(*horovod(2, misuse), strict=True)
    assert_equal(ordinary, other)


def breaks_off(way_out):
    """An exception in the middle of backward, when some groups have been sent."""
    run = Run(momentum=0.0, lr=0.25)
    total = {n: torch.zeros(s) for n, s in SHAPES.items()}

    def fail(p):
        raise KeyError("the user's own")

    for step in range(6):
        g = integers(SHAPES, seed_of(step, hvd.rank()))
        for name in SHAPES:
            total[name] += g[name]
        if step != 2:
            run.train(g)
            continue
        hook = run.net.a.register_hook(fail)  # before its gradient is there
        run.optimizer.zero_grad()
        with pytest.raises(KeyError):
            run.net(g).backward()
        hook.remove()
        assert run.state._pass.sent
        if way_out == "synchronize":  # gradients that are there are exchanged, for the others it is zero
            for name, p in run.net.named_parameters():
                if p.grad is None:
                    total[name] -= g[name]
            run.optimizer.synchronize()
            run.state.discard(drop_gradient=False)
        else:
            run.optimizer._start_afresh()  # as after an exception of ours
            with pytest.raises(RuntimeError, match=r"it broke off.*Call state\.discard\(drop_gradient=False\)"):
                run.net(integers(SHAPES, 0)).backward()
            run.state.discard(drop_gradient=False)
            # What has been sent by now is in the residual; the rest never got there.
            there = run.state._pass.reduced
            for name in SHAPES.keys() - there:
                total[name] -= g[name]
        run.optimizer.zero_grad()
    return {**run.result(), "total": total}


@pytest.mark.parametrize("way_out", ["synchronize", "discard"])
def test_a_backward_pass_that_breaks_off_loses_nothing(horovod, way_out):
    results = horovod(2, breaks_off, way_out)
    assert_conserved(results, 8)
    assert [r["step"] for r in results] == [5, 5]


def discarded_too_early():
    run = Run(momentum=0.0, lr=0.25)
    total = {n: torch.zeros(s) for n, s in SHAPES.items()}
    for step in range(4):
        g = integers(SHAPES, seed_of(step, hvd.rank()))
        for name in ("a", "e"):
            total[name] += g[name]
        run.optimizer.zero_grad()
        if step != 1:
            run.net({n: g[n] for n in ("a", "e")}).backward()
            run.optimizer.step()
            continue
        # c never gets a gradient, so its group is sent in step() only, after what the others sent is taken back.
        run.net({n: g[n] for n in ("a", "e")}).backward()
        run.state.discard(drop_gradient=False)
        with pytest.raises(RuntimeError, match="this pass has been discarded"):
            run.optimizer.step()
    total["c"].zero_()
    return {**run.result(), "total": total}


def test_discard_before_synchronize_does_not_apply_what_is_taken_back(horovod):
    assert_conserved(horovod(2, discarded_too_early), 8)


def frozen_and_added(how):
    net = Given(SHAPES)
    net.c.requires_grad_(False)
    run = Run(module=net, momentum=0.0 if how == "unfrozen" else 0.5)
    g = integers(SHAPES, hvd.rank())
    run.train({n: g[n] for n in SHAPES if n != "c"})
    if how == "unfrozen":
        net.c.requires_grad_(True)
        run.optimizer.zero_grad()
        run.net(g).backward()
    else:
        new = nn.Parameter(torch.zeros(3))
        run.optimizer.add_param_group({"params": [new]})
        assert run.optimizer.param_groups[1]["momentum"] == 0.5  # the user's, not the class's
        run.optimizer.zero_grad()
        (run.net({n: g[n] for n in SHAPES if n != "c"}) + new.sum()).backward()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with pytest.raises(ValueError, match="make optimizer and DGCState again") as caught:
        run.optimizer.step()
    unchanged = all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    return str(caught.value), unchanged, run.state.pending


@pytest.mark.parametrize(("how", "shape"), [("unfrozen", "(130, 130)"), ("added", "(3,)")])
def test_a_gradient_that_nobody_reduced_is_not_applied(horovod, how, shape):
    for message, unchanged, pending in horovod(2, frozen_and_added, how):
        assert shape in message
        assert unchanged
        assert pending  # discard() can still take it back
