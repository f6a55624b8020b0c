"""Steps of dgc.AdamW that are left out, dropped or empty: what they leave in the moments, and what they count."""

import math

import pytest
import torch

import dgc
from support.alone import Alone, reduce
from support.models import normals

MIXED = {"big": (300, 300), "small": (20, 20), "bias": (300,)}


def test_a_step_on_zero_gradients_makes_the_state_that_other_steps_make():
    # hvd.broadcast_optimizer_state() needs the same on all ranks, whether they have taken a step or not.
    used = Alone(MIXED, dgc.DGCConfig(density=0.01), optimizer=dgc.AdamW)
    used.train(normals(MIXED, 0))
    fresh = Alone(MIXED, dgc.DGCConfig(density=0.01), optimizer=dgc.AdamW)
    before = [p.detach().clone() for p in fresh.model.parameters()]
    for p in fresh.model.parameters():
        p.grad = torch.zeros_like(p)
    fresh.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(fresh.model.parameters(), before, strict=True))
    ours, theirs = used.optimizer.state_dict()["state"], fresh.optimizer.state_dict()["state"]
    assert {i: {name: x.shape for name, x in s.items()} for i, s in ours.items()} == {
        i: {name: x.shape for name, x in s.items()} for i, s in theirs.items()
    }
    assert [(ours[i]["step"].item(), theirs[i]["step"].item()) for i in range(3)] == [(1, 0)] * 3


def steps_of(one):
    return {name: int(one.optimizer.state[p]["step"]) for name, p in one.model.named_parameters()}


def state_of(one):
    """Returns all that a step changes, copied."""
    memory = one.state.memory
    tensors = {name: one.parameter(name).clone() for name in MIXED}
    return {**tensors, "v": memory.residual.clone(), **{kind: flat.clone() for kind, flat in memory.kinds.items()}}


def assert_same(one, other):
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def adamw(late=None, **config):
    config = dgc.DGCConfig(**{"density": 0.01, **config})
    return Alone(MIXED, config, optimizer=dgc.AdamW, late=late, lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("where", ["big", "bias"])
@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
def test_a_left_out_step_counts_where_its_gradient_is_in_the_moments(where, late):
    one = adamw(late, on_nonfinite="skip")
    one.train(normals(MIXED, 0))
    before = state_of(one)
    gradients = normals(MIXED, 1)
    gradients[where].view(-1)[3] = math.nan
    one.train(gradients)
    one.state.state_dict()  # reads a late verdict
    after = state_of(one)
    assert one.state.stats.skipped == 1
    # On a device that leaves the step out by itself the host does not know in time, and counts dense ones too.
    assert steps_of(one) == {"big": 2, "small": 1 + late, "bias": 1 + late}
    slots = one.state.memory.slots
    for name in MIXED:
        assert torch.equal(after[name], before[name]), name
        for kind in ("exp_avg", "exp_avg_sq"):
            now, then = (slots[name].view(state[kind]) for state in (after, before))
            if name != "big":
                assert torch.equal(now, then), (name, kind)
    # The moments of a compressed parameter, and what waits, are those of its finite entries.
    finite = gradients["big"].isfinite()
    m, s, v = (slots["big"].view(before[kind]) for kind in ("exp_avg", "exp_avg_sq", "v"))
    h = gradients["big"]
    new_m, new_s = 0.9 * m + 0.1 * h, 0.999 * s + 0.001 * h * h
    direction = 0.01 * h / ((new_s / (1 - 0.999**2)).sqrt() + 1e-8)
    expected = {"exp_avg": (new_m, m), "exp_avg_sq": (new_s, s), "v": (v + direction, v)}
    for kind, (new, old) in expected.items():
        now = slots["big"].view(after[kind])
        torch.testing.assert_close(now, torch.where(finite, new, old))
        assert torch.equal(now[~finite], old[~finite])
    one.train(normals(MIXED, 2))  # and it goes on
    assert steps_of(one)["big"] == 3


def test_late_or_at_once_has_the_same_bits_but_for_the_count_of_dense_parameters():
    late, at_once = (adamw(late, on_nonfinite="skip") for late in (True, False))
    for step in range(8):
        gradients = normals(MIXED, step)
        if step in (2, 5):
            gradients["big"][0, step] = math.inf
        for one in (late, at_once):
            one.train(gradients)
            if step in (2, 5):
                one.state.state_dict()
                for name in ("small", "bias"):  # as if the host had known
                    one.optimizer.state[one.model.get_parameter(name)]["step"].fill_(steps_of(at_once)[name])
    assert_same(state_of(late), state_of(at_once))


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
def test_a_discarded_step_counts_unless_its_gradient_is_dropped(late):
    one = adamw(late, droppable=True)
    for step in range(2):
        one.train(normals(MIXED, step))
    before = state_of(one)
    one.backward(normals(MIXED, 2))
    assert steps_of(one) == {"big": 3, "small": 2, "bias": 2}
    one.state.discard(drop_gradient=True)
    assert steps_of(one) == {"big": 2, "small": 2, "bias": 2}
    assert_same(state_of(one), before)

    one.backward(normals(MIXED, 3))
    one.state.discard(drop_gradient=False)
    assert steps_of(one) == {"big": 3, "small": 2, "bias": 2}
    after = state_of(one)
    assert not torch.equal(after["exp_avg"], before["exp_avg"])
    assert torch.equal(after["big"], before["big"])
    assert one.state.step == 2


@pytest.mark.parametrize("how", ["none", "zero"])
@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
def test_a_gradient_that_is_thrown_away_is_in_no_moment_and_does_not_count(how, late):
    one, other = (adamw(late, droppable=True, clip_norm=1e9) for _ in range(2))
    for run in (one, other):
        run.train(normals(MIXED, 0))
    before = state_of(one)
    one.backward(normals(MIXED, 1))
    big = one.model.big
    if how == "none":
        big.grad = None
    else:
        big.grad.zero_()
    one.optimizer.step()
    one.state.state_dict()
    assert steps_of(one) == {"big": 1, "small": 2, "bias": 2}
    slot, after = one.state.memory.slots["big"], state_of(one)
    for kind in ("v", "exp_avg", "exp_avg_sq"):
        assert torch.equal(slot.view(after[kind]), slot.view(before[kind])), kind


def test_an_unused_parameter_gets_back_what_it_sent_and_ages():
    one = adamw()
    for step in range(3):
        one.train(normals(MIXED, step))
    slot, before = one.state.memory.slots["big"], state_of(one)
    one.train({**normals(MIXED, 3), "big": torch.zeros(MIXED["big"])})
    after = state_of(one)
    m, s, v = (slot.view(before[kind]) for kind in ("exp_avg", "exp_avg_sq", "v"))
    torch.testing.assert_close(slot.view(after["exp_avg"]), 0.9 * m)
    torch.testing.assert_close(slot.view(after["exp_avg_sq"]), 0.999 * s)
    assert torch.equal(slot.view(after["v"]), v)  # without a gradient there is no direction
    assert torch.equal(after["big"], before["big"] * (1 - 0.01 * 0.1))
    assert steps_of(one) == {"big": 4, "small": 4, "bias": 4}


def test_a_reduction_without_gradients_in_between_is_noticed():
    one = adamw()
    one.train(normals(MIXED, 0))
    one.optimizer.zero_grad()
    one.model(normals(MIXED, 1)).backward()  # reduced by nobody
    with pytest.raises(RuntimeError, match="expected a backward pass since the last step"):
        one.optimizer.step()
    reduce(one.state, one.model)
    one.optimizer.step()
    assert steps_of(one) == {"big": 2, "small": 2, "bias": 2}
