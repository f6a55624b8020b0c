"""Public bug reports, number 1: gradients that are thrown away or zeroed.

The numbers are those of docs/reliability.md, "What users' loops do".
"""

import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.alone import Alone, gradients_of
from support.ddp_run import Run
from support.models import integers, normals
from support.one_rank import CONFIG, DROPPABLE, WIDE, assert_same, memory_of, one, step
from support.ranks import run_ranks
from support.training import SHAPES, assert_replicas_equal, seed_of

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
    alone.state.begin()
    alone.state.reduce(gradients_of(alone.state, [alone.model.a]))
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
    model, optimizer, state = one(config, late=late)
    step(model, optimizer, normals(WIDE, 0))
    before = memory_of(state)
    kept = state.memory.residual_of("a") + 0.5 * state.memory.momentum_of("a") + normals(WIDE, 1)["a"]

    def between():
        zero(model, optimizer)

    if droppable:
        step(model, optimizer, normals(WIDE, 1), between)
        start, end = state.memory.slots["a"].span
        assert torch.equal(state.memory.residual[start:end], before[0][start:end])
        assert torch.equal(state.memory.momentum[start:end], before[1][start:end])
        start, end = state.memory.slots["b"].span
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
    model, optimizer, state = one(config, late=late)
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
