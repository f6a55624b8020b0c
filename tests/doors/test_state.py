"""DGCState as it is made: what it refuses, what it leaves out, and what it logs."""

import logging

import pytest
import torch
from torch import nn

import dgc
from support.alone import SHAPES, alone, own, reduce
from support.models import normals


def build(named=None, optimizer=None, config=None, **sgd):
    net = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 3))
    named = list(net.named_parameters()) if named is None else named(net)
    optimizer = dgc.SGD(net.parameters(), lr=0.1, **sgd) if optimizer is None else optimizer(net)
    return dgc.DGCState(named, optimizer, config)


def test_a_parameter_missing_from_named_parameters_is_refused():
    with pytest.raises(ValueError, match=r"named_parameters: .* 1 are missing, of shape \(3,\) in group 0"):
        build(named=lambda net: list(net.named_parameters())[:-1])


def test_a_parameter_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"got 'other' twice \(also as '0.weight'\)"):
        build(named=lambda net: [*net.named_parameters(), ("other", net[0].weight)])
    with pytest.raises(ValueError, match=r"got '0\.weight' twice"):
        build(named=lambda net: [("0.weight", net[0].weight), ("_orig_mod.0.weight", net[1].weight)])


def test_a_parameter_that_the_optimizer_does_not_hold_is_refused():
    with pytest.raises(ValueError, match=r"optimizer: expected it to hold every parameter, but not 1.weight, 1.bias"):
        build(optimizer=lambda net: dgc.SGD(net[0].parameters(), lr=0.1))


def test_momentum_left_in_another_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"optimizer: expected dgc.SGD, got torch.optim.SGD with momentum > 0"):
        build(optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_adam_is_refused_in_favour_of_ours(kind):
    with pytest.raises(ValueError, match=rf"optimizer: expected dgc\.{kind}, got torch\.optim\.{kind}, which takes"):
        build(optimizer=lambda net: getattr(torch.optim, kind)(net.parameters()))


def test_a_rule_may_come_from_either_of_our_adams():
    for kind in (dgc.Adam, dgc.AdamW):
        state = build(optimizer=lambda net, kind=kind: kind(net.parameters()))
        assert list(state.memory.kinds) == ["exp_avg", "exp_avg_sq"]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_unsupported_types_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match=f"0.weight: expected float32, bfloat16 or float16, got {dtype}"):
        build(named=lambda net: net.to(dtype).named_parameters())


def test_unknown_dense_parameters_are_refused():
    with pytest.raises(
        ValueError, match=r"dense_parameters: expected names of parameters, got 2.weight; there are 0.w"
    ):
        build(config=dgc.DGCConfig(dense_parameters=("2.weight",)))


def test_nesterov_must_be_the_same_in_all_groups():
    with pytest.raises(ValueError, match="nesterov: expected the same"):
        build(
            optimizer=lambda net: dgc.SGD(
                [{"params": net[0].parameters(), "nesterov": True}, {"params": net[1].parameters()}],
                lr=0.1,
                momentum=0.9,
            )
        )


def test_skip_needs_an_optimizer_that_can_leave_a_step_out():
    with pytest.raises(ValueError, match="on_nonfinite"):
        build(
            optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.1), config=dgc.DGCConfig(on_nonfinite="skip")
        )


def test_no_parameters_at_all_are_refused():
    with pytest.raises(ValueError, match="named_parameters: expected at least one"):
        build(named=lambda net: [])


def test_frozen_parameters_are_left_out():
    net = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 3))
    net[0].weight.requires_grad_(False)
    state = dgc.DGCState(net.named_parameters(), dgc.SGD(net.parameters(), lr=0.1))
    assert "0.weight" not in own(state)["residual"]


def test_wrappers_prefixes_are_taken_off_names():
    state = build(named=lambda net: [(f"module._orig_mod.{n}", p) for n, p in net.named_parameters()])
    assert list(own(state)["residual"]) == ["0.weight"]


def test_a_gradient_of_an_unknown_parameter_is_refused():
    one, other = alone(), alone()
    other.model(normals(SHAPES, 0)).backward()
    with pytest.raises(ValueError, match=r"got a gradient for another one, of shape \(300, 300\)"):
        reduce(one.state, other.model)


def test_the_start_is_logged_once_with_what_is_dense_and_why(caplog):
    one = alone()
    with caplog.at_level(logging.INFO, "dgc"):
        for step in range(3):
            one.train(normals(SHAPES, step))
    lines = [r.getMessage() for r in caplog.records if r.name == "dgc"]
    assert lines == [
        "dgc: step 0, density 1 %: 1 of 3 parameters compressed, 99.23 % of 90,700 elements, momentum not masked; "
        "dense: 1 (fewer than 16384 elements), 1 (fewer than two dimensions)"
    ]


def test_each_phase_is_logged_with_the_density_that_warm_up_leads_to(caplog):
    one = alone(warmup_steps=4, warmup_densities=(0.25, 0.05))
    with caplog.at_level(logging.INFO, "dgc"):
        for step in range(6):
            one.train(normals(SHAPES, step))
    lines = [r.getMessage() for r in caplog.records if r.name == "dgc"]
    assert [line.split(":")[1].strip() for line in lines] == [
        "step 0, density 25 %",
        "step 2, density 5 %",
        "step 4, density 1 %",
    ]
    assert [line.split("; ")[-1] for line in lines[:2]] == [
        "1 % after 4 more steps of warm-up",
        "1 % after 2 more steps of warm-up",
    ]


def test_a_state_that_compresses_nothing_warns(caplog):
    one = alone(dense_below=1_000_000)
    with caplog.at_level(logging.WARNING, "dgc"):
        one.train(normals(SHAPES, 0))
    assert "0 of 3 parameters compressed" in caplog.text
