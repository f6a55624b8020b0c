"""state.forget(), state.mask() and state.dense_step(): weights that die and are born in the middle of a run."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import dgc
from support.ddp_run import Run
from support.models import integers, normals
from support.one_rank import WIDE, memory_of, one, step
from support.ranks import run_ranks
from support.training import SHAPES, assert_replicas_equal, seed_of

ALIVE = {"a": torch.arange(20000).reshape(200, 100) % 4 == 0}  # 5,000 entries


def test_what_waits_of_a_pruned_weight_moves_it_unless_it_is_forgotten(gloo):
    def moved(prunes):
        model, optimizer, state = one()
        for i in range(3):
            step(model, optimizer, normals(WIDE, i))
        prunes(state)
        dead = ~ALIVE["a"]
        model.module.a.data[dead] = 0
        for i in range(3, 8):
            step(model, optimizer, {n: g * ALIVE.get(n, 1) for n, g in normals(WIDE, i).items()})
        return int((model.module.a[dead] != 0).sum())

    assert moved(lambda state: None) > 100  # the fault that forget() is for
    assert moved(lambda state: state.forget("a", keep=ALIVE["a"])) == 0


def test_forget_drops_what_it_says_and_nothing_else(gloo, caplog):
    model, optimizer, state = one(lr=0.5, momentum=0.5, weight_decay=0.25)
    for i in range(3):
        step(model, optimizer, normals(WIDE, i))
    v, u = (state.memory.residual_of("a").clone(), state.memory.momentum_of("a").clone())
    b, decay = state.memory.residual_of("b").clone(), optimizer.state[model.module.a]["decay_momentum"].clone()
    caplog.set_level("INFO", "dgc")
    dropped = state.forget(model.module.a, keep=ALIVE["a"].float())
    alive = ALIVE["a"]
    assert torch.equal(state.memory.residual_of("a"), v * alive)
    assert torch.equal(state.memory.momentum_of("a"), u * alive)
    assert torch.equal(optimizer.state[model.module.a]["decay_momentum"], decay * alive)
    assert torch.equal(state.memory.residual_of("b"), b)
    assert dropped.norms["residual"] == pytest.approx(float((v * ~alive).norm()), rel=1e-6)
    assert dropped.norms["momentum"] == pytest.approx(float((u * ~alive).norm()), rel=1e-6)
    expected = int(((v != 0) | (u != 0) | (decay != 0))[~alive].sum())
    assert (dropped.entries, state.stats.forgotten) == (expected, expected)
    assert f"forgot {expected:,} entries" in caplog.text
    step(model, optimizer, normals(WIDE, 4))
    assert state.stats.forgotten == expected
    assert state.forget("a").entries > 0
    assert not state.memory.residual_of("a").any()


def test_adamw_keeps_the_moment_that_only_divides(gloo):
    model, optimizer, state = one(optimizer=dgc.AdamW, lr=0.01)
    for i in range(3):
        step(model, optimizer, normals(WIDE, i))
    second = state.memory.of("a")["exp_avg_sq"].clone()
    state.mask("a", ALIVE["a"])
    assert set(state.forget("a", keep=ALIVE["a"]).norms) == set()
    assert not state.memory.of("a")["exp_avg"][~ALIVE["a"]].any()
    assert torch.equal(state.memory.of("a")["exp_avg_sq"], second)
    for i in range(3, 6):
        step(model, optimizer, normals(WIDE, i))
        assert not state.memory.residual_of("a")[~ALIVE["a"]].any()
        assert not model.module.a.grad[~ALIVE["a"]].any()


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_dead_entries_are_never_sent_and_k_is_of_those_alive(gloo, clip_norm):
    config = dgc.DGCConfig(density=0.01, dense_below=1000, clip_norm=clip_norm)
    model, optimizer, state = one(config)
    state.mask("a", ALIVE["a"])
    dead = ~ALIVE["a"]
    for i in range(4):
        gradients = normals(WIDE, i)
        gradients["a"][dead] = torch.nan if i == 2 else 1e6
        step(model, optimizer, gradients)
        grad = model.module.a.grad
        assert not grad[dead].any()
        assert int((grad != 0).sum()) == 50  # 1 % of 5,000 and not of 20,000
        assert not state.memory.residual_of("a")[dead].any()
        assert not state.memory.momentum_of("a")[dead].any()
    assert state.stats.sent_density == pytest.approx((50 + 169) / (5000 + 16900))
    assert state.mask("a", None) is None
    step(model, optimizer, normals(WIDE, 9))
    assert int((model.module.a.grad != 0).sum()) == 200


def test_a_mask_without_the_living_and_another_memory_format(gloo):
    shapes = {"a": (8, 16, 9, 9), "b": (130, 130)}
    model, optimizer, state = one(shapes=shapes)
    alive = torch.arange(10368).reshape(8, 16, 9, 9) % 3 == 0
    state.mask("a", alive)
    step(model, optimizer, normals(shapes, 0))
    model.module.a.data = model.module.a.data.contiguous(memory_format=torch.channels_last)
    step(model, optimizer, normals(shapes, 1))
    assert not state.memory.residual_of("a")[~alive].any()
    assert state.memory.residual_of("a")[alive].any()
    state.mask("a", torch.zeros(8, 16, 9, 9))
    before = model.module.a.detach().clone()
    step(model, optimizer, normals(shapes, 2))
    assert torch.equal(model.module.a, before)


def test_a_dense_step_loses_nothing_and_shows_all_entries_until_step(gloo):
    model, optimizer, state = one()
    state.mask("a", ALIVE["a"])
    for i in range(3):
        step(model, optimizer, normals(WIDE, i))
    v, before = state.memory.residual.clone(), model.module.a.detach().clone()
    state.dense_step()
    seen = []
    step(model, optimizer, normals(WIDE, 3), between=lambda: seen.append(model.module.a.grad.clone()))
    assert torch.equal(seen[0], normals(WIDE, 3)["a"])  # also of the dead, for what grows by gradients
    assert torch.equal(state.memory.residual, v)
    dead = ~ALIVE["a"]
    assert torch.equal(model.module.a[dead], before[dead])
    assert not state.memory.momentum_of("a")[dead].any()
    assert not state.dense
    assert state.stats.sent_density == 0
    step(model, optimizer, normals(WIDE, 4))
    assert state.stats.sent_density > 0


def test_bad_masks_are_named_and_change_nothing(gloo):
    model, optimizer, state = one()
    step(model, optimizer, normals(WIDE, 0))
    before = memory_of(state)
    with pytest.raises(ValueError, match=r"mask of a: expected the parameter's shape \(200, 100\), got \(3,\)"):
        state.mask("a", torch.ones(3, dtype=bool))
    with pytest.raises(ValueError, match="mask of a: expected True and False"):
        state.forget("a", keep=torch.rand(200, 100))
    with pytest.raises(TypeError, match="mask of a: expected a tensor"):
        state.mask("a", [1, 0])
    with pytest.raises(ValueError, match="got 'c'"):
        state.forget("c")
    optimizer.zero_grad()
    model(normals(WIDE, 1)).backward()
    for call in (lambda: state.forget("a"), lambda: state.mask("a", ALIVE["a"]), state.dense_step):
        with pytest.raises(RuntimeError, match="between backward"):
            call()
    state.discard(drop_gradient=False)
    step(model, optimizer, normals(WIDE, 2))
    assert all(x is not None for x in before)
    assert state.stats.forgotten == 0


# Three ranks: conservation on integers, and masks that differ.


def on_three(rank, world_size):
    """SGD without momentum, lr 1: weights lost + residuals + what was forgotten = mean of all gradients, exactly."""
    run = Run(dgc.DGCConfig(density=1 / 64, dense_below=1000), lr=1.0, momentum=0.0)
    start = {n: p.detach().clone() for n, p in run.net.named_parameters()}
    given = {n: torch.zeros(shape) for n, shape in SHAPES.items()}
    forgotten = torch.zeros(SHAPES["a"])
    masks = {4: torch.arange(20000).reshape(200, 100) % 4 == 0, 8: torch.arange(20000).reshape(200, 100) % 4 < 2}
    masks |= {12: torch.arange(20000).reshape(200, 100) % 4 == 1, 16: None}
    alive = torch.ones(SHAPES["a"], dtype=bool)
    for i in range(20):
        if i in masks:  # prune, grow, another set, off
            before = run.state.memory.residual_of("a").clone()
            report = run.state.mask("a", masks[i])
            gone = before - run.state.memory.residual_of("a")
            assert (0 if report is None else report.entries) == int((gone != 0).sum())
            forgotten += gone
            alive = torch.ones_like(alive) if masks[i] is None else masks[i]
        if i == 10:
            run.state.dense_step()
        gradients = {n: 6 * g for n, g in integers(SHAPES, seed_of(i, rank)).items()}
        for n, g in gradients.items():
            given[n] += g * alive if n == "a" else g
        run.train(gradients)
    return {**run.result(), "start": start, "given": given, "forgotten": forgotten, "count": run.state.stats.forgotten}


def differing(rank, world_size):
    run = Run(dgc.DGCConfig(density=1 / 64, dense_below=1000))
    run.train(integers(SHAPES, rank))
    before = run.state.memory.residual.clone()
    errors = []
    for mask in ("place", "name", "none"):
        alive = torch.ones(SHAPES["a"], dtype=bool)
        alive[3, 5] = False
        name = "a"
        if rank == 1 and mask == "place":
            alive[150, 7] = alive[190, 0] = False
        if rank == 2 and mask == "name":
            name, alive = "c", torch.ones(SHAPES["c"])
        with pytest.raises(ValueError, match="expected the same on all ranks") as error:
            run.state.mask(name, None if mask == "none" and rank == 1 else alive)
        errors.append(str(error.value))
    assert torch.equal(run.state.memory.residual, before)
    assert not run.state._standing.masks
    run.train(integers(SHAPES, rank + 9))
    return {**run.result(), "errors": errors}


def both(rank, world_size):
    return on_three(rank, world_size), differing(rank, world_size)


def test_nothing_is_lost_but_what_was_asked_to_go_and_masks_that_differ_are_named():
    runs, refused = zip(*run_ranks(3, both), strict=True)
    assert_replicas_equal(runs)
    for name in SHAPES:
        given = sum(run["given"][name].double() for run in runs)
        waits = sum(run["residual"][name].double() for run in runs) if name in runs[0]["residual"] else 0
        gone = sum(run["forgotten"].double() for run in runs) if name == "a" else 0
        went = 3 * (runs[0]["start"][name].double() - runs[0]["parameters"][name].double())
        assert torch.equal(went + waits + gone, given), name
    assert all(run["count"] > 1000 for run in runs)
    assert_replicas_equal(refused)
    for one_rank in refused:
        place, name, none = one_rank["errors"]
        assert "another value at (150, 7): True, False, True on ranks 0 to 2 on rank 1" in place
        assert re.search("got one for c on rank 2", name)
        assert "got another mask on rank 1" in none


def test_a_pruned_model_gets_a_hint(gloo, caplog):
    caplog.set_level("INFO", "dgc")
    one(module=prune.l1_unstructured(nn.Linear(200, 100), "weight", 0.5))
    assert "dgc: weight_orig: if torch.nn.utils.prune" in caplog.text
    caplog.clear()
    one()
    assert "prune" not in caplog.text


def test_a_model_that_is_pruned_in_the_middle_of_a_run_gets_the_hint_once(gloo, caplog):
    caplog.set_level("INFO", "dgc")
    model, optimizer, _ = one(module=nn.Linear(200, 100))

    def train():
        optimizer.zero_grad()
        model(torch.ones(4, 200)).square().mean().backward()
        optimizer.step()

    train()
    prune.l1_unstructured(model.module, "weight", 0.5)
    assert "prune" not in caplog.text
    for _ in range(3):
        train()
    assert caplog.text.count("dgc: weight: if torch.nn.utils.prune") == 1
