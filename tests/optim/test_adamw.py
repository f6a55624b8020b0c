"""dgc.AdamW and dgc.Adam against torch's optimizers of these names."""

import math

import pytest
import torch

import dgc
from dgc.optim.adam import own_share
from support.alone import Alone
from support.models import Given, normals

SHAPES = {"weight": (64, 33), "bias": (17,), "scalar": ()}
MIXED = {"big": (300, 300), "small": (20, 20), "bias": (300,)}
EVERYTHING = dgc.DGCConfig(density=1.0)
TWINS = {dgc.AdamW: torch.optim.AdamW, dgc.Adam: torch.optim.Adam}


def pair(kind, config, shapes=SHAPES, groups=None, dtype=torch.float32, **settings):
    """Returns ours and torch's, on models of the same start; groups: settings by parameter."""
    one = Alone(shapes, config, optimizer=kind, dtype=dtype, **settings)
    model = Given(shapes, dtype=dtype)
    theirs = TWINS[kind](model.parameters(), **settings)
    if groups is not None:
        made = []
        for net, optimizer in ((one.model, kind), (model, TWINS[kind])):
            held = [{"params": [p], **g} for p, g in zip(net.parameters(), groups, strict=True)]
            made.append(optimizer(held, **settings))
        one.optimizer, theirs = made
        one.state = dgc.DGCState(one.model.named_parameters(), one.optimizer, config)
    return one, model, theirs


def torch_step(model, optimizer, gradients):
    optimizer.zero_grad()
    model(gradients).backward()
    optimizer.step()


def assert_torch_s_bits(kind, steps=60, change=lambda step, group: None, groups=None, **settings):
    one, model, theirs = pair(kind, EVERYTHING, groups=groups, **settings)
    for step in range(steps):
        for optimizer in (one.optimizer, theirs):
            for group in optimizer.param_groups:
                change(step, group)
        gradients = normals(SHAPES, step)
        one.train(gradients)
        torch_step(model, theirs, gradients)
    for name, p in model.named_parameters():
        assert torch.equal(one.parameter(name), p), name
        for moment, value in one.state.memory.of(name).items():
            assert torch.equal(value, theirs.state[p][moment]), (name, moment)
        assert float(one.optimizer.state[one.model.get_parameter(name)]["step"]) == steps


SETTINGS = [
    {},
    {"lr": 0.1, "weight_decay": 0.5},
    {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3},
    {"betas": (0.0, 0.9)},
    {"betas": (0.9, 0.0), "weight_decay": 0.0, "foreach": True},
    {"lr": 0, "fused": False, "foreach": False},
    {"betas": [0.9, 0.99]},
]


@pytest.mark.parametrize("adam", SETTINGS, ids=str)
def test_density_one_on_one_rank_is_torch_adamw_bit_for_bit(adam):
    assert_torch_s_bits(dgc.AdamW, **adam)


@pytest.mark.parametrize("adam", [{}, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3}], ids=str)
def test_density_one_on_one_rank_is_torch_adam_bit_for_bit(adam):
    assert_torch_s_bits(dgc.Adam, **adam)
    assert_torch_s_bits(dgc.Adam, weight_decay=0.1, decoupled_weight_decay=True, **adam)


def test_schedules_of_lr_and_betas_are_followed_bit_for_bit():
    def change(step, group):
        group["lr"] = 0.01 * (1 + math.cos(step))
        group["betas"] = (0.85 + 0.001 * step, 0.99 if step < 30 else 0.999)

    assert_torch_s_bits(dgc.AdamW, change=change)


def test_groups_have_settings_of_their_own_bit_for_bit():
    groups = [{"lr": 0.1, "weight_decay": 0.0}, {"betas": (0.5, 0.9)}, {"eps": 0.1, "lr": 0.3}]
    assert_torch_s_bits(dgc.AdamW, groups=groups)


def test_fused_and_foreach_are_hints():
    one = Alone(MIXED, dgc.DGCConfig(density=0.01), optimizer=dgc.AdamW, fused=True)
    other = Alone(MIXED, dgc.DGCConfig(density=0.01), optimizer=dgc.AdamW)
    for step in range(4):
        one.train(normals(MIXED, step))
        other.train(normals(MIXED, step))
    for name in MIXED:
        torch.testing.assert_close(one.parameter(name), other.parameter(name), rtol=0, atol=0)


def test_dense_parameters_of_a_compressed_run_have_torch_s_bits():
    one, model, theirs = pair(dgc.AdamW, dgc.DGCConfig(density=0.01), MIXED, lr=0.01, weight_decay=0.1)
    for step in range(20):
        one.train(normals(MIXED, step))
        torch_step(model, theirs, normals(MIXED, step))
    assert one.state.memory.compressed == ("big",)
    for name in ("small", "bias"):
        assert torch.equal(one.parameter(name), model.get_parameter(name)), name
    assert not torch.equal(one.parameter("big"), model.big)


def test_bfloat16_parameters_keep_float32_moments():
    config = dgc.DGCConfig(density=0.01)
    one = Alone(MIXED, config, dtype=torch.bfloat16, optimizer=dgc.AdamW, betas=(0.5, 0.75))
    m = {name: torch.zeros(shape) for name, shape in MIXED.items()}
    for step in range(3):
        gradients = {name: g.bfloat16() for name, g in normals(MIXED, step).items()}
        one.train(gradients)
        m = {name: 0.5 * m[name] + 0.5 * g.float() for name, g in gradients.items()}
    for name in MIXED:
        kept = one.state.memory.of(name)
        assert (one.parameter(name).dtype, kept["exp_avg"].dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(kept["exp_avg"], m[name])
        assert kept["exp_avg_sq"].dtype == torch.float32


def test_weight_decay_reaches_every_entry_of_a_compressed_parameter_at_every_step():
    one = Alone(MIXED, dgc.DGCConfig(density=0.001), optimizer=dgc.AdamW, lr=0.5, weight_decay=0.25)
    p = one.parameter("big").clone()
    for _ in range(5):
        one.train({name: torch.zeros(shape) for name, shape in MIXED.items()})
        p *= 1 - 0.5 * 0.25
    assert torch.equal(one.parameter("big"), p)


@pytest.mark.parametrize("workers", [1, 2, 4, 16, 1000])
@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_the_own_share_gives_the_second_moment_of_the_mean(workers, beta1):
    a, c = own_share(beta1, workers), (1 - beta1) / (1 + beta1)
    assert 0 <= a <= 1
    if 0 < a < 1:  # signal S = 0 and noise V = 1: wanted is V/N
        assert a + (1 - a) * c == pytest.approx(1 / workers)
    elif a == 0:
        assert c >= 1 / workers
    else:
        assert workers == 1 or beta1 == 0
