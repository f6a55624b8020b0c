"""What public bug reports of gradient hooks, trainers and optimizers describe: on DDP, over one gloo rank and more.

The numbers are those of docs/reliability.md, "What users' loops do".
"""

import copy
import dataclasses
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from support.alone import Alone
from support.ddp_run import Run
from support.models import Given, integers, normals
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, assert_replicas_equal, seed_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from dgc import ops
from dgc.ops import reference
from dgc.step.bucket import Gradients

WIDE = {"a": (200, 100), "b": (130, 130), "bias": (50,)}
CONFIG = dgc.DGCConfig(density=0.01, dense_below=1000)
DROPPABLE = dataclasses.replace(CONFIG, droppable=True)


def one(config=CONFIG, shapes=WIDE, optimizer=dgc.SGD, module=None, ddp=None, **sgd):
    """Returns a DDP model, its optimizer and the state registered on it."""
    model = DistributedDataParallel(Given(shapes) if module is None else module, **(ddp or {}))
    sgd = sgd or {"lr": 0.5, "momentum": 0.5}
    optimizer = optimizer(model.parameters(), **sgd)
    state = dgc.DGCState(model.named_parameters(), optimizer, config)
    state.register(model)
    return model, optimizer, state


def step(model, optimizer, gradients, between=lambda: None):
    optimizer.zero_grad()
    model(gradients).backward()
    between()
    optimizer.step()


def memory_of(state):
    return state.memory.residual.clone(), None if state.memory.momentum is None else state.memory.momentum.clone()


def assert_same(one, other):
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


# 1: gradients that are thrown away


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("clip_norm", [None, 10.0])
def test_a_dropped_pass_leaves_no_bit_behind(gloo, momentum, clip_norm):
    config = dataclasses.replace(DROPPABLE, clip_norm=clip_norm)
    model, optimizer, state = one(config, lr=0.5, momentum=momentum)
    straight, other, its = one(config, lr=0.5, momentum=momentum)
    for i in range(3):
        step(model, optimizer, normals(WIDE, i))
        step(straight, other, normals(WIDE, i))
    before = memory_of(state)
    optimizer.zero_grad()
    model({name: 1000 * g for name, g in normals(WIDE, 9).items()}).backward()
    state.discard(drop_gradient=True)
    optimizer.zero_grad()
    assert_same(memory_of(state), before)
    assert (state.step, state.stats.skipped) == (3, 1)
    step(model, optimizer, normals(WIDE, 4))
    step(straight, other, normals(WIDE, 4))
    assert_same(memory_of(state), memory_of(its))
    for p, q in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q)


def test_dropping_without_droppable_says_what_it_takes(gloo):
    model, optimizer, state = one()
    model(normals(WIDE, 0)).backward()
    with pytest.raises(ValueError, match=r"DGCConfig\(droppable=True\)"):
        state.discard(drop_gradient=True)
    assert state.pending
    with pytest.warns(UserWarning, match="it arrives with later steps"):
        state.discard()
    assert torch.equal(state.memory.residual_of("a"), normals(WIDE, 0)["a"])  # kept, as the warning says
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, normals(WIDE, 1))
        model(normals(WIDE, 2)).backward()
        state.discard()  # warned of once
    assert optimizer.steps == 1


def test_a_broken_off_pass_can_be_dropped_too():
    alone = Alone(WIDE, DROPPABLE, lr=0.5, momentum=0.5)
    alone.train(normals(WIDE, 0))
    before = memory_of(alone.state)
    alone.model(normals(WIDE, 1)).backward()
    half = Gradients([alone.model.a], [alone.model.a.grad.view(-1)], [(0, 0)])
    alone.state.reduce(half, first=True, last=False)
    assert not torch.equal(alone.state.memory.residual, before[0])
    alone.state.discard(drop_gradient=True)
    assert_same(memory_of(alone.state), before)


def freeze(rank, world_size, config):
    """Layer "a" is frozen for ten steps as SwAV and DINO do it, then trains."""
    run = Run(config)
    outcome = []
    for i in range(12):
        run.optimizer.zero_grad()
        run.ddp(normals(SHAPES, seed_of(i, rank))).backward()
        if i < 10:
            run.net.a.grad = None
        before = run.net.a.detach().clone()
        run.optimizer.step()
        outcome.append((run.net.a.detach() - before).norm().item())
    return outcome, run.result()


def test_a_layer_frozen_by_its_grad_starts_afresh():
    config = dgc.DGCConfig(density=0.008, droppable=True)
    results = run_ranks(2, freeze, config)
    fresh = run_ranks(2, freeze_nothing)
    assert_replicas_equal([result for _, result in results])
    for rank in range(2):
        moves, result = results[rank]
        assert moves[:10] == [0.0] * 10
        # As if the ten passes had not been: momentum and residual of "a" are those of two steps.
        assert torch.equal(result["residual"]["a"], fresh[rank]["residual"]["a"])
        assert torch.equal(result["momentum"]["a"], fresh[rank]["momentum"]["a"])


def freeze_nothing(rank, world_size):
    run = Run(dgc.DGCConfig(density=0.008, droppable=True))
    for i in range(10, 12):
        run.train(normals(SHAPES, seed_of(i, rank)))
    return run.result()


def test_a_compressed_parameter_without_its_gradient_is_an_error_else(gloo):
    model, optimizer, state = one()
    step(model, optimizer, normals(WIDE, 0))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"got None or zeros for a\. .*dense_parameters=.*droppable=True"):
        step(model, optimizer, normals(WIDE, 1), lambda: setattr(model.module.a, "grad", None))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert state.pending  # nothing is lost
    # A dense one costs nothing: the error names this way.
    model, optimizer, state = one(dataclasses.replace(CONFIG, dense_parameters=("a",)))
    start = model.module.a.detach().clone()
    for i in range(3):
        step(model, optimizer, normals(WIDE, i), lambda: setattr(model.module.a, "grad", None))
    assert torch.equal(model.module.a, start)
    step(model, optimizer, normals(WIDE, 3))
    assert torch.equal(model.module.a.detach(), start - 0.5 * normals(WIDE, 3)["a"])


class Line(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(60, 60), nn.Linear(60, 60)

    def forward(self, x):
        return self.second(self.first(x).relu())


def gan(rank, world_size, kind, quiet):
    """A GAN's two steps, twice: the discriminator's gradients in the generator's step are nobody's."""
    nets = [DistributedDataParallel(Line(i)) for i in range(2)]
    pairs = []
    for net in nets:
        optimizer = kind(net.parameters(), lr=0.01, momentum=0.5)
        if kind is dgc.SGD:
            dgc.DGCState(net.named_parameters(), optimizer, dgc.DGCConfig(density=1.0)).register(net)
        pairs.append((net, optimizer))
    (generator, g), (discriminator, d) = pairs
    torch.manual_seed(10 + rank)
    for _ in range(4):
        noise, real = torch.randn(8, 60), torch.randn(8, 60)
        d.zero_grad()
        fake = generator(noise)
        (discriminator(torch.cat([fake.detach(), real])).square().mean()).backward()
        d.step()
        g.zero_grad()
        if quiet:
            with discriminator.no_sync():
                (discriminator(fake) - 1).square().mean().backward()
        else:
            (discriminator(fake) - 1).square().mean().backward()
        g.step()
    return [p.detach() for net in nets for p in net.parameters()]


def test_a_gan_gets_the_exact_lines_and_they_work():
    with pytest.raises(Exception, match="a GAN's discriminator's in the generator's step") as caught:
        run_ranks(2, gan, dgc.SGD, False)
    assert "with model.no_sync():  # the forward pass as well" in str(caught.value)
    ours, theirs = run_ranks(2, gan, dgc.SGD, True), run_ranks(2, gan, torch.optim.SGD, False)
    for p, q, expected in zip(*ours, theirs[0], strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, expected)


def zero_in_place(model, optimizer):
    model.module.a.grad.zero_()


def zero_data(model, optimizer):
    model.module.a.grad.data.mul_(0)


def zero_all(model, optimizer):
    optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("zero", [zero_in_place, zero_data, zero_all])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("droppable", [False, True])
def test_a_gradient_that_is_zeroed_is_thrown_away(gloo, zero, late, droppable):
    config = dataclasses.replace(CONFIG, droppable=droppable, on_changed_gradient="ignore")
    model, optimizer, state = one(config)
    state._late = late  # as on a GPU
    step(model, optimizer, normals(WIDE, 0))
    before = memory_of(state)
    kept = state.memory.residual_of("a") + 0.5 * state.memory.momentum_of("a") + normals(WIDE, 1)["a"]

    def between():
        zero(model, optimizer)

    if droppable:
        step(model, optimizer, normals(WIDE, 1), between)
        start, end = state.memory.span("a")
        assert torch.equal(state.memory.residual[start:end], before[0][start:end])
        assert torch.equal(state.memory.momentum[start:end], before[1][start:end])
        start, end = state.memory.span("b")
        assert torch.equal(state.memory.residual[start:end], before[0][start:end]) == (zero is zero_all)
        step(model, optimizer, normals(WIDE, 2))
        return
    if late:
        step(model, optimizer, normals(WIDE, 1), between)
        torch.testing.assert_close(state.memory.residual_of("a"), kept)  # it is back at once, the error comes later
        gradients, between = normals(WIDE, 2), (lambda: None)
    else:
        gradients = normals(WIDE, 1)
    with pytest.raises(RuntimeError, match=r"got None or zeros for .*a"):
        step(model, optimizer, gradients, between)
    state.discard(drop_gradient=False)
    if not late:
        torch.testing.assert_close(state.memory.residual_of("a"), kept)
    step(model, optimizer, normals(WIDE, 3))


@pytest.mark.parametrize("late", [False, True])
def test_zeros_that_were_reduced_are_not_thrown_away(gloo, late):
    """An average of zero, and a mask that leaves something."""
    config = dataclasses.replace(CONFIG, on_changed_gradient="ignore")
    model, optimizer, state = one(config)
    state._late = late
    gradients = {**normals(WIDE, 0), "a": torch.zeros(WIDE["a"])}
    gradients["a"][0, 0] = 1
    step(model, optimizer, gradients)
    step(model, optimizer, {**normals(WIDE, 1), "a": torch.zeros(WIDE["a"])})

    def mask():
        model.module.b.grad.view(-1)[:16000] = 0

    step(model, optimizer, normals(WIDE, 2), mask)
    step(model, optimizer, normals(WIDE, 3))
    assert state.step == 4


def cancel(rank, world_size):
    """What the two ranks send adds up to zero; then one of them drops a gradient alone."""
    run = Run(dgc.DGCConfig(density=0.008, droppable=True))
    g = integers(SHAPES, 0)
    run.train({name: x if rank == 0 else -x for name, x in g.items()})
    after = run.state.memory.residual_of("a").clone()
    run.optimizer.zero_grad()
    run.ddp(integers(SHAPES, seed_of(1, rank))).backward()
    if rank == 0:
        run.net.a.grad = None
    run.optimizer.step()
    with pytest.raises(RuntimeError, match=r"payload of rank .*it alone has thrown a gradient away"):
        run.train(integers(SHAPES, seed_of(2, rank)))
    return after


def test_averages_that_cancel_are_applied_and_dropping_alone_is_noticed():
    results = run_ranks(2, cancel)
    assert torch.equal(results[0], -results[1])
    assert (results[0] == 0).sum() > (integers(SHAPES, 0)["a"] == 0).sum()  # what was sent is not back


def test_step_without_any_gradient_left_is_not_silent(gloo):
    for config in (CONFIG, DROPPABLE):
        model, optimizer, state = one(config)
        step(model, optimizer, normals(WIDE, 0))
        before = memory_of(state)
        if config.droppable:
            step(model, optimizer, normals(WIDE, 1), lambda m=model: m.zero_grad())
            assert_same(memory_of(state), before)
            step(model, optimizer, normals(WIDE, 2))
        else:
            with pytest.raises(RuntimeError, match="got None or zeros for"):
                step(model, optimizer, normals(WIDE, 1), lambda m=model: m.zero_grad())


# 2: parameters that the hook never gets


class Head(nn.Module):
    """Forward uses "extra" only where it is there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.top = nn.Linear(100, 100), nn.Linear(100, 100)

    def forward(self, x):
        return self.top(self.body(x)).square().mean()


@pytest.mark.parametrize("how", ["frozen when wrapped", "outside", "ignored", "added"])
def test_a_parameter_that_is_not_reduced_is_named(gloo, how):
    net, outside = Head(), nn.Linear(100, 100)
    if how == "frozen when wrapped":
        net.top.requires_grad_(False)
    if how == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["top.weight", "top.bias"])
    model = DistributedDataParallel(net)
    net.top.requires_grad_(True)
    both = [*model.named_parameters(), *((f"loss.{n}", p) for n, p in outside.named_parameters() if how == "outside")]
    optimizer = dgc.SGD([p for _, p in both], lr=0.1, momentum=0.9)
    state = dgc.DGCState(both, optimizer, CONFIG)
    model.register_comm_hook(state, dgc.dgc_hook)
    loss = model(torch.randn(4, 100))
    if how == "added":
        optimizer.add_param_group({"params": list(outside.parameters())})
    if how in ("outside", "added"):
        loss = loss + outside(torch.randn(4, 100)).square().mean()
    before = [p.detach().clone() for p in (*model.parameters(), *outside.parameters())]
    name = {"outside": "loss.weight", "added": "one of shape (100, 100)"}.get(how, "top.weight")
    if how in ("outside", "ignored"):  # seen as soon as the DDP module is
        with pytest.raises(ValueError, match=name.replace("(", r"\(")):
            loss.backward()
        with pytest.raises(ValueError, match=name):
            state.register(model)
    else:
        loss.backward()
        with pytest.raises(ValueError, match=name.replace("(", r"\(").replace(")", r"\)")):
            optimizer.step()
    after = (*model.parameters(), *outside.parameters())
    assert all(torch.equal(p, q) for p, q in zip(after, before, strict=True))


def test_what_is_frozen_after_ddp_is_named(gloo):
    net = Given(WIDE)
    model = DistributedDataParallel(net, find_unused_parameters=True)
    net.b.requires_grad_(False)
    optimizer = dgc.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    state = dgc.DGCState(net.named_parameters(), optimizer, CONFIG)
    state.register(model)
    with pytest.raises(ValueError, match=r"\(130, 130\) that was frozen.*Freeze it before DDP wraps"):
        model(normals(WIDE, 0)).backward()


# 3: rank, world size and group


def made_too_early(rank, world_size, registered):
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    net = Given(SHAPES)
    optimizer = dgc.SGD(net.parameters(), lr=0.5, momentum=0.5)
    state = dgc.DGCState(net.named_parameters(), optimizer, dgc.DGCConfig(density=0.008))
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=world_size)
    ddp = DistributedDataParallel(net)
    if registered:
        state.register(ddp)
        assert state.exchange.world_size == world_size
    else:
        ddp.register_comm_hook(state, dgc.dgc_hook)
    for i in range(5):
        step(ddp, optimizer, normals(SHAPES, seed_of(i, rank)))
    return {"parameters": {n: p.detach() for n, p in net.named_parameters()}, "sent": state.stats.bytes_sent}


@pytest.mark.parametrize("registered", [True, False])
def test_a_state_made_before_the_process_group_finds_it(registered):
    results = run_ranks(2, made_too_early, registered)
    assert_replicas_equal(results)
    assert results[0]["sent"] > 0


def two_subgroups(rank, world_size, registered):
    """Ranks 0 and 1 train one model, rank 2 (and 3) another; nobody names a process_group to the state."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    ddp = DistributedDataParallel(Given(SHAPES, seed=rank // 2), process_group=groups[rank // 2])
    optimizer = dgc.SGD(ddp.parameters(), lr=0.25)
    state = dgc.DGCState(ddp.named_parameters(), optimizer, dgc.DGCConfig(density=1.0))
    if registered:
        state.register(ddp)
    else:
        ddp.register_comm_hook(state, dgc.dgc_hook)
    step(ddp, optimizer, integers(SHAPES, rank))
    return {n: p.detach() for n, p in ddp.module.named_parameters()}


@pytest.mark.parametrize("registered", [True, False])
def test_ddp_in_a_subgroup_is_reduced_in_that_group(registered):
    results = run_ranks(4, two_subgroups, registered)
    for rank, result in enumerate(results):
        start = dict(Given(SHAPES, seed=rank // 2).named_parameters())
        pair = (0, 1) if rank < 2 else (2, 3)
        for name, p in result.items():
            mean = sum(integers(SHAPES, r)[name] for r in pair) / 2
            assert torch.equal(p, start[name].detach() - 0.25 * mean), name


def loaded_before_register(rank, world_size, early):
    groups = [dist.new_group([r]) for r in range(2)]
    ddp = DistributedDataParallel(Given(SHAPES), process_group=groups[rank])
    optimizer = dgc.SGD(ddp.parameters(), lr=0.25)
    state = dgc.DGCState(ddp.named_parameters(), optimizer, dgc.DGCConfig(density=0.008))
    state.register(ddp)
    step(ddp, optimizer, normals(SHAPES, rank))
    saved = copy.deepcopy(state.state_dict())
    ddp = DistributedDataParallel(ddp.module, process_group=groups[rank])
    fresh = dgc.DGCState(ddp.named_parameters(), optimizer, dgc.DGCConfig(density=0.008))
    if early:
        fresh.load_state_dict(saved)
        with pytest.raises(RuntimeError, match=r"expected load_state_dict\(\) after register\(\)"):
            fresh.register(ddp)
    else:
        fresh.register(ddp)
        fresh.load_state_dict(saved)
        assert torch.equal(fresh.memory.residual, state.memory.residual)


@pytest.mark.parametrize("early", [True, False])
def test_a_residual_is_not_divided_among_other_ranks_than_ddp_s(early):
    run_ranks(2, loaded_before_register, early)


def test_another_group_than_ddp_s_is_refused(gloo):
    model = DistributedDataParallel(Given(WIDE))
    optimizer = dgc.SGD(model.parameters(), lr=0.1)
    state = dgc.DGCState(model.named_parameters(), optimizer, CONFIG, process_group=dist.new_group([0]))
    with pytest.raises(ValueError, match="process_group: expected DDP's, of ranks"):
        state.register(model)


def again(rank, world_size, registered):
    """torch.distributed is shut down and initialised again; the run goes on with its residual."""
    run = Run(dgc.DGCConfig(density=0.008), momentum=0.0, lr=0.25)
    for i in range(4):
        run.train(integers(SHAPES, seed_of(i, rank)))
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=world_size)
    run.ddp = DistributedDataParallel(run.net)
    if registered:
        run.state.register(run.ddp)
    else:
        run.ddp.register_comm_hook(run.state, dgc.dgc_hook)
    for i in range(4, 8):
        run.train(integers(SHAPES, seed_of(i, rank)))
    assert run.state.exchange.group is run.ddp.process_group
    return run.result()


@pytest.mark.parametrize("registered", [True, False])
def test_after_another_initialisation_the_run_goes_on(registered):
    results = run_ranks(2, again, registered)
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        total = sum(integers(SHAPES, seed_of(i, r))[name] for i in range(8) for r in range(2))
        moved = start[name].detach() - results[0]["parameters"][name]
        assert torch.equal(8 * moved + sum(r["residual"][name] for r in results), total), name


def differ_unregistered(rank, world_size):
    ddp = DistributedDataParallel(Given(SHAPES))
    optimizer = dgc.SGD(ddp.parameters(), lr=0.1)
    state = dgc.DGCState(ddp.named_parameters(), optimizer, dgc.DGCConfig(density=0.01 * (1 + rank)))
    ddp.register_comm_hook(state, dgc.dgc_hook)
    with pytest.raises(ValueError, match=r"density: rank 0 has 0\.01, rank 1 has 0\.02"):
        ddp(normals(SHAPES, rank)).backward()


def test_ranks_that_differ_are_found_in_the_first_pass_without_register():
    run_ranks(2, differ_unregistered)


def newcomer(rank, world_size):
    """Rank 0 trains alone, at another density; then rank 1 joins."""
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    net = Given(SHAPES)
    optimizer = dgc.SGD(net.parameters(), lr=0.25, momentum=0.5)
    state = dgc.DGCState(net.named_parameters(), optimizer, dgc.DGCConfig(density=0.008))
    if rank == 0:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        alone = DistributedDataParallel(net)
        state.register(alone)
        step(alone, optimizer, normals(SHAPES, 0))
        state.set_density(0.05)
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=world_size)
    ddp = DistributedDataParallel(net)
    state.register(ddp)
    assert (state.step, state.density) == (1, 0.05)
    step(ddp, optimizer, normals(SHAPES, rank))
    return {"parameters": {n: p.detach() for n, p in net.named_parameters()}, "density": state.stats.density}


def test_a_newcomer_goes_by_what_was_set_before():
    results = run_ranks(2, newcomer)
    assert_replicas_equal(results)
    assert [r["density"] for r in results] == [0.05, 0.05]


def trained_alone(rank, world_size):
    net = Given(SHAPES)
    optimizer = dgc.SGD(net.parameters(), lr=0.5)
    state = dgc.DGCState(net.named_parameters(), optimizer, dgc.DGCConfig(density=0.008))
    state.load_state_dict(state.state_dict())  # this process's own, of rank 0 or 1
    copied = pickle.loads(pickle.dumps(state)) if rank == 0 else None
    files = [copied and pickle.dumps(copied)]
    dist.broadcast_object_list(files)
    loaded = pickle.loads(files[0])  # rank 0's on every rank
    ddp = DistributedDataParallel(Given(SHAPES))
    ours = dict(ddp.module.named_parameters())
    for name, p in loaded.parameters.by_name.items():
        ddp.module.register_parameter(name, p)
    del ours
    ddp = DistributedDataParallel(ddp.module)
    with pytest.raises(RuntimeError, match="each rank to bring a share of its own, but rank 0 was rank 0 of 2; rank 1"):
        loaded.register(ddp)


def test_rank_0_s_state_on_every_rank_is_refused():
    run_ranks(2, trained_alone)


def density_first(rank, world_size, densities, folder):
    dist.destroy_process_group()
    net = Given(SHAPES)
    optimizer = dgc.SGD(net.parameters(), lr=0.25)
    state = dgc.DGCState(net.named_parameters(), optimizer, dgc.DGCConfig(density=0.1))
    state.set_density(densities[rank])
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=world_size)
    model = DistributedDataParallel(net)
    if densities[0] != densities[1]:
        with pytest.raises(ValueError, match=r"density of set_density\(\): rank 0 has 0\.01, rank 1 has 0\.02"):
            state.register(model)
        return None
    state.register(model)
    for i in range(2):
        step(model, optimizer, normals(SHAPES, seed_of(i, rank)))
    return state.density, state.step, {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("densities", [(0.01, 0.01), (0.01, 0.02)], ids=["alike", "apart"])
def test_a_density_set_before_the_process_group_holds_in_it(tmp_path, densities):
    results = run_ranks(2, density_first, densities, str(tmp_path))
    if densities[0] == densities[1]:
        assert [r[:2] for r in results] == [(0.01, 2)] * 2
        assert all(torch.equal(results[0][2][n], results[1][2][n]) for n in SHAPES)


# 4: torch's defaults


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", [CONFIG, dgc.DGCConfig(density=1.0)])
def test_the_default_type_is_not_memory_s(gloo, dtype, config):
    straight, other = one(config, lr=0.5, momentum=0.99)[:2]
    torch.set_default_dtype(dtype)
    try:
        model, optimizer, state = one(config, lr=0.5, momentum=0.99)
        for i in range(4):
            step(model, optimizer, {n: g.float() for n, g in normals_float32(i).items()})
        saved = copy.deepcopy(state.state_dict())
        state.load_state_dict(saved)
    finally:
        torch.set_default_dtype(torch.float32)
    for i in range(4):
        step(straight, other, normals_float32(i))
    assert state.memory.residual.dtype == state.memory.momentum.dtype == torch.float32
    for p, q in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q)


def normals_float32(seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=torch.float32) for n, shape in WIDE.items()}


@pytest.mark.parametrize("native", [True, False])
def test_the_default_device_is_not_memory_s(native, monkeypatch):
    if not native:
        for name in ("compress_", "unpack", "restore_", "subtract_"):
            monkeypatch.setattr(ops, name, getattr(reference, name))
    config = dataclasses.replace(CONFIG, clip_norm=5.0, droppable=True)
    gradients = [normals(WIDE, i) for i in range(3)]
    alone, straight = Alone(WIDE, config, lr=0.5, momentum=0.5), Alone(WIDE, config, lr=0.5, momentum=0.5)
    with torch.device("meta"):
        state = dgc.DGCState(alone.model.named_parameters(), alone.optimizer, config)
        alone.state = state
        for g in gradients:
            alone.train(g)
    for g in gradients:
        straight.train(g)
    assert_same(memory_of(state), memory_of(straight.state))
    assert state.memory.residual.device.type == "cpu"


# 6: gradients that are changed between backward() and step()


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def decay_data(model):
    for p in model.parameters():
        p.grad.data.add_(p.data, alpha=0.1)


def noise(model):
    for p in model.parameters():
        p.grad = p.grad + 0.01 * torch.randn_like(p.grad)


@pytest.mark.parametrize("change", [clip, decay_data, noise])
@pytest.mark.parametrize("bucket_view", [True, False])
def test_a_changed_gradient_is_noticed_once_and_the_line_named(gloo, change, bucket_view):
    model, optimizer, state = one(ddp={"gradient_as_bucket_view": bucket_view})
    with pytest.warns(UserWarning, match=r"got others for .*DGCConfig\(clip_norm=\.\.\.\).*weight_decay"):
        step(model, optimizer, normals(WIDE, 0), lambda: change(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, normals(WIDE, 1), lambda: change(model))
    assert state.step == 2


@pytest.mark.parametrize("late", [False, True])
def test_a_changed_gradient_is_an_error_on_request(gloo, late):
    model, optimizer, state = one(dataclasses.replace(CONFIG, on_changed_gradient="raise"))
    step(model, optimizer, normals(WIDE, 0))
    state._late = late  # as on a GPU
    before = [p.detach().clone() for p in model.parameters()]
    if late:
        step(model, optimizer, normals(WIDE, 1), lambda: clip(model))
        with pytest.raises(RuntimeError, match="clip_norm"):
            step(model, optimizer, normals(WIDE, 2))
    else:
        total = state.memory.residual_of("a") + 0.5 * state.memory.momentum_of("a") + normals(WIDE, 1)["a"]
        with pytest.raises(RuntimeError, match="clip_norm"):
            step(model, optimizer, normals(WIDE, 1), lambda: clip(model))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        torch.testing.assert_close(state.memory.residual_of("a"), total)  # what was sent is back
        step(model, optimizer, normals(WIDE, 2))


def test_what_changes_no_value_is_no_change(gloo):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, _ = one()
        for i in range(3):
            step(model, optimizer, normals(WIDE, i), lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e9))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        net = DistributedDataParallel(Given(WIDE))
        optimizer = dgc.SGD(net.parameters(), lr=0.1, momentum=0.5)
        dgc.DGCState(net.named_parameters(), optimizer, CONFIG, grad_scaler=scaler).register(net)
        for i in range(3):
            optimizer.zero_grad()
            scaler.scale(net(normals(WIDE, i))).backward()
            scaler.step(optimizer)
            scaler.update()
        ignoring, optimizer, _ = one(dataclasses.replace(CONFIG, on_changed_gradient="ignore"))
        step(ignoring, optimizer, normals(WIDE, 0), lambda: clip(ignoring))
    optimizer = dgc.SGD(net.parameters(), lr=0.1, momentum=0.5)
    net = DistributedDataParallel(net.module)
    dgc.DGCState(net.named_parameters(), optimizer, CONFIG, grad_scaler=scaler).register(net)
    scaler.scale(net(normals(WIDE, 5))).backward()
    scaler.unscale_(optimizer)
    clip(net)
    with pytest.warns(UserWarning, match="clip_norm"):  # unscaled and clipped is changed
        scaler.step(optimizer)


def test_a_step_that_is_left_out_is_not_compared(gloo):
    config = dataclasses.replace(CONFIG, on_nonfinite="skip", on_changed_gradient="raise")
    model, optimizer, state = one(config)
    bad = normals(WIDE, 1)
    bad["a"][0, 0] = float("nan")
    step(model, optimizer, normals(WIDE, 0))
    step(model, optimizer, bad, lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e9))  # to log the norm: NaN
    assert (state.step, state.stats.skipped) == (1, 1)


# 7: settings that are changed in a run


def test_assignments_that_would_do_nothing_are_refused(gloo):
    _, _, state = one()
    with pytest.raises(AttributeError, match=r"state\.set_density\(density\)"):
        state.config = dgc.DGCConfig(density=0.5)
    for name in ("schedule", "optimizer", "density", "exchange"):
        with pytest.raises(AttributeError):
            setattr(state, name, None)
    for name in ("final", "warmup_steps", "phases"):
        with pytest.raises(AttributeError):
            setattr(state.schedule, name, 1)


def density_in_a_run(rank, world_size, folder):
    run = Run(dgc.DGCConfig(density=0.008), momentum=0.0, lr=0.25)
    run.train(integers(SHAPES, seed_of(0, rank)))
    with pytest.raises(ValueError, match=r"density: rank 0 has 0\.5, rank 1 has 0\.25"):
        run.state.set_density(0.25 if rank else 0.5)
    with pytest.raises(ValueError, match=r"density: expected a number in \(0, 1\], got 7"):
        run.state.set_density(7)
    assert run.state.config.density == run.state.density == 0.008
    run.state.set_density(0.05)
    run.train(integers(SHAPES, seed_of(1, rank)))
    assert run.state.config.density == run.state.stats.density == 0.05
    assert abs(run.state.stats.sent_density - 0.05) < 1e-3
    dgc.checkpoint.save(run.state, f"{folder}/dgc")
    fresh = Run(dgc.DGCConfig(density=0.008), momentum=0.0, lr=0.25)
    dgc.checkpoint.load(fresh.state, f"{folder}/dgc")
    assert fresh.state.density == 0.05
    run.train(integers(SHAPES, seed_of(2, rank)))
    return run.result()


def test_density_changes_in_a_run_on_all_ranks_and_is_saved(tmp_path):
    results = run_ranks(2, density_in_a_run, str(tmp_path))
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        total = sum(integers(SHAPES, seed_of(i, r))[name] for i in range(3) for r in range(2))
        moved = start[name].detach() - results[0]["parameters"][name]
        assert torch.equal(8 * moved + sum(r["residual"][name] for r in results), total), name


# 8: the optimizer's groups


def test_groups_in_another_order_keep_their_momentum(gloo):
    def run(reverse):
        model = DistributedDataParallel(Given(WIDE))
        groups = [{"params": [p], "momentum": mu} for p, mu in zip(model.parameters(), (0.0, 0.5, 0.9), strict=True)]
        optimizer = dgc.SGD(groups, lr=0.1)
        state = dgc.DGCState(model.named_parameters(), optimizer, CONFIG)
        state.register(model)
        for i in range(4):
            if reverse and i == 2:
                optimizer.param_groups[:] = [dict(group) for group in reversed(optimizer.param_groups)]
            if i == 2:  # as a schedule does
                for group in optimizer.param_groups:
                    group["momentum"] *= 0.5
            step(model, optimizer, normals(WIDE, i))
        return memory_of(state)

    assert_same(run(True), run(False))


def test_a_parameter_in_no_group_is_named(gloo):
    model, optimizer, _ = one()
    step(model, optimizer, normals(WIDE, 0))
    optimizer.param_groups[0]["params"].pop(0)
    with pytest.raises(ValueError, match=r"optimizer: expected it to hold every parameter, but not a: "):
        step(model, optimizer, normals(WIDE, 1))


def test_a_schedule_that_brings_momentum_to_another_optimizer_is_refused(gloo):
    model, optimizer, _ = one(optimizer=torch.optim.SGD, lr=0.1)
    step(model, optimizer, normals(WIDE, 0))
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"expected dgc\.SGD, got SGD with momentum > 0"):
        step(model, optimizer, normals(WIDE, 1))


# 9: join


def uneven(rank, world_size, registered, optimizer):
    ddp = DistributedDataParallel(Given(SHAPES))
    optimizer = (
        dgc.SGD(ddp.parameters(), lr=0.1, momentum=0.5)
        if optimizer == "dgc"
        else (torch.optim.Adam(ddp.parameters(), lr=0.1))
    )
    state = dgc.DGCState(ddp.named_parameters(), optimizer, dgc.DGCConfig(density=0.008))
    if registered:
        state.register(ddp)
    else:
        ddp.register_comm_hook(state, dgc.dgc_hook)

    def epoch():
        with ddp.join():
            for i in range(2 + rank):
                step(ddp, optimizer, normals(SHAPES, seed_of(i, rank)))

    with pytest.raises(ValueError, match="state of dense parameters stays behind") as caught:
        epoch()
    return str(caught.value), state.step


@pytest.mark.filterwarnings("ignore:dgc. Adam is outside")
@pytest.mark.parametrize(("registered", "optimizer"), [(True, "dgc"), (False, "dgc"), (True, "adam")])
def test_join_with_momentum_is_refused_on_all_ranks_at_once(registered, optimizer):
    for message, steps in run_ranks(2, uneven, registered, optimizer):
        assert "join(throw_on_early_termination=True)" in message
        assert steps == 0


# 10: a run that is resumed without its residual


def test_an_optimizer_that_goes_on_without_its_state_is_warned_of_once(gloo):
    model, optimizer, state = one()
    for i in range(3):
        step(model, optimizer, normals(WIDE, i))
    saved, residual = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(state.state_dict())
    model, optimizer, state = one()
    optimizer.load_state_dict(saved)
    with pytest.warns(UserWarning, match=r"has taken 3 steps, and this DGCState none.*dgc\.checkpoint\.save"):
        step(model, optimizer, normals(WIDE, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, normals(WIDE, 4))
        model, optimizer, state = one()
        optimizer.load_state_dict(saved)
        state.load_state_dict(residual)
        step(model, optimizer, normals(WIDE, 3))
    assert state.step == 4


# 11: one file of all ranks


def one_file(rank, world_size, folder):
    run = Run(dgc.DGCConfig(density=0.008), lr=0.1, momentum=0.9)
    for i in range(3):
        run.train(normals(SHAPES, seed_of(i, rank)))
    full = run.state.full_state_dict()
    assert bool(full) == (rank == 0)
    if rank == 0:
        torch.save(full, f"{folder}/all.pt")
        numbers = sum(
            t.numel() for share in full["ranks"].values() for k in ("momentum", "residual") for t in share[k].values()
        )
        pickled = [pickle.dumps(t) for t in full["ranks"]["0"]["residual"].values()]
        assert sum(map(len, pickled)) < 1.1 * run.state.memory.residual.nbytes
        buffer = io.BytesIO()
        torch.save(full, buffer)
        assert len(buffer.getvalue()) < 4.2 * numbers
    dist.barrier()
    loaded = torch.load(f"{folder}/all.pt", weights_only=True)
    fresh = Run(dgc.DGCConfig(density=0.008), lr=0.1, momentum=0.9)
    fresh.state.load_state_dict(loaded)
    for i in (3, 4):
        fresh.net.load_state_dict(run.net.state_dict())
        run.train(normals(SHAPES, seed_of(i, rank)))
        fresh.train(normals(SHAPES, seed_of(i, rank)))
        assert torch.equal(run.state.memory.residual, fresh.state.memory.residual)
    return run.result()


def test_one_file_of_all_ranks_loads_on_any_number(tmp_path):
    run_ranks(3, one_file, str(tmp_path))
    loaded = torch.load(tmp_path / "all.pt", weights_only=True)
    alone = Alone(SHAPES, dgc.DGCConfig(density=0.008), lr=0.1, momentum=0.9)
    alone.state.load_state_dict(loaded)
    shares = [loaded["ranks"][str(rank)] for rank in range(3)]
    for name in LARGE:
        mean = sum(share["residual"][name] for share in shares) / 3
        torch.testing.assert_close(alone.state.memory.residual_of(name), mean)
    assert alone.state.step == 3
    with pytest.raises(ValueError, match="expected at least one, got none"):
        alone.state.load_state_dict({"version": 2, "ranks": {}})
    with pytest.raises(ValueError, match=r"\['ranks'\]\['1'\]: expected the share of that rank, got 0"):
        alone.state.load_state_dict({"version": 2, "ranks": {"1": shares[0]}})
    with pytest.raises(ValueError, match=r"\['ranks'\]: expected shares by rank, got 7"):
        alone.state.load_state_dict({"version": 2, "ranks": 7})


# 12, 13: passes that are not complete


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(100, 100), nn.Linear(100, 100)

    def forward(self, x):
        return self.used(x).square().mean()


@pytest.mark.parametrize("bucket_cap_mb", [25, 0.01])
def test_an_unused_parameter_is_named_with_the_remedy(gloo, bucket_cap_mb):
    model, optimizer, state = one(module=Branches(), ddp={"bucket_cap_mb": bucket_cap_mb})
    message = "got none of unused.weight, unused.bias.*find_unused_parameters=True"
    model(torch.randn(4, 100)).backward()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    state.discard(drop_gradient=False)
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):  # DDP's own, in the next forward pass
        model(torch.randn(4, 100)).backward()


def test_no_sync_around_backward_alone_gets_the_whole_line(gloo):
    model, _, _ = one()
    loss = model(normals(WIDE, 0))
    with model.no_sync():
        loss.backward()
    with pytest.raises(RuntimeError, match=r"with model\.no_sync\(\):  # the forward pass as well"):
        model(normals(WIDE, 1)).backward()


def test_a_state_that_is_registered_nowhere_says_so(gloo):
    model = DistributedDataParallel(Given(WIDE))
    optimizer = dgc.SGD(model.parameters(), lr=0.1, momentum=0.5)
    state = dgc.DGCState(model.named_parameters(), optimizer)
    model(normals(WIDE, 0)).backward()
    with pytest.raises(RuntimeError, match=r"state\.register\(model\)"):
        optimizer.step()
    assert "rank 0 of 1" in repr(state)


# 14: arguments as people write them


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, opt: dgc.DGCState(net, opt), r"named_parameters: .* got Given\. Pass model\.named_parameters\(\)"),
        (lambda net, opt: dgc.DGCState(net.parameters(), opt), "named_parameters: .* got parameters without names"),
        (lambda net, opt: dgc.DGCState(dict(net.named_parameters()), opt), "named_parameters: .* got a dict"),
        (lambda net, opt: dgc.DGCState(net.a, opt), "named_parameters: .* got Parameter"),
        (lambda net, opt: dgc.DGCState(["a", "b"], opt), "named_parameters: .* got str"),
        (lambda net, opt: dgc.DGCState(net.named_parameters(), dgc.DGCConfig()), "optimizer: .* got DGCConfig"),
        (lambda net, opt: dgc.DGCState(net.named_parameters(), None), "optimizer: .* got NoneType"),
        (lambda net, opt: dgc.DGCState(net.named_parameters(), opt, {"density": 0.1}), "config: .* got dict"),
        (lambda net, opt: dgc.DGCState(net.named_parameters(), opt, 0.1), "config: .* got float"),
        (lambda net, opt: dgc.DGCState(net.named_parameters(), opt).register(net), "register: .* got Given"),
        (lambda net, opt: dgc.dgc_hook(None, None), "dgc_hook: expected a DGCState, got NoneType"),
        (lambda net, opt: dgc.dgc_hook(dgc.DGCConfig(), None), "dgc_hook: expected a DGCState, got DGCConfig"),
        (lambda net, opt: dgc.dgc_hook(dgc.DGCState(net.named_parameters(), opt), (net.a, net.a)), "python_reducer"),
        (lambda net, opt: dgc.dgc_hook(dgc.DGCState(net.named_parameters(), opt), net.a), "FSDP"),
        (lambda net, opt: dgc.dgc_hook(dgc.DGCState(net.named_parameters(), opt), net.a, net.a), "FSDP"),
    ],
)
def test_arguments_as_people_write_them(call, message):
    net = Given(WIDE)
    with pytest.raises(TypeError, match=message):
        call(net, dgc.SGD(net.parameters(), lr=0.1))


def test_shards_and_parameters_without_memory_are_refused(gloo):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(200, 100), mesh))
    lazy = nn.LazyLinear(10)
    for p, kind, message in (
        (sharded, TypeError, "w: expected a plain tensor, got a DTensor"),
        (nn.Parameter(torch.zeros(3, 3, device="meta")), ValueError, "w: .* meta device"),
        (lazy.weight, ValueError, "w: .* lazy module"),
    ):
        with pytest.raises(kind, match=message):
            dgc.DGCState([("w", p)], dgc.SGD([p], lr=0.1))


# 15: the whole step compiled


def test_a_compiled_step_has_the_same_bits(gloo):
    def run(compiled):
        torch.manual_seed(0)
        model, optimizer, _ = one(module=Head(), lr=0.05, momentum=0.9)

        def train(x):
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()

        train = torch.compile(train, backend="aot_eager") if compiled else train
        for i in range(3):
            train(torch.full((4, 100), 0.1 * (i + 1)))
        return [p.detach() for p in model.parameters()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's, of graphs that break
        compiled = run(True)
    for p, q in zip(compiled, run(False), strict=True):
        assert torch.equal(p, q)


# 16: copies


def saved_whole(rank, world_size, folder):
    run = Run(dgc.DGCConfig(density=0.008), lr=0.1, momentum=0.9)
    for i in range(3):
        run.train(normals(SHAPES, seed_of(i, rank)))
    torch.save({"model": run.net, "optimizer": run.optimizer, "state": run.state}, f"{folder}/{rank}.pt")
    loaded = torch.load(f"{folder}/{rank}.pt", weights_only=False)
    other = Run.__new__(Run)
    other.net, other.optimizer, other.state = loaded["model"], loaded["optimizer"], loaded["state"]
    other.ddp = DistributedDataParallel(other.net, bucket_cap_mb=0.05)
    other.state.register(other.ddp)
    for i in range(3, 6):
        run.train(normals(SHAPES, seed_of(i, rank)))
        other.train(normals(SHAPES, seed_of(i, rank)))
    assert run.state.step == other.state.step == 6
    for name in LARGE:
        assert torch.equal(run.net.get_parameter(name), other.net.get_parameter(name))
        assert torch.equal(run.state.memory.residual_of(name), other.state.memory.residual_of(name))


def test_model_optimizer_and_state_pickle_together(tmp_path):
    run_ranks(2, saved_whole, str(tmp_path))


def test_a_copy_of_a_model_carries_no_second_memory(gloo):
    model, optimizer, state = one()
    step(model, optimizer, normals(WIDE, 0))
    torch.save(model, io.BytesIO())  # with the hook, as torch's own tests do
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    (_, its) = averaged.module._comm_hooks[0]
    assert its is not state
    assert vars(its) == {}
    with pytest.raises(RuntimeError, match=r"copy\.deepcopy\(state\.state_dict\(\)\)"):
        its.residual_norm  # noqa: B018
    with pytest.raises(RuntimeError, match=r"make a DGCState of its parameters"):
        dgc.dgc_hook(its, None)
    step(model, optimizer, normals(WIDE, 1))
    assert state.step == 2


# 18, 19: wrapped optimizers, names, several modules


class Accelerated(torch.optim.Optimizer):
    """Holds an optimizer as accelerate's does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class Imitation:
    """Imitates the class of what it holds, as Lightning's and Fabric's do."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("LightningSGD", (Imitation, type(optimizer)), {})

    param_groups = property(lambda self: self._optimizer.param_groups)
    state = property(lambda self: self._optimizer.state)

    def step(self, closure=None):
        return self._optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self._optimizer.zero_grad(set_to_none)


class Lookahead:
    """Is no Optimizer at all."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


class Trainer:
    """Holds optimizers in a list."""

    def __init__(self, optimizer):
        self.optims = [optimizer]
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


class Noam:
    """Holds it under a name of its own, as the schedulers of many tutorials do."""

    def __init__(self, optimizer):
        self.optim, self.warmup = optimizer, 100
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


def test_which_of_several_optimizers_is_meant_is_asked(gloo):
    model, optimizer, _ = one()
    several = Trainer(optimizer)
    several.optims.append(torch.optim.SGD(model.parameters(), lr=1))
    with pytest.raises(TypeError, match="got Trainer, which holds 2 optimizers"):
        dgc.DGCState(model.named_parameters(), several)


@pytest.mark.parametrize(
    "wrappers", [[Accelerated], [Imitation], [Lookahead], [Imitation, Accelerated], [Trainer], [Accelerated, Noam]]
)
def test_wrapped_optimizers_are_unwrapped(gloo, wrappers):
    def run(wrappers):
        model = DistributedDataParallel(Given(WIDE))
        inner = optimizer = dgc.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for wrap in wrappers:
            optimizer = wrap(optimizer)
        state = dgc.DGCState(model.named_parameters(), optimizer, CONFIG)
        state.register(model)
        assert state.optimizer is inner
        for i in range(3):
            step(model, optimizer, normals(WIDE, i))
        return [p.detach() for p in model.parameters()]

    for p, q in zip(run(wrappers), run([]), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["RMSprop", "Adagrad", "Adadelta", "Adafactor", "Rprop", "AdamW", "NAdam"])
def test_optimizers_outside_the_paper_are_named(kind):
    net = Given(WIDE)
    with pytest.warns(UserWarning, match=f"dgc: {kind} is outside the paper"):
        dgc.DGCState(net.named_parameters(), getattr(torch.optim, kind)(net.parameters()))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.module, self.weight = nn.Linear(100, 100), nn.Parameter(torch.zeros(100, 100))


def test_a_submodule_may_be_called_module(gloo):
    net = Inner()
    expected = {"weight", "module.weight", "module.bias"}
    for named in (net, DistributedDataParallel(net), torch.compile(net), DistributedDataParallel(torch.compile(net))):
        state = dgc.DGCState(named.named_parameters(), dgc.SGD(net.parameters(), lr=0.1))
        assert set(state.parameters.by_name) == expected


def test_one_hook_on_one_module(gloo):
    model, optimizer, state = one()
    state.register(model)  # again: it is there
    step(model, optimizer, normals(WIDE, 0))
    assert state.step == 1
    other = dgc.DGCState(model.named_parameters(), optimizer, CONFIG)
    with pytest.raises(ValueError, match="register: expected a DDP module without a hook, got one with dgc_hook"):
        other.register(model)


def test_several_modules_and_several_optimizers_are_told_what_to_do(gloo):
    nets = [DistributedDataParallel(Given(WIDE, seed=i)) for i in range(2)]
    both = [(f"{i}.{name}", p) for i, net in enumerate(nets) for name, p in net.named_parameters()]
    state = dgc.DGCState(both, dgc.SGD([p for _, p in both], lr=0.1))
    with pytest.raises(ValueError, match="One DGCState serves one DDP module"):
        state.register(nets[0])
    with pytest.raises(ValueError, match=r"3 are missing.* gets an optimizer of its own"):
        dgc.DGCState(nets[0].named_parameters(), dgc.SGD([p for _, p in both], lr=0.1))
    with pytest.raises(ValueError, match="in groups of one optimizer"):
        dgc.DGCState(nets[0].named_parameters(), dgc.SGD([nets[0].module.a], lr=0.1))
    with pytest.raises(ValueError, match=r"register: expected a DGCState made of all .* not of b, bias"):
        dgc.DGCState([("a", nets[0].module.a)], dgc.SGD([nets[0].module.a], lr=0.1)).register(nets[0])


# 20: memory of states that are dropped


@pytest.mark.parametrize("optimizer", [dgc.SGD, torch.optim.SGD])
def test_a_dropped_state_frees_its_memory_without_the_garbage_collector(gloo, optimizer):
    sgd = {"lr": 0.1, "momentum": 0.5} if optimizer is dgc.SGD else {"lr": 0.1}
    gc.collect()
    gc.disable()
    try:
        model, optimizer, state = one(optimizer=optimizer, **sgd)
        for i in range(2):
            step(model, optimizer, normals(WIDE, i))
        residual = weakref.ref(state.memory.residual)
        del model
        assert residual() is not None
        del state
        assert residual() is None
        del optimizer
    finally:
        gc.enable()


# 22: plain figures


def test_stats_are_plain_numbers(gloo):
    model, optimizer, state = one()
    step(model, optimizer, normals(WIDE, 0))
    figures = dataclasses.asdict(state.stats)
    assert len(pickle.dumps(figures)) < 2000
    assert state.residual_norm == pytest.approx(float(state.memory.residual.double().norm()))


def test_a_second_state_of_an_optimizer_is_noticed_and_a_dropped_one_is_not(gloo):
    model, optimizer, state = one()
    step(model, optimizer, normals(WIDE, 0))
    second = dgc.DGCState(model.named_parameters(), optimizer, CONFIG)
    with pytest.raises(RuntimeError, match="another DGCState, which was made later"):
        model(normals(WIDE, 1)).backward()
    del second
    model = DistributedDataParallel(model.module)
    state.register(model)
    step(model, optimizer, normals(WIDE, 2))
    assert state.step == 2


def test_loading_a_state_forgets_the_momentum_of_a_dense_run(gloo):
    """The optimizer's file is of a dense run, the state's of a later one with DGC: the later one counts."""
    model, optimizer, state = one()
    step(model, optimizer, normals(WIDE, 0))
    saved = copy.deepcopy(state.state_dict())
    dense = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    model.module.a.grad = normals(WIDE, 7)["a"]
    dense.step()
    optimizer.load_state_dict(dense.state_dict())
    state.load_state_dict(saved)
    assert torch.equal(state.state_dict()["ranks"]["0"]["momentum"]["a"], saved["ranks"]["0"]["momentum"]["a"])
