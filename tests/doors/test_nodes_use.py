"""DDP with nodes as workers, used in all the ways that a flat exchange is."""

import os

import pytest
import torch

import dgc
from support.messages import Messages, error_of
from support.models import Given, integers, normals
from support.node_run import NodeRun
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, assert_replicas_equal, assert_same, seed_of

CONFIG = dgc.DGCConfig(density=0.01, momentum_masking=False)
SETTINGS = {"lr": 0.25, "momentum": 0.5}


def train(rank, world_size, how):
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = "2", str(rank % 2)
    state = {"late": True} if how == "late" else {}
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    config = dgc.DGCConfig(density=0.01, warmup_steps=4, warmup_densities=(0.25,), wire_dtype=dtype)
    run = NodeRun(2, config, state=state, optimizer=dgc.AdamW if how == "AdamW" else dgc.SGD, lr=0.05)
    if how == "in step":
        del run.state
        run.state = dgc.DGCState(run.net.named_parameters(), run.optimizer, config, mesh="auto")
        run.state.register(run.net, in_step=True)
    for step in range(8):
        gradients = normals(SHAPES, seed_of(step, rank))
        if how == "in step":
            run.optimizer.zero_grad()
            run.net(gradients).backward()
            run.optimizer.step()
        elif how == "accumulated":
            run.optimizer.zero_grad()
            with run.ddp.no_sync():
                run.ddp({name: g / 2 for name, g in gradients.items()}).backward()
            run.ddp({name: g / 2 for name, g in gradients.items()}).backward()
            run.optimizer.step()
        else:
            run.train(gradients)
    run.state.state_dict()  # reads a late verdict
    return run.result()


def test_a_late_verdict_accumulation_and_exchange_in_step_change_nothing():
    expected = run_ranks(4, train, "plain")
    assert_replicas_equal(expected)
    assert expected[0]["stats"].density == 0.01
    for how in ("late", "accumulated", "in step"):
        assert_same(expected, run_ranks(4, train, how))


@pytest.mark.parametrize("how", ["bfloat16", "AdamW"])
def test_other_values_on_the_wire_and_adamw(how):
    results = run_ranks(4, train, how)
    assert_replicas_equal(results)
    assert all(r["residual"][name].any() for r in results for name in LARGE)


def discard(rank, world_size, droppable):
    """Between two steps a pass that is given up, or whose gradients are thrown away."""
    run = NodeRun(2, dgc.DGCConfig(density=0.01, droppable=droppable, momentum_masking=True), **SETTINGS)
    run.train(integers(SHAPES, seed_of(0, rank)))
    before = run.result()
    run.ddp(integers(SHAPES, seed_of(1, rank))).backward()
    run.state.discard(drop_gradient=droppable)
    after = run.result()
    run.optimizer.zero_grad()
    if droppable:
        run.ddp(integers(SHAPES, seed_of(2, rank))).backward()
        run.net.a.grad = None
        run.optimizer.step()
    run.train(integers(SHAPES, seed_of(3, rank)))
    return before, after, run.result()


@pytest.mark.parametrize("droppable", [True, False])
def test_a_pass_that_is_given_up(droppable):
    results = run_ranks(4, discard, droppable)
    assert_replicas_equal([result for _, _, result in results])
    for before, after, _ in results:
        for kind in ("residual", "momentum"):
            assert all(torch.equal(t, after[kind][name]) for name, t in before[kind].items()) == droppable


def uneven(rank, world_size, late):
    config = dgc.DGCConfig(density=0.01, momentum_masking=False, on_nonfinite="skip")
    run = NodeRun(2, config, state={"late": late}, lr=0.25, momentum=0.0)
    with run.ddp.join():
        for step in range(4 + 2 * rank):
            run.train(integers(SHAPES, seed_of(step, rank)))
            if rank == 3 and step == 8 and not late:  # all others have left
                gradients = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
                gradients["c"][0, 0] = torch.nan
                run.train(gradients)
    return run.result()


@pytest.mark.parametrize("late", [False, True])
def test_join_loses_nothing_of_ranks_that_ran_out_of_data_one_after_the_other(late):
    results = run_ranks(4, uneven, late)
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        # A node's gradient is the mean of its two ranks', and a parameter moves by a quarter of the nodes' mean.
        total = sum(integers(SHAPES, seed_of(s, r))[name] for r in range(4) for s in range(4 + 2 * r)) / 2
        moved = 8 * (start[name].detach() - results[0]["parameters"][name])
        waits = sum(torch.cat([results[2 * node + place]["residual"][name] for place in range(2)]) for node in range(2))
        assert torch.equal(moved.flatten() + waits, total.flatten()), name
        assert waits.any()
    assert [r["step"] for r in results] == [10] * 4


def scaled(rank, world_size):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run = NodeRun(2, CONFIG, state={"grad_scaler": scaler}, **SETTINGS)
    for step in range(5):
        run.optimizer.zero_grad()
        gradients = integers(SHAPES, seed_of(step, rank))
        if step == 2 and rank == 1:
            gradients["c"][0, 0] = torch.inf
        scaler.scale(run.ddp(gradients)).backward()
        scaler.step(run.optimizer)
        scaler.update()
    return run.result(), scaler.get_scale()


def test_one_ranks_overflow_lowers_the_loss_scale_of_all():
    results = run_ranks(4, scaled)
    assert_replicas_equal([result for result, _ in results])
    assert [scale for _, scale in results] == [512.0] * 4
    assert [result["step"] for result, _ in results] == [4] * 4


def changed(rank, world_size, how):
    run = NodeRun(2, dgc.DGCConfig(density=0.01, on_changed_gradient="raise"), lr=0.25, momentum=0.0)
    run.ddp(normals(SHAPES, seed_of(0, rank))).backward()
    if how == "scaled":
        for p in run.net.parameters():
            p.grad.mul_(0.5)
    elif how == "zeroed":
        run.net.e.grad.zero_()
    return error_of(run.optimizer.step), run.state.residual_norm


def test_gradients_that_are_changed_or_zeroed_are_noticed_in_each_ranks_rows():
    for error, _ in run_ranks(4, changed, "scaled"):
        assert error.startswith("RuntimeError: dgc: expected gradients as backward() left them, got others for a, c, e")
    for error, _ in run_ranks(4, changed, "zeroed"):
        assert error.startswith("RuntimeError: optimizer: expected the gradient of every compressed parameter")
        assert "got None or zeros for e" in error
    assert [error for error, _ in run_ranks(4, changed, "left alone")] == [""] * 4


def everything(rank, world_size):
    """Half of the steps at a low density, then all entries."""
    messages = Messages()
    run = NodeRun(2, CONFIG, lr=0.25, momentum=0.0)
    for step in range(6):
        if step == 3:
            run.state.set_density(1.0)
        run.train(integers(SHAPES, seed_of(step, rank)))
    return run.result(), messages.lines


def test_at_density_1_nothing_waits_and_the_log_says_what_it_costs():
    results = run_ranks(4, everything)
    assert_replicas_equal([result for result, _ in results])
    start = dict(Given(SHAPES).named_parameters())
    for result, _ in results:
        assert not any(v.any() for v in result["residual"].values())
    for name in LARGE:
        total = sum(integers(SHAPES, seed_of(step, rank))[name] for step in range(6) for rank in range(4)) / 4
        assert torch.equal(start[name].detach() - results[0][0]["parameters"][name], 0.25 * total), name
    said = [line for line in results[0][1] if "a dense all-reduce between 2 nodes would take fewer bytes" in line]
    assert len(said) == 1
    assert "density 100 %: 3 of 5 parameters compressed" in said[0]
