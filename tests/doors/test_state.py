"""DGCState on one rank: what it refuses, what it counts, and that nothing is lost on the way."""

import json
import logging
import math
from dataclasses import asdict

import pytest
import torch
from support.alone import Alone, reduce
from support.models import Given, integers, normals
from torch import nn

import dgc
from dgc.step.bucket import Gradients

SHAPES = {"big": (300, 300), "small": (20, 20), "bias": (300,)}


def alone(momentum: float = 0.5, lr: float = 0.5, **config) -> Alone:
    return Alone(SHAPES, dgc.DGCConfig(**{"density": 0.01, **config}), lr=lr, momentum=momentum)


def build(named=None, optimizer=None, config=None, **sgd):
    net = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 3))
    named = list(net.named_parameters()) if named is None else named(net)
    optimizer = dgc.SGD(net.parameters(), lr=0.1, **sgd) if optimizer is None else optimizer(net)
    return dgc.DGCState(named, optimizer, config)


def own(state: dgc.DGCState) -> dict:
    """Returns the share of the only rank."""
    return state.state_dict()["ranks"]["0"]


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
    with pytest.raises(ValueError, match=r"optimizer: expected dgc.SGD, got SGD with momentum > 0"):
        build(optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))


def test_adam_is_allowed_with_a_warning():
    with pytest.warns(UserWarning, match="Adam is outside the paper"):
        build(optimizer=lambda net: torch.optim.Adam(net.parameters()))


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


def test_stats_are_the_bytes_of_the_payload():
    one = alone()
    one.train(normals(SHAPES, 0))
    stats = one.state.stats
    # header 32, used 16, ends of two tiles 16, 900 indices, 900 values, sections at multiples of 16
    payload = 32 + 16 + 16 + 1808 + 3600
    dense = 4 * (400 + 300)
    assert stats.steps == 1
    assert stats.sent_density == 0.01
    assert stats.compression_ratio == pytest.approx(4 * 90_700 / (payload + dense), rel=1e-12)
    assert stats.bytes_sent == stats.bytes_received == stats.bytes_dense == 0  # one rank
    assert stats.dense == {"small": "fewer than 16384 elements", "bias": "fewer than two dimensions"}
    assert json.loads(json.dumps(asdict(stats))) == asdict(stats)  # nothing of the model hangs on them
    assert one.state.residual_norm == pytest.approx(float(one.state.memory.residual.double().norm()), rel=1e-12)
    assert one.state.residual_norm > 100


def test_conservation_over_a_run_is_exact():
    # Integer gradients, no momentum, lr a power of two: what left the model plus what waits is what came.
    one = alone(momentum=0.0, lr=0.25, dense_below=0)
    start = {name: one.parameter(name).clone() for name in SHAPES}
    total = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(50):
        gradients = integers(SHAPES, step)
        one.train(gradients)
        for name, g in gradients.items():
            total[name] += g
    for name in ("big", "small"):
        moved = start[name] - one.parameter(name)
        assert torch.equal(moved + 0.25 * one.state.memory.residual_of(name), 0.25 * total[name])
    assert one.state.residual_norm > 0


def test_masking_follows_the_configuration():
    for masking, masked_at in (("auto", [4, 5]), (True, range(6)), (False, [])):
        one = alone(density=0.005, warmup_steps=4, warmup_densities=(0.25, 0.01), momentum_masking=masking)
        for step in range(6):
            one.train(normals(SHAPES, step))
            zeros = int((one.state.memory.momentum_of("big") == 0).sum())
            assert (zeros > 0) == (step in masked_at), (masking, step)


def test_momentum_that_starts_late_is_masked_like_any_other():
    one = alone(momentum=0.0, momentum_masking=True)
    for step in range(4):
        one.optimizer.param_groups[0]["momentum"] = 0.5 if step >= 2 else 0.0
        one.train(normals(SHAPES, step))
        assert (one.state.memory.momentum is not None) == (step >= 2)
    assert int((one.state.memory.momentum_of("big") == 0).sum()) == 900


def test_warm_up_changes_how_much_is_sent():
    one = alone(warmup_steps=4, warmup_densities=(0.25, 0.05))
    sent = []
    for step in range(6):
        one.train(normals(SHAPES, step))
        sent.append(one.state.stats.sent_density)
    assert sent == [0.25, 0.25, 0.05, 0.05, 0.01, 0.01]


def test_a_second_backward_without_a_step_is_refused():
    one = alone()
    one.backward(normals(SHAPES, 0))
    with pytest.raises(RuntimeError, match=r"no_sync\(\)"):
        one.backward(normals(SHAPES, 1))


def test_discard_gives_back_what_was_sent():
    kept, dropped = alone(), alone()
    for step in range(3):
        kept.train(normals(SHAPES, step))
        dropped.train(normals(SHAPES, step))
    dropped.backward(normals(SHAPES, 3))
    before = {name: dropped.parameter(name).clone() for name in SHAPES}
    dropped.state.discard(drop_gradient=False)
    dropped.optimizer.zero_grad()
    m, k = dropped.state.memory, kept.state.memory
    u = 0.5 * k.momentum_of("big") + normals(SHAPES, 3)["big"]
    assert torch.equal(m.momentum_of("big"), u)
    assert torch.equal(m.residual_of("big"), k.residual_of("big") + u)
    assert torch.equal(m.momentum_of("small"), k.momentum_of("small"))  # dense: the step is dropped
    assert all(torch.equal(dropped.parameter(name), before[name]) for name in SHAPES)
    assert dropped.state.step == 3
    assert dropped.state.stats.skipped == 1
    dropped.train(normals(SHAPES, 4))  # and it goes on


@pytest.mark.parametrize("name", list(SHAPES))
def test_non_finite_gradients_raise_and_nothing_is_lost(name):
    one = alone()
    one.train(normals(SHAPES, 0))
    v, u = one.state.memory.residual_of("big").clone(), one.state.memory.momentum_of("big").clone()
    before = {n: one.parameter(n).clone() for n in SHAPES}
    gradients = normals(SHAPES, 1)
    gradients[name].view(-1)[5] = math.inf
    one.backward(gradients)
    with pytest.raises(FloatingPointError, match="rank 0" if name == "big" else "the average of dense parameters"):
        one.optimizer.step()
    assert all(torch.equal(one.parameter(n), before[n]) for n in SHAPES)
    assert one.state.memory.momentum.isfinite().all()
    new_u = 0.5 * u + gradients["big"]
    finite = new_u.isfinite()
    assert torch.equal(one.state.memory.residual_of("big"), torch.where(finite, v + new_u, v))
    assert torch.equal(one.state.memory.momentum_of("big"), torch.where(finite, new_u, u))


def test_non_finite_steps_are_left_out_on_request(caplog):
    one = alone(on_nonfinite="skip", warmup_steps=2, warmup_densities=(0.25,))
    gradients = normals(SHAPES, 0)
    gradients["big"][3, 4] = math.nan
    before = one.parameter("big").clone()
    with caplog.at_level(logging.WARNING, "dgc"):
        one.train(gradients)
    assert torch.equal(one.parameter("big"), before)
    assert "dgc: step 0 left out on all ranks, gradients not finite: big on rank 0" in caplog.text
    assert (one.state.step, one.state.stats.skipped) == (0, 1)
    one.train(normals(SHAPES, 1))
    assert not torch.equal(one.parameter("big"), before)
    assert (one.state.step, one.state.stats.skipped) == (1, 1)


def test_a_parameter_without_gradient_gets_back_what_was_sent_for_it():
    one = alone(dense_below=0)
    one.train(normals(SHAPES, 0))
    v, u = one.state.memory.residual_of("big").clone(), one.state.memory.momentum_of("big").clone()
    gradients = normals(SHAPES, 1)
    gradients["big"].zero_()
    one.backward(gradients)
    assert one.model.get_parameter("big").grad.abs().max() == 0
    assert torch.equal(one.state.memory.momentum_of("big"), 0.5 * u)
    assert torch.equal(one.state.memory.residual_of("big"), v + 0.5 * u)
    one.state.discard(drop_gradient=False)  # must not give it back a second time
    assert torch.equal(one.state.memory.residual_of("big"), v + 0.5 * u)


def test_switching_to_dense_leaves_the_residual_alone_and_back_goes_on():
    one = alone()
    for step in range(4):
        one.train(normals(SHAPES, step))
    v, u = one.state.memory.residual_of("big").clone(), one.state.memory.momentum_of("big").clone()
    before = one.parameter("big").clone()
    one.state.dense = True
    one.train(normals(SHAPES, 4))
    u = 0.5 * u + normals(SHAPES, 4)["big"]
    assert torch.equal(one.parameter("big"), before - 0.5 * u)
    assert torch.equal(one.state.memory.residual_of("big"), v)
    assert one.state.stats.dense["big"] == "state.dense is set"
    one.state.dense = False
    one.train(normals(SHAPES, 5))
    u = 0.5 * u + normals(SHAPES, 5)["big"]
    sent = one.state.memory.residual_of("big") != v + u
    assert int(sent.sum()) == 900


def test_plain_optimizers_get_plain_accumulation():
    model = Given(SHAPES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(density=0.01))
    start = model.big.detach().clone()
    total = torch.zeros(300, 300)
    for step in range(5):
        optimizer.zero_grad()
        model(integers(SHAPES, step)).backward()
        reduce(state, model)
        optimizer.step()
        total += integers(SHAPES, step)["big"]
    assert state.memory.momentum is None
    assert torch.equal(start - model.big.detach() + 0.5 * state.memory.residual_of("big"), 0.5 * total)
    model(integers(SHAPES, 9)).backward()
    with pytest.raises(RuntimeError, match="expected a backward pass since the last step"):
        optimizer.step()


def test_a_state_dict_in_the_middle_of_a_step_is_refused():
    one = alone()
    one.backward(normals(SHAPES, 0))
    with pytest.raises(RuntimeError, match=r"between optimizer\.step"):
        one.state.state_dict()
    one.optimizer.step()
    assert own(one.state)["step"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("step"), "step is missing"),
        (lambda s: s.update(version=99), r"state_dict\['version'\]: expected 1 or 2, got 99"),
        (lambda s: s.update(version="1"), r"state_dict\['version'\]: expected 1 or 2, got '1'"),
        (lambda s: s.update(rank=1), r"state_dict\['rank'\]: expected a rank of 1, got 1"),
        (lambda s: s.update(rank=1, world_size=4), r"residual of rank 0, 2, 3 of 4, .* got that of rank 1"),
        (lambda s: s.update(world_size=True), r"\['world_size'\]: expected a number of ranks up to .*, got True"),
        (lambda s: s.update(world_size=2**31 - 1), r"\['world_size'\]: expected .* up to 1048576, got 2147483647"),
        (lambda s: s.update(world_size=2**20), r"residual of rank 1, 2, 3, .*, 20 and 1048555 more of 1048576"),
        (lambda s: s.update(step=-1), r"state_dict\['step'\]: expected a number of steps, got -1"),
        (lambda s: s.update(step=torch.ones(1)), r"state_dict\['step'\]: expected a number of steps, got tensor"),
        (lambda s: s.update(dense=1), r"state_dict\['dense'\]: expected True or False, got 1"),
        (lambda s: s.update(diverged={}), r"state_dict\['diverged'\]: expected a list of parameter names, got {}"),
        (lambda s: s.update(diverged=[1]), r"state_dict\['diverged'\]: expected a list of parameter names"),
        (lambda s: s.update(momentum=None), r"state_dict\['momentum'\]: expected tensors by parameter name, got None"),
        (lambda s: s["residual"].pop("big"), "residual of big is missing"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change, message):
    one = alone()
    one.train(normals(SHAPES, 0))
    v = one.state.memory.residual.clone()
    state = {"version": 1, **own(one.state)}  # as dgc 0.1 wrote it
    change(state)
    with pytest.raises(ValueError, match=message):
        one.state.load_state_dict(state)
    assert torch.equal(one.state.memory.residual, v)
    assert one.state.step == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states: [], "expected at least one, got none"),
        (lambda states: [states[0]] * 2, "expected one of each rank, got those of rank 0, 0"),
        (lambda states: states[1:], "rank 0 of 1 takes over the residual of rank 0 of 2, .* got that of rank 1"),
        (lambda states: [states[0], {**states[1], "step": 5}], "state_dict 1 was rank 1 of 2 at step 5"),
        (lambda states: [states[0], {**states[1], "world_size": 3}], "state_dict 1 was rank 1 of 3 at step 1"),
        (lambda states: [states[0], {**states[1], "momentum": {}}], "of one group at one step"),
        (lambda states: [states[0], 7], "expected that of a DGCState, got int"),
    ],
)
def test_state_dicts_that_do_not_fit_each_other_change_nothing(change, message):
    one = alone()
    one.train(normals(SHAPES, 0))
    v = one.state.memory.residual.clone()
    states = [{"version": 1, **own(one.state), "rank": rank, "world_size": 2} for rank in range(2)]
    with pytest.raises(ValueError, match=message):
        one.state.load_state_dict(change(states))
    assert torch.equal(one.state.memory.residual, v)
    one.state.load_state_dict(states)
    assert torch.equal(one.state.memory.residual, v)  # the mean of two equal ones


def test_resume_on_one_rank_in_the_middle_of_warm_up_is_bit_exact(tmp_path):
    def fresh() -> Alone:
        config = dgc.DGCConfig(density=0.01, warmup_steps=8, warmup_densities=(0.25, 0.05))
        return Alone(SHAPES, config, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)

    straight = fresh()
    for step in range(12):
        straight.train(normals(SHAPES, step))
        if step == 4:
            parts = {"model": straight.model, "optimizer": straight.optimizer, "dgc": straight.state}
            torch.save({key: part.state_dict() for key, part in parts.items()}, tmp_path / "at5.pt")
    resumed = fresh()
    saved = torch.load(tmp_path / "at5.pt", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.state.load_state_dict(saved["dgc"])
    for step in range(5, 12):
        resumed.train(normals(SHAPES, step))
    for name in SHAPES:
        assert torch.equal(resumed.parameter(name), straight.parameter(name))
    assert torch.equal(resumed.state.memory.residual, straight.state.memory.residual)
    assert torch.equal(resumed.state.memory.momentum, straight.state.memory.momentum)


def test_the_steps_are_labelled_for_the_profiler():
    one = alone(clip_norm=1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one.train(normals(SHAPES, 0))
    labels = {event.key for event in profile.key_averages() if event.key.startswith("dgc.")}
    assert labels == {"dgc.clip", "dgc.accumulate_select_pack", "dgc.exchange", "dgc.unpack"}


@pytest.mark.parametrize("density", [0.001, 0.01])
def test_what_is_allocated_is_little_more_than_u_and_v(density):
    shapes = {f"w{i}": (500, 400) for i in range(20)}
    one = Alone(shapes, dgc.DGCConfig(density=density, warmup_steps=2, warmup_densities=(0.25,)), lr=0.1, momentum=0.9)
    held = []
    for step in range(4):
        one.train(normals(shapes, step))
        buckets = one.state._pass.buckets
        tensors = [one.state.memory.momentum, one.state.memory.residual]
        tensors += [t for b in buckets for t in vars(b).values() if isinstance(t, torch.Tensor)]
        held.append(sum(t.nbytes for t in tensors) / (20 * 200_000))
    assert 8 <= held[-1] <= 8.8
    assert held[0] > held[-1]  # warm-up needs more, and gives it back


def test_discard_after_a_step_does_nothing():
    one = alone()
    one.train(normals(SHAPES, 0))
    v, u = one.state.memory.residual.clone(), one.state.memory.momentum.clone()
    one.state.discard(drop_gradient=False)
    assert torch.equal(one.state.memory.residual, v)
    assert torch.equal(one.state.memory.momentum, u)
    assert one.state.step == 1


def test_loading_its_own_state_dict_changes_nothing():
    one = alone()
    one.train(normals(SHAPES, 0))
    v, u = one.state.memory.residual.clone(), one.state.memory.momentum.clone()
    one.state.load_state_dict(one.state.state_dict())
    assert torch.equal(one.state.memory.residual, v)
    assert torch.equal(one.state.memory.momentum, u)


def test_a_shadow_pass_with_non_finite_gradients_is_undone():
    # What step() does on the other ranks, on one that has left DDP's join.
    one = alone()
    one.train(normals(SHAPES, 0))
    v, u = one.state.memory.residual_of("big").clone(), one.state.memory.momentum_of("big").clone()
    gradients = normals(SHAPES, 1)
    gradients["bias"][3] = math.nan
    one.optimizer.zero_grad()
    one.model(gradients).backward()
    reduce(one.state, one.model, shadow=True)
    assert own(one.state)["step"] == 1
    assert one.state.stats.skipped == 1
    u = 0.5 * u + gradients["big"]
    assert torch.equal(one.state.memory.momentum_of("big"), u)
    assert torch.equal(one.state.memory.residual_of("big"), v + u)


def test_without_momentum_a_dense_step_averages_none():
    one = alone(momentum=0.0)
    one.train(normals(SHAPES, 0))
    one.state.dense = True
    one.train(normals(SHAPES, 1))
    assert one.state.memory.momentum is None
    assert one.state.stats.bytes_dense == 0
    assert one.state.stats.compression_ratio == 1.0


def test_a_float16_average_that_overflows_is_not_applied():
    one = Alone(SHAPES, dgc.DGCConfig(density=0.01), dtype=torch.float16, lr=0.1, momentum=0.9)
    gradients = {name: torch.full(shape, 3e4 if name == "big" else 0.0).half() for name, shape in SHAPES.items()}
    for _ in range(5):
        one.backward(gradients)
        before = one.parameter("big").clone()
        if not one.model.get_parameter("big").grad.isfinite().all():
            break
        one.optimizer.step()
    with pytest.raises(FloatingPointError, match="which overflows"):
        one.optimizer.step()
    assert torch.equal(one.parameter("big"), before)
    assert before.isfinite().all()


def test_a_closure_of_another_optimizer_is_checked_after_its_backward_pass():
    # Lightning always hands one over.
    model = Given(SHAPES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(density=0.01))
    before = model.bias.detach().clone()

    def closure(reduced=True):
        optimizer.zero_grad()
        model(integers(SHAPES, 3)).backward()
        if reduced:
            reduce(state, model)
        return 1.25

    assert optimizer.step(closure) == 1.25
    assert torch.equal(model.bias.detach(), before - 0.5 * integers(SHAPES, 3)["bias"])
    assert optimizer.step(closure=closure) == 1.25
    assert state.step == 2
    with pytest.raises(RuntimeError, match="expected a backward pass since the last step"):
        optimizer.step(lambda: closure(reduced=False))


def test_after_a_backward_pass_that_broke_off_only_discard_goes_on():
    one = Alone({"w": (200, 100), "x": (200, 100)}, dgc.DGCConfig(density=0.01), lr=0.5)
    g = normals({"w": (200, 100), "x": (200, 100)}, 0)
    one.model(g).backward()
    half = Gradients([one.model.w], [one.model.w.grad.view(-1)], [(0, 0)])
    one.state.reduce(half, first=True, last=False)  # x never comes
    with pytest.raises(RuntimeError, match="it broke off"):
        one.state.reduce(half, first=True, last=False)
    one.state.discard(drop_gradient=False)
    assert torch.equal(one.state.memory.residual_of("w"), g["w"])
    with pytest.raises(RuntimeError, match="this pass has been discarded"):
        one.state.reduce(half, first=False, last=True)
    one.train(g)
    assert one.state.step == 1
