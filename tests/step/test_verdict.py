"""Verdicts that come one step late, as on a GPU: the same code runs on the CPU, made to wait as long."""

import logging
import math
import threading
import time

import pytest
import torch

import dgc
from dgc.ops import wire
from support.alone import Alone, gradients_of
from support.models import normals

SHAPES = {"big": (300, 300), "other": (200, 200), "small": (20, 20), "bias": (300,), "scalar": ()}
SGD = [
    {"lr": 0.5},
    {"lr": 0.5, "weight_decay": 0.1},
    {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.1},
    {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.1, "nesterov": True},
]


def run(late: bool, sgd: dict, dtype: torch.dtype = torch.float32, steps: int = 12) -> Alone:
    """Trains with a NaN in the compressed, then in a dense parameter, now and then."""
    one = Alone(SHAPES, dgc.DGCConfig(density=0.01, on_nonfinite="skip"), dtype=dtype, late=late, **sgd)
    for step in range(steps):
        gradients = {name: g.to(dtype) for name, g in normals(SHAPES, step).items()}
        if step in (0, 4, 5):
            gradients["big"].view(-1)[step] = math.nan
        if step == 8:
            gradients["bias"][3] = math.inf
        one.train(gradients)
    one.state.state_dict()  # reads the last verdict
    return one


@pytest.mark.parametrize("sgd", SGD, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_late_or_at_once_gives_the_same_bits(sgd, dtype):
    late, at_once = run(True, sgd, dtype), run(False, sgd, dtype)
    for name in SHAPES:
        assert torch.equal(late.parameter(name), at_once.parameter(name)), name
    assert torch.equal(late.state.memory.residual, at_once.state.memory.residual)
    if "momentum" in sgd:
        assert torch.equal(late.state.memory.momentum, at_once.state.memory.momentum)
    assert (late.state.step, late.state.stats.skipped) == (at_once.state.step, at_once.state.stats.skipped) == (8, 4)


def test_the_next_step_raises_and_nothing_was_applied():
    one = Alone(SHAPES, dgc.DGCConfig(density=0.01), lr=0.5, momentum=0.5, weight_decay=0.1, late=True)
    one.train(normals(SHAPES, 0))
    before = {name: one.parameter(name).clone() for name in SHAPES}
    v = one.state.memory.residual_of("other") + 0
    u = one.state.memory.momentum_of("other") + 0
    gradients = normals(SHAPES, 1)
    gradients["big"][0, 0] = math.nan
    one.train(gradients)
    assert all(torch.equal(one.parameter(name), before[name]) for name in SHAPES)
    # Finite entries stay accumulated, and what was sent of them is back.
    assert torch.equal(one.state.memory.residual_of("other"), v + (0.5 * u + gradients["other"]))
    with pytest.raises(FloatingPointError, match="rank 0, step 1"):
        one.train(normals(SHAPES, 2))
    assert all(torch.equal(one.parameter(name), before[name]) for name in SHAPES)
    one.train(normals(SHAPES, 2))  # and it goes on
    assert (one.state.step, one.state.stats.skipped) == (2, 2)
    assert not torch.equal(one.parameter("big"), before["big"])


def test_a_corrupt_payload_changes_nothing_and_surfaces_at_the_next_step_with_the_rank(monkeypatch):
    one = Alone(SHAPES, dgc.DGCConfig(density=0.01), lr=0.5, momentum=0.5, weight_decay=0.1, late=True)
    one.train(normals(SHAPES, 0))
    start = one.state.exchange.start

    def wrong(name, payload, gathered, dense):
        transfer = start(name, payload, gathered, dense)
        wire.header(gathered)[0, 0] ^= 1
        return transfer

    with monkeypatch.context() as patch:
        patch.setattr(one.state.exchange, "start", wrong)
        before = {name: one.parameter(name).clone() for name in SHAPES}
        one.train(normals(SHAPES, 1))
    assert all(torch.equal(one.parameter(name), before[name]) for name in SHAPES)
    with pytest.raises(wire.PayloadError, match="payload of rank 0: these are not bytes of this version"):
        one.train(normals(SHAPES, 2))


def test_a_skipped_step_is_logged_one_step_late(caplog):
    one = Alone(SHAPES, dgc.DGCConfig(density=0.01, on_nonfinite="skip"), lr=0.5, late=True)
    gradients = normals(SHAPES, 1)
    gradients["big"][0, 0] = math.nan
    with caplog.at_level(logging.WARNING, "dgc"):
        one.train(gradients)
        assert caplog.text == ""
        one.train(normals(SHAPES, 2))
    assert "dgc: step 0 left out on all ranks, gradients not finite: big on rank 0" in caplog.text


def test_state_dict_waits_for_the_verdict():
    one = Alone(SHAPES, dgc.DGCConfig(density=0.01, on_nonfinite="skip"), lr=0.5, late=True)
    gradients = normals(SHAPES, 1)
    gradients["big"][0, 0] = math.nan
    one.train(gradients)
    assert one.state.state_dict()["ranks"]["0"]["step"] == 0


def test_other_optimizers_cannot_skip_so_the_host_waits():
    one = Alone(SHAPES, dgc.DGCConfig(density=0.01), lr=0.5)
    plain = torch.optim.SGD(one.model.parameters(), lr=0.5)
    state = dgc.DGCState(one.model.named_parameters(), plain, dgc.DGCConfig(density=0.01), late=True)
    one.state, one.optimizer = state, plain
    before = one.parameter("big").clone()
    gradients = normals(SHAPES, 1)
    gradients["big"][0, 0] = math.nan
    one.backward(gradients)
    with pytest.raises(FloatingPointError, match="rank 0, step 0"):
        plain.step()
    assert torch.equal(one.parameter("big"), before)


def test_loading_a_state_forgets_the_verdict_on_the_step_before():
    one = Alone(SHAPES, dgc.DGCConfig(density=0.01), lr=0.5, late=True)
    one.train(normals(SHAPES, 0))
    saved = {"version": 1, **one.state.state_dict()["ranks"]["0"], "step": 7}
    gradients = normals(SHAPES, 1)
    gradients["big"][0, 0] = math.nan
    one.train(gradients)
    one.state.load_state_dict(saved)
    one.train(normals(SHAPES, 2))  # does not raise
    assert one.state.step == 8


def test_discard_waits_for_what_is_still_under_way():
    one = Alone(SHAPES, dgc.DGCConfig(density=0.01), lr=0.5)
    start = one.state.exchange.start
    arrived = []

    def slow(name, payload, gathered, dense):
        transfer = start(name, payload, gathered, dense)
        transfer.done = torch.futures.Future()

        def complete() -> None:
            time.sleep(0.5)
            arrived.append(True)
            transfer.done.set_result([])

        threading.Thread(target=complete).start()
        return transfer

    one.state.exchange.start = slow
    one.model(normals(SHAPES, 0)).backward()
    one.state.begin()
    one.state.reduce(gradients_of(one.state, list(one.model.parameters())))  # a backward pass that breaks off
    assert not arrived
    one.state.discard(drop_gradient=False)
    assert arrived
    assert torch.equal(one.state.memory.residual_of("big"), normals(SHAPES, 0)["big"])


@pytest.mark.parametrize("bad", ["big", "other", "bias"])
def test_one_bad_bucket_of_several_is_enough(bad):
    one = Alone(SHAPES, dgc.DGCConfig(density=0.01, on_nonfinite="skip"), lr=0.5, late=True)
    before = {name: one.parameter(name).clone() for name in SHAPES}
    given = normals(SHAPES, 0)
    given[bad].view(-1)[0] = math.nan
    one.model(given).backward()
    one.state.begin()
    for p in one.model.parameters():  # a bucket each
        one.state.reduce(gradients_of(one.state, [p]))
    one.state.end()
    one.optimizer.step()
    assert all(torch.equal(one.parameter(name), before[name]) for name in SHAPES)
    one.train(normals(SHAPES, 1))
    assert one.state.stats.skipped == 1
