"""The door for Horovod, on real processes: the same numbers as behind DDP, Horovod's behaviour, and failures."""

import inspect
import math
import os
import signal
import time
import warnings
import weakref

import pytest
import torch
from support import ddp_run, horovod_ranks
from support.horovod_run import Run, dgc_hvd, hvd, train_given
from support.models import Given, integers, normals
from support.ranks import run_ranks
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
from torch import nn
from torch.amp import GradScaler

import dgc

# the same numbers


@pytest.mark.parametrize("world_size", [2, 3])
def test_fifty_steps_have_the_bits_of_the_ddp_hook(horovod, world_size):
    config = dgc.DGCConfig(density=0.008, warmup_steps=12, warmup_densities=(0.25, 0.05), clip_norm=20.0)
    kwargs = {"config": config, "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    results = horovod(world_size, train_given, 50, normals, kwargs)
    assert_replicas_equal(results)
    # Dense parameters: DDP divides before the sum and Horovod after it, and with three ranks the order of the sum
    # depends on how a ring cuts the tensor. With two ranks both are exact.
    ddp = run_ranks(world_size, ddp_run.train_given, 50, normals, kwargs)
    assert_equal(results, ddp, dense_too=world_size == 2)


def test_integer_gradients_match_the_oracle_exactly(horovod):
    results = horovod(2, train_given, 40, integers, {"momentum": 0.0})
    assert_close_to(oracle_for(2, 40, integers, lambda s: 0.008, lambda s: True, momentum=0.0), results, 0.0)


def test_momentum_decay_clipping_and_warm_up_match_the_oracle(horovod):
    config = dgc.DGCConfig(density=0.008, warmup_steps=12, warmup_densities=(0.25, 0.05), clip_norm=20.0)
    sgd = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    results = horovod(3, train_given, 30, normals, {"config": config, **sgd})
    density = lambda s: 0.25 if s < 6 else 0.05 if s < 12 else 0.008  # noqa: E731
    assert_close_to(oracle_for(3, 30, normals, density, lambda s: s >= 12, clip_norm=20.0, **sgd), results, 1e-5)


def test_one_process_compresses_too(horovod):
    results = horovod(1, train_given, 20, integers, {"momentum": 0.0})
    assert_close_to(oracle_for(1, 20, integers, lambda s: 0.008, lambda s: True, momentum=0.0), results, 0.0)
    assert 30 < results[0]["stats"].compression_ratio < 50


def against_torch_sgd(sgd):
    ours = Run(dgc.DGCConfig(density=1.0), **sgd)
    net = Given(SHAPES)
    names = [(f"theirs.{n}", p) for n, p in net.named_parameters()]
    theirs = hvd.DistributedOptimizer(torch.optim.SGD(net.parameters(), **sgd), names)
    for step in range(30):
        g = normals(SHAPES, seed_of(step, hvd.rank()))
        ours.train(g)
        theirs.zero_grad()
        net(g).backward()
        theirs.step()
    return [(p.detach(), q.detach()) for p, q in zip(ours.net.parameters(), net.parameters(), strict=True)]


def test_density_one_is_plain_horovod_with_torch_sgd(horovod):
    for rank in horovod(2, against_torch_sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": True}):
        assert all(torch.equal(ours, theirs) for ours, theirs in rank)


def in_groups():
    results = []
    for groups in (None, 2, [["a", "d"], ["e"]]):
        run = Run(dgc.DGCConfig(density=0.008, clip_norm=30.0), cap=25)
        if groups is not None:
            net = Given(SHAPES)
            chosen = [[net.get_parameter(n) for n in g] for g in groups] if isinstance(groups, list) else groups
            run = Run(dgc.DGCConfig(density=0.008, clip_norm=30.0), module=net, horovod={"groups": chosen})
        for step in range(10):
            run.train(normals(SHAPES, seed_of(step, hvd.rank())))
        names = {id(p): n for n, p in run.net.named_parameters()}
        results.append((run.result(), [[names[id(p)] for p in g] for g in run.optimizer._fusion._groups]))
    return results


def test_groups_decide_what_travels_together_and_change_no_bit(horovod):
    for results in horovod(2, in_groups):
        (one, whole), (two, halves), (three, lists) = results
        assert whole == [["e", "d", "c", "b", "a"]]
        assert halves == [["a", "b", "c"], ["d", "e"]]
        assert lists == [["a", "d"], ["e"], ["b"], ["c"]]
        assert_equal([one, one], [two, three])


def sum_and_average(clip_norm):
    config = dgc.DGCConfig(density=0.008, clip_norm=clip_norm)
    sgd = {"momentum": 0.5, "nesterov": True, "weight_decay": 0.25}
    average, total = Run(config, **sgd), Run(config, horovod={"op": hvd.Sum}, **sgd)
    for step in range(20):
        g = normals(SHAPES, seed_of(step, hvd.rank()))
        average.train({n: hvd.size() * x for n, x in g.items()})
        total.train(g)
    return average.result(), total.result()


@pytest.mark.parametrize("clip_norm", [None, 40.0, 1e4])  # never, always and never clipped
def test_sum_is_the_average_of_gradients_times_the_number_of_processes(horovod, clip_norm):
    averages, totals = zip(*horovod(2, sum_and_average, clip_norm), strict=True)
    assert_equal(averages, totals)  # times 2 is exact
    for average, total in horovod(3, sum_and_average, clip_norm):
        for name, p in average["parameters"].items():
            torch.testing.assert_close(p, total["parameters"][name])


def predivided(monkeypatch=None):
    factors = []
    reduce = hvd.allreduce_async_

    def spy(tensor, **kwargs):
        factors.append((kwargs["prescale_factor"], kwargs["postscale_factor"]))
        return reduce(tensor, **kwargs)

    ours = Run(horovod={"gradient_predivide_factor": 4.0}, momentum=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hvd, "allreduce_async_", spy)
        for step in range(5):
            ours.train(normals(SHAPES, seed_of(step, hvd.rank())))
    return ours.result(), factors


def test_predividing_splits_the_division(horovod):
    results, factors = zip(*horovod(2, predivided), strict=True)
    assert_equal(results, horovod(2, train_given, 5, normals, {"momentum": 0.0}))  # powers of two
    assert factors == ([(0.25, 2.0)] * 5,) * 2


# Horovod's behaviour


def accumulate(passes):
    run = Run(momentum=0.0, horovod={"backward_passes_per_step": passes})
    for step in range(6):
        run.optimizer.zero_grad()
        for i in range(2):
            run.net(integers(SHAPES, seed_of(2 * step + i, hvd.rank()))).backward()
        run.optimizer.step()
    result = run.result()
    try:
        run.net(integers(SHAPES, 0)).backward()
        for _ in range(passes):
            run.net(integers(SHAPES, 0)).backward()
        error = "none"
    except (AssertionError, RuntimeError) as caught:
        error = str(caught)
    return result, error


@pytest.mark.parametrize("passes", [2, 3])
def test_backward_passes_accumulate_before_anything_is_sent(horovod, passes):
    # With 3, step() comes early every time: what is there is exchanged then.
    results, errors = zip(*horovod(2, accumulate, passes), strict=True)

    def sums(shapes, seed):
        step, rank = divmod(seed, 1000)
        first, second = (integers(shapes, seed_of(2 * step + i, rank)) for i in (0, 1))
        return {name: first[name] + second[name] for name in shapes}

    assert_close_to(oracle_for(2, 6, sums, lambda s: 0.008, lambda s: True, momentum=0.0), results, 0.0)
    assert all("backward_passes_per_step" in error for error in errors)


def branches():
    """Uses "e" and "d" every other step, "c" on rank 0 only."""
    run = Run(momentum=0.0, lr=0.25)
    total = {n: torch.zeros(s) for n, s in SHAPES.items()}
    for step in range(20):
        g = integers(SHAPES, seed_of(step, hvd.rank()))
        if step % 2:
            del g["e"], g["d"]
        if hvd.rank():
            del g["c"]
        for name, tensor in g.items():
            total[name] += tensor
        run.train(g)
    return {**run.result(), "total": total}


def test_a_parameter_without_gradient_loses_nothing(horovod):
    assert_conserved(horovod(2, branches), 8)


def poison(on_nonfinite):
    run = Run(dgc.DGCConfig(density=0.008, on_nonfinite=on_nonfinite), momentum=0.0, lr=0.25)
    total = {n: torch.zeros(s) for n, s in SHAPES.items()}
    raised = 0
    for step in range(10):
        g = integers(SHAPES, seed_of(step, hvd.rank()))
        for name in LARGE:
            total[name] += g[name]
        if hvd.rank() == 1 and step in (3, 4):
            total["c"][0, 0] -= g["c"][0, 0]
            g["c"][0, 0] = float("nan")
        try:
            run.train(g)
        except FloatingPointError:
            raised += 1
    return {**run.result(), "total": total, "raised": raised}


def scale_losses(dtype, with_scaler):
    scaler = GradScaler("cpu", init_scale=2.0**16, growth_interval=2, enabled=with_scaler)
    run = Run(momentum=0.0, lr=0.25, dtype=dtype, horovod={"grad_scaler": scaler})
    for step in range(8):
        g = {name: x.to(dtype) for name, x in integers(SHAPES, seed_of(step, hvd.rank())).items()}
        if with_scaler and step == 3:  # a step more, which is to leave no trace but in what was finite: nothing
            run.optimizer.zero_grad()
            poisoned = {name: torch.full_like(x, math.nan if hvd.rank() else 0.0) for name, x in g.items()}
            scaler.scale(run.net(poisoned)).backward()
            with pytest.raises(RuntimeError, match=r"optimizer\.skip_synchronize\(\)"):
                scaler.step(run.optimizer)
            run.optimizer.synchronize()
            with run.optimizer.skip_synchronize():
                scaler.step(run.optimizer)
            scaler.update()
        run.optimizer.zero_grad()
        scaler.scale(run.net(g)).backward()
        run.optimizer.synchronize()
        with run.optimizer.skip_synchronize():
            scaler.step(run.optimizer)
        scaler.update()
    return {**run.result(), "scale": scaler.get_scale()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_scaling_changes_no_bit_and_skips_everywhere(horovod, dtype):
    scaled, plain = (horovod(2, scale_losses, dtype, with_scaler) for with_scaler in (True, False))
    assert_equal(scaled, plain)
    assert [r["scale"] for r in scaled] == [2.0**18] * 2
    assert [(r["step"], r["stats"].skipped) for r in scaled] == [(8, 1)] * 2
    assert [(r["step"], r["stats"].skipped) for r in plain] == [(8, 0)] * 2


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_non_finite_gradients_lose_nothing(horovod, on_nonfinite):
    results = horovod(2, poison, on_nonfinite)
    assert_conserved(results, 8)
    assert [(r["raised"], r["stats"].skipped) for r in results] == [(2 * (on_nonfinite == "raise"), 2)] * 2


def in_a_process_set():
    run = Run(momentum=0.0, horovod={"process_set": horovod_ranks.process_set})
    for step in range(10):
        run.train(integers(SHAPES, seed_of(step, hvd.rank())))
    return run.result()


def test_a_process_set_exchanges_by_itself_and_the_others_run_alone(horovod):
    results = horovod(3, in_a_process_set)

    def of_members(shapes, seed):
        step, rank = divmod(seed, 1000)
        return integers(shapes, seed_of(step, 2 * rank))

    def of_the_other(shapes, seed):
        return integers(shapes, seed + 1)

    exact = {"densities": lambda s: 0.008, "masking": lambda s: True, "momentum": 0.0}
    assert_close_to(oracle_for(2, 10, of_members, **exact), [results[0], results[2]], 0.0)
    assert_close_to(oracle_for(1, 10, of_the_other, **exact), [results[1]], 0.0)


class Mixed(nn.Module):
    """float32, float16-free: Horovod has no bfloat16, and here half of the model is; channels_last and a frozen one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(64, 300).bfloat16()
        self.frozen = nn.Linear(300, 10).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.linear(self.conv(x).mean((2, 3)).bfloat16()).float()).square().mean()


def train_mixed():
    run = Run(module=Mixed(), lr=0.3, momentum=0.9, cap=25)
    torch.manual_seed(hvd.rank())
    x = torch.randn(8, 64, 5, 5)
    losses = []
    for _ in range(30):
        run.optimizer.zero_grad()
        loss = run.net(x)
        loss.backward()
        run.optimizer.step()
        losses.append(float(loss))
    return {**run.result(), "losses": losses, "dense": run.state.stats.dense}


def test_bfloat16_channels_last_and_frozen_parameters(horovod):
    results = horovod(2, train_mixed)
    assert_replicas_equal(results)
    assert set(results[0]["dense"]) == {"conv.bias", "linear.bias"}
    assert results[0]["losses"][-1] < 0.5 * results[0]["losses"][0]


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


def foreign(kind):
    net = Given(SHAPES)
    plain = torch.optim.SGD(net.parameters(), lr=0.25) if kind == "SGD" else torch.optim.Adam(net.parameters(), lr=0.01)
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


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.filterwarnings("ignore:dgc. Adam is outside the paper")
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
        hook = run.net.a.register_post_accumulate_grad_hook(fail)
        run.optimizer.zero_grad()
        with pytest.raises(KeyError):
            run.net(g).backward()
        hook.remove()
        assert run.state._pass.sent
        if way_out == "synchronize":  # gradients that are there are exchanged, for the others it is zero
            run.optimizer.synchronize()
            run.state.discard(drop_gradient=False)
        else:
            run.optimizer._start_afresh()  # as after an exception of ours
            with pytest.raises(RuntimeError, match=r"it broke off.*Call state\.discard\(drop_gradient=False\)"):
                run.net(integers(SHAPES, 0)).backward()
            run.state.discard(drop_gradient=False)
            # What has been sent by now is in the residual; the rest never got there.
            there = {m.name for b in run.state._pass.buckets for m in (*b.compressed, *b.dense)}
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


def odd_shapes():
    shapes = {"empty": (0, 5), "scalar": (), "w": (200, 100), "lonely": (0,)}
    run = Run(shapes=shapes, cap=1e-6)  # each parameter in a group of its own
    for step in range(3):
        run.train(normals(shapes, seed_of(step, hvd.rank())))
    return {**run.result(), "groups": len(run.optimizer._fusion._groups)}


def test_empty_parameters_and_scalars(horovod):
    results = horovod(2, odd_shapes)
    assert_replicas_equal(results)
    assert results[0]["groups"] == 4
    assert not torch.equal(results[0]["parameters"]["scalar"], Given({"scalar": ()}).scalar)


def test_groups_hold_one_type_and_no_more_tensors_than_the_kernels_take():
    small = [nn.Parameter(torch.zeros(2, dtype=torch.float16 if i % 2 else torch.float32)) for i in range(1200)]
    groups = dgc_hvd.fuse(small, None, 25)
    assert [len(group) for group in groups] == [256, 256, 88] * 2
    assert all(len({p.dtype for p in group}) == 1 for group in groups)
    assert [id(p) for p in groups[0][:2]] == [id(small[-1]), id(small[-3])]
    large = [nn.Parameter(torch.zeros(1024, 1024)) for _ in range(5)]
    assert [len(group) for group in dgc_hvd.fuse(large, None, 8.5)] == [2, 2, 1]
    assert [len(group) for group in dgc_hvd.fuse(large, None, 1)] == [1] * 5


# saving and resuming, here and behind DDP


def save_in_the_middle(folder, config, sgd):
    run = Run(config, **sgd)
    for step in range(16):
        run.train(normals(SHAPES, seed_of(step, hvd.rank())))
        if step == 6:
            parts = {"model": run.net, "optimizer": run.optimizer, "dgc": run.state}
            torch.save({k: p.state_dict() for k, p in parts.items()}, f"{folder}/horovod{hvd.rank()}.pt")
    return run.result()


def load(run, path):
    saved = torch.load(path, weights_only=True)
    run.net.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.state.load_state_dict(saved["dgc"])


def resume_here(folder, came_from, config, sgd):
    run = Run(config, **sgd)
    load(run, f"{folder}/{came_from}{hvd.rank()}.pt")
    for step in range(7, 16):
        run.train(normals(SHAPES, seed_of(step, hvd.rank())))
    return run.result()


def resume_behind_ddp(rank, world_size, folder, config, sgd):
    run = ddp_run.Run(config, **sgd)
    load(run, f"{folder}/horovod{rank}.pt")
    for step in range(7, 16):
        run.train(normals(SHAPES, seed_of(step, rank)))
    return run.result()


def save_behind_ddp(rank, world_size, folder, config, sgd):
    run = ddp_run.Run(config, **sgd)
    for step in range(7):
        run.train(normals(SHAPES, seed_of(step, rank)))
    parts = {"model": run.net, "optimizer": run.optimizer, "dgc": run.state}
    torch.save({k: p.state_dict() for k, p in parts.items()}, f"{folder}/ddp{rank}.pt")


def test_a_run_goes_on_under_horovod_or_ddp_with_the_same_bits(horovod, tmp_path):
    config = dgc.DGCConfig(density=0.008, warmup_steps=10, warmup_densities=(0.25, 0.05))
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    straight = horovod(2, save_in_the_middle, str(tmp_path), config, sgd)
    run_ranks(2, save_behind_ddp, str(tmp_path), config, sgd)
    assert_equal(straight, horovod(2, resume_here, str(tmp_path), "horovod", config, sgd))
    assert_equal(straight, horovod(2, resume_here, str(tmp_path), "ddp", config, sgd))
    assert_equal(straight, run_ranks(2, resume_behind_ddp, str(tmp_path), config, sgd))


# bytes


def count_bytes():
    """Measures the tensors given to Horovod's collectives."""
    sizes = {"gather": [], "reduce": []}
    gather, reduce = hvd.allgather_async, hvd.allreduce_async_

    def spy_gather(tensor, **kwargs):
        sizes["gather"].append((kwargs["name"], tensor.nbytes))
        return gather(tensor, **kwargs)

    def spy_reduce(tensor, **kwargs):
        sizes["reduce"].append((kwargs["name"], tensor.nbytes))
        return reduce(tensor, **kwargs)

    run = Run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hvd, "allgather_async", spy_gather)
        patch.setattr(hvd, "allreduce_async_", spy_reduce)
        run.train(normals(SHAPES, hvd.rank()))
    align = lambda n: -(-n // 16) * 16  # noqa: E731
    formula = 0
    for bucket in run.state._pass.buckets:
        rows = bucket.segments.tolist()
        k, tiles = sum(r[4] for r in rows), sum(-(-r[3] // 65536) for r in rows)
        formula += align(32 + len(rows)) + align(4 * tiles) + align(2 * k) + align(4 * k)
    return sizes, formula, run.state.stats.bytes_sent


def test_bytes_given_to_horovod_are_what_stats_and_the_formula_say(horovod):
    for sizes, formula, stats in horovod(3, count_bytes):
        # One of each for a group, however many parameters it has; e is alone, d, c, b are one, a is alone.
        assert sorted(name for name, _ in sizes["gather"]) == ["dgc.payload.a", "dgc.payload.d", "dgc.payload.e"]
        assert [name for name, _ in sizes["reduce"]] == ["dgc.dense.d"]
        gathered, reduced = (sum(n for _, n in sizes[kind]) for kind in ("gather", "reduce"))
        assert gathered == formula
        assert reduced == 4 * (100 + 1200)
        assert stats == 2 * gathered + 2 * 2 * reduced // 3


# what goes wrong


def refused():
    """Returns the message of every wrong call, with one process."""
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    sgd = dgc.SGD(net.parameters(), lr=0.1, momentum=0.9)
    named = list(net.named_parameters())
    calls = {
        "fp16": {"compression": hvd.Compression.fp16},
        "class": {"compression": dgc_hvd.DGCCompressor},
        "adasum": {"op": hvd.Adasum},
        "min": {"op": hvd.Min},
        "sparse": {"sparse_as_dense": True},
        "predivide": {"op": hvd.Sum, "gradient_predivide_factor": 2.0},
        "passes": {"backward_passes_per_step": 0},
        "groups": {"groups": -1},
        "twice in groups": {"groups": [[named[0][1]], [named[0][1]]]},
        "unnamed": {"named_parameters": named[:2]},
        "twice": {"named_parameters": [*named[:3], ("0.weight", named[3][1])]},
        "no tuples": {"named_parameters": net.parameters()},
        "set": {"process_set": hvd.ProcessSet([0])},
        "momentum": {"optimizer": torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)},
    }
    messages = {}
    for name, wrong in calls.items():
        with pytest.raises((TypeError, ValueError)) as caught:
            dgc_hvd.DistributedOptimizer(**{"optimizer": sgd, "named_parameters": named, **wrong})
        messages[name] = f"{caught.typename}: {caught.value}"
    with pytest.raises(ValueError, match="bucket_cap_mb: expected a number > 0, got 0"):
        dgc_hvd.DGCCompressor(bucket_cap_mb=0)
    embedding = nn.Embedding(300, 100, sparse=True)
    run = Run(module=embedding)
    try:
        run.train(torch.tensor([1, 2]))
    except ValueError as error:
        messages["sparse gradient"] = str(error)
    # One process, and the plain optimizer: Horovod registers no hooks, so dgc.SGD has to notice.
    plain = hvd.DistributedOptimizer(sgd, named, dgc_hvd.DGCCompressor())
    net(torch.ones(1, 10)).sum().backward()
    try:
        plain.step()
    except RuntimeError as error:
        messages["plain"] = str(error)
    return messages


def test_wrong_arguments_are_refused_with_the_reason(horovod):
    messages = horovod(1, refused)[0]
    for name, expected in {
        "fp16": "TypeError: compression: expected a DGCCompressor",
        "class": "such as dgc.horovod.DGCCompressor(dgc.DGCConfig())",
        "adasum": "got hvd.Adasum. DGC adds up",
        "min": "op: expected hvd.Average or hvd.Sum",
        "sparse": "sparse_as_dense: expected False",
        "predivide": "gradient_predivide_factor: expected 1",
        "passes": "backward_passes_per_step: expected an integer > 0, got 0",
        "groups": "groups should be a non-negative integer",
        "twice in groups": "can only appear once",
        "unnamed": "were not named",
        "twice": "Found duplicates: 0.weight",
        "no tuples": "sequence of tuples",
        "set": "process_set: expected a registered one",
        "momentum": "ValueError: optimizer: expected dgc.SGD, got SGD with momentum > 0",
        "sparse gradient": "use sparse=False",
        "plain": "dgc.horovod.DistributedOptimizer(optimizer, model.named_parameters())",
    }.items():
        assert expected in messages[name], name


def plain_horovod():
    net = Given(SHAPES)
    sgd = dgc.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(sgd, net.named_parameters(), dgc_hvd.DGCCompressor())
    try:
        net(normals(SHAPES, 0)).backward()
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_the_compressor_in_plain_horovod_raises_with_the_right_line(horovod):
    for message in horovod(2, plain_horovod):
        assert "expected DGC's DistributedOptimizer, got Horovod's own" in message
        assert "compression=dgc_hvd.DGCCompressor(dgc.DGCConfig(...))" in message


def differ(what):
    try:
        if what == "density":
            Run(dgc.DGCConfig(density=0.008 * (1 + hvd.rank())))
        elif what == "group of a":
            Run(cap=0.1 if hvd.rank() else 25)
        elif what == "op":
            Run(horovod={"op": hvd.Sum if hvd.rank() else hvd.Average})
        else:
            Run(shapes={**SHAPES, "c": (130, 130 + hvd.rank())})
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("what", ["density", "group of a", "op", "parameter c"])
def test_processes_that_differ_are_found_at_the_start(horovod, what):
    for message in horovod(2, differ, what):
        assert f"{what}: rank 0 has" in message


def another_step():
    run = Run(shapes={"a": (200, 100)})
    for step in range(3):
        run.train(normals({"a": (200, 100)}, step))
    before = run.net.a.detach().clone()
    run.state.step += hvd.rank()  # as if it had run one more backward pass
    try:
        run.optimizer.zero_grad()
        run.net(normals({"a": (200, 100)}, 9)).backward()
        run.optimizer.synchronize()
        return "no error"
    except dgc.PayloadError as error:
        run.state.discard(drop_gradient=False)
        waiting = run.state.memory.residual_of("a").count_nonzero()
        unchanged = torch.equal(before, run.net.a.detach())
        run.state.step -= hvd.rank()
        run.train(normals({"a": (200, 100)}, 10))  # and it goes on
        return str(error), unchanged, int(waiting), torch.equal(before, run.net.a.detach())


def test_a_process_at_another_step_is_named_and_nothing_is_applied(horovod):
    for rank, (message, unchanged, waiting, still) in enumerate(horovod(2, another_step)):
        assert f"payload of rank {1 - rank}: it is at another step" in message
        assert unchanged
        assert waiting == 20_000  # what was sent is back
        assert not still


def another_phase():
    config = dgc.DGCConfig(density=0.008, warmup_steps=2, warmup_densities=(0.25,))
    shapes = {"a": (200, 100)}
    run = Run(config, shapes=shapes, momentum=0.0, lr=0.25)
    run.train(integers(shapes, hvd.rank()))
    run.state.step += hvd.rank()  # the next one is after the warm-up there, and not yet here
    run.optimizer.zero_grad()
    run.net(integers(shapes, 2 + hvd.rank())).backward()
    with pytest.raises(RuntimeError) as caught:
        run.optimizer.step()
    run.state.discard(drop_gradient=False)
    run.state.step -= hvd.rank()
    run.train(integers(shapes, 4 + hvd.rank()))
    total = sum(integers(shapes, 2 * step + hvd.rank())["a"] for step in range(3))
    return str(caught.value), {**run.result(), "total": total}


def test_payloads_of_different_sizes_are_an_error_and_lose_nothing(horovod):
    messages, results = zip(*horovod(2, another_phase), strict=True)
    assert all("ranks send different buckets, or are at different steps of the warm-up" in m for m in messages)
    assert_replicas_equal(results)
    moved = Given({"a": (200, 100)}).a.detach() - results[0]["parameters"]["a"]
    waiting = sum(r["residual"]["a"] for r in results)
    assert torch.equal(8 * moved + waiting, sum(r["total"] for r in results))


def die(moment):
    """Returns how many steps the survivor still did, and in how many seconds; rank 1 dies, and returns nothing."""
    kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    begin, done = time.monotonic(), 0
    # Around everything: the survivor may be behind, and meet the error in backward(), or in the step before.
    try:
        run = Run()
        for step in range(3):
            run.train(normals(SHAPES, seed_of(step, hvd.rank())))
        if moment == "between exchanges":
            time.sleep(1)
            if hvd.rank() == 1:
                kill()
            time.sleep(2)  # Horovod is shut down by then, and backward() is told so
        if moment == "in backward" and hvd.rank() == 1:
            run.net.c.register_hook(kill)  # e was sent, a never will be
        for done in range(100):
            run.optimizer.zero_grad()
            run.net(normals(SHAPES, done)).backward()
            if hvd.rank() == 1:
                kill()
            run.optimizer.step()
    except hvd.mpi_ops.HorovodInternalError:
        return done, time.monotonic() - begin
    raise AssertionError("expected HorovodInternalError, got none in 100 steps")


@pytest.mark.parametrize("moment", ["between exchanges", "in backward", "after backward"])
def test_a_process_that_dies_is_horovods_error_on_the_others_and_not_a_hang(moment):
    pool = horovod_ranks.Pool(2, outlived=True, timeout=90)
    try:
        survivor, dead = pool.send(die, moment)
        ((done, seconds),) = pool.results([survivor])
        assert not dead.exists()
        assert done <= (moment == "after backward")  # where all of it may have arrived
        assert seconds < 60  # gloo gives a lost peer 30, where it does not see the connection close
    finally:
        pool.close()


def test_the_signature_is_horovods_but_for_the_default_compression():
    ours = inspect.signature(dgc_hvd.DistributedOptimizer).parameters
    theirs = inspect.signature(hvd.DistributedOptimizer).parameters
    assert list(ours) == [*theirs, "grad_scaler"]
    assert {n for n in theirs if ours[n].default != theirs[n].default} == {"compression"}
