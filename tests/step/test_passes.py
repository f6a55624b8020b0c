"""Passes of one rank: what is sent, counted, masked, discarded and allocated, and that nothing is lost on the way."""

import json
import logging
import math
import sys
from dataclasses import asdict
from functools import partial

import pytest
import torch

import dgc
from support.alone import SHAPES, Alone, alone, gradients_of, own, reduce
from support.models import Given, integers, normals


def test_stats_are_the_bytes_of_the_payload():
    one = alone()
    one.train(normals(SHAPES, 0))
    stats = one.state.stats
    # header 32, used 16, 900 + 89,999 / 64 upper bits, 900 times 6 low bits, 900 values, each at a multiple of 16 bytes
    payload = 32 + 16 + 304 + 688 + 3600
    dense = 4 * (400 + 300)
    assert stats.steps == 1
    assert stats.sent_density == 0.01
    assert stats.compression_ratio == pytest.approx(4 * 90_700 / (payload + dense), rel=1e-12)
    assert stats.bytes_sent == stats.bytes_received == stats.bytes_dense == 0  # one rank
    assert stats.dense == {"small": "fewer than 16384 elements", "bias": "fewer than two dimensions"}
    assert json.loads(json.dumps(asdict(stats))) == asdict(stats)  # nothing of the model hangs on them
    scalars = stats.scalars()
    assert scalars["sent_density"] == 0.01
    assert scalars["dense"] == 2
    assert scalars["entries"] == 900 == sum(stats.entries.values())
    assert scalars["compression_ratio"] == stats.compression_ratio
    assert scalars.keys() == asdict(stats).keys() - {"choice", "age"}  # which is no number, and which is not watched
    assert {type(value) for value in scalars.values()} == {float}
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


def test_the_steps_are_labelled_for_the_profiler():
    one = alone(clip_norm=1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one.train(normals(SHAPES, 0))
    labels = {event.key for event in profile.key_averages() if event.key.startswith("dgc.")}
    assert labels == {"dgc.clip", "dgc.accumulate_select_pack", "dgc.exchange", "dgc.unpack"}


def tensors_of(part):
    """Returns the tensors that an object holds, each memory once."""
    values = [v for value in vars(part).values() for v in (value.values() if isinstance(value, dict) else [value])]
    held = {t.data_ptr(): t for t in values if isinstance(t, torch.Tensor) and t.data_ptr()}
    return list(held.values())


@pytest.mark.parametrize("density", [0.001, 0.01])
def test_what_is_allocated_is_little_more_than_u_and_v(density):
    shapes = {f"w{i}": (500, 400) for i in range(20)}
    one = Alone(shapes, dgc.DGCConfig(density=density, warmup_steps=2, warmup_densities=(0.25,)), lr=0.1, momentum=0.9)
    held = []
    for step in range(4):
        one.train(normals(shapes, step))
        buckets = one.state._pass.buckets
        tensors = [one.state.memory.momentum, one.state.memory.residual]
        tensors += [t for b in buckets for part in (b, b.sparse, b.sparse.undo) for t in tensors_of(part)]
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
    half = gradients_of(one.state, [one.model.w])
    one.state.begin()
    one.state.reduce(half)  # x never comes
    with pytest.raises(RuntimeError, match="it broke off"):
        one.state.begin()
    one.state.discard(drop_gradient=False)
    assert torch.equal(one.state.memory.residual_of("w"), g["w"])
    with pytest.raises(RuntimeError, match="this pass has been discarded"):
        one.state.reduce(half)
    with pytest.raises(RuntimeError, match="this pass has been discarded"):
        one.state.end()
    one.train(g)
    assert one.state.step == 1


def test_dense_in_the_middle_of_a_pass_is_refused():
    one = alone()
    one.train(normals(SHAPES, 0))
    one.backward(normals(SHAPES, 1))
    with pytest.raises(RuntimeError, match=r"DGCState\.dense: expected to be called between optimizer\.step"):
        one.state.dense = True
    assert not one.state.dense
    one.optimizer.step()
    one.state.dense = True
    one.train(normals(SHAPES, 2))
    assert one.state.stats.sent_density == 0


def test_what_is_printed_says_where_the_run_stands():
    one = alone()
    one.train(normals(SHAPES, 0))
    assert repr(one.state) == "DGCState(1 of 3 parameters compressed, density 0.01, step 1, 0 bytes sent, rank 0 of 1)"
    one.state.dense = True
    assert "density 0.01, switched off, step 1" in repr(one.state)
    assert repr(one.state.config).startswith("DGCConfig(density=0.01, warmup_steps=0")
    assert repr(one.state.stats).startswith("Stats(steps=1, density=0.01, sent_density=0.01, bytes_sent=0")


def test_a_pass_goes_through_its_stages_and_through_no_others():
    one = alone()
    one.train(normals(SHAPES, 0))
    its_pass = one.state._pass
    exchange = one.state.exchange
    for step in (partial(its_pass.close, exchange, late=False), its_pass.claim, partial(its_pass.settle, exchange)):
        with pytest.raises(RuntimeError, match=r"Pass: expected .*, got OVER"):
            step()


def test_the_thread_that_completes_a_result_owns_nothing_of_the_run():
    """Else gloo's thread might be the last owner of the process group, which then ends the process."""
    one = alone()
    seen = []

    def look(_) -> None:
        frame = sys._getframe()
        while frame.f_code.co_name != "_receive":
            frame = frame.f_back
        seen.append(set(frame.f_locals))

    def future() -> torch.futures.Future:
        made = torch.futures.Future()
        made.add_done_callback(look)
        return made

    one.state.exchange.future = future
    one.train(normals(SHAPES, 0))
    assert len(seen) == 1
    assert seen[0] & {"bucket", "gradients", "context"} == set()


def test_the_warning_of_discard_names_the_user_s_line():
    one = alone()
    one.backward(normals(SHAPES, 0))
    with pytest.warns(UserWarning, match="it arrives with later steps") as caught:
        one.state.discard()
    assert caught[0].filename == __file__
