"""Gradients behind Horovod: accumulated, missing, not finite, scaled, of other types and shapes, in process sets."""

import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import dgc
from dgc.horovod_fusion import fuse
from support import horovod_ranks
from support.horovod_run import Run, hvd
from support.models import Given, integers, normals
from support.training import (
    LARGE,
    SHAPES,
    assert_close_to,
    assert_conserved,
    assert_equal,
    assert_replicas_equal,
    oracle_for,
    seed_of,
)


def accumulate(passes):
    run = Run(momentum=0.0, horovod={"backward_passes_per_step": passes})
    for step in range(6):
        run.optimizer.zero_grad()
        for i in range(2):
            run.net(integers(SHAPES, seed_of(2 * step + i, hvd.rank()))).backward()
        run.optimizer.step()
    result = run.result()
    try:
        run.net(integers(SHAPES, 0)).backward()
        for _ in range(passes):
            run.net(integers(SHAPES, 0)).backward()
        error = "none"
    except (AssertionError, RuntimeError) as caught:
        error = str(caught)
    return result, error


@pytest.mark.parametrize("passes", [2, 3])
def test_backward_passes_accumulate_before_anything_is_sent(horovod, passes):
    # With 3, step() comes early every time: what is there is exchanged then.
    results, errors = zip(*horovod(2, accumulate, passes), strict=True)

    def sums(shapes, seed):
        step, rank = divmod(seed, 1000)
        first, second = (integers(shapes, seed_of(2 * step + i, rank)) for i in (0, 1))
        return {name: first[name] + second[name] for name in shapes}

    assert_close_to(oracle_for(2, 6, sums, lambda s: 0.008, lambda s: True, momentum=0.0), results, 0.0)
    assert all("backward_passes_per_step" in error for error in errors)


def branches():
    """Uses "e" and "d" every other step, "c" on rank 0 only."""
    run = Run(momentum=0.0, lr=0.25)
    total = {n: torch.zeros(s) for n, s in SHAPES.items()}
    for step in range(20):
        g = integers(SHAPES, seed_of(step, hvd.rank()))
        if step % 2:
            del g["e"], g["d"]
        if hvd.rank():
            del g["c"]
        for name, tensor in g.items():
            total[name] += tensor
        run.train(g)
    return {**run.result(), "total": total}


def test_a_parameter_without_gradient_loses_nothing(horovod):
    assert_conserved(horovod(2, branches), 8)


def poison(on_nonfinite):
    run = Run(dgc.DGCConfig(density=0.008, on_nonfinite=on_nonfinite), momentum=0.0, lr=0.25)
    total = {n: torch.zeros(s) for n, s in SHAPES.items()}
    raised = 0
    for step in range(10):
        g = integers(SHAPES, seed_of(step, hvd.rank()))
        for name in LARGE:
            total[name] += g[name]
        if hvd.rank() == 1 and step in (3, 4):
            total["c"][0, 0] -= g["c"][0, 0]
            g["c"][0, 0] = float("nan")
        try:
            run.train(g)
        except FloatingPointError:
            raised += 1
    return {**run.result(), "total": total, "raised": raised}


def scale_losses(dtype, with_scaler):
    scaler = GradScaler("cpu", init_scale=2.0**16, growth_interval=2, enabled=with_scaler)
    run = Run(momentum=0.0, lr=0.25, dtype=dtype, horovod={"grad_scaler": scaler})
    for step in range(8):
        g = {name: x.to(dtype) for name, x in integers(SHAPES, seed_of(step, hvd.rank())).items()}
        if with_scaler and step == 3:  # a step more, which is to leave no trace but in what was finite: nothing
            run.optimizer.zero_grad()
            poisoned = {name: torch.full_like(x, math.nan if hvd.rank() else 0.0) for name, x in g.items()}
            scaler.scale(run.net(poisoned)).backward()
            with pytest.raises(RuntimeError, match=r"optimizer\.skip_synchronize\(\)"):
                scaler.step(run.optimizer)
            run.optimizer.synchronize()
            with run.optimizer.skip_synchronize():
                scaler.step(run.optimizer)
            scaler.update()
        run.optimizer.zero_grad()
        scaler.scale(run.net(g)).backward()
        run.optimizer.synchronize()
        with run.optimizer.skip_synchronize():
            scaler.step(run.optimizer)
        scaler.update()
    return {**run.result(), "scale": scaler.get_scale()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_scaling_changes_no_bit_and_skips_everywhere(horovod, dtype):
    scaled, plain = (horovod(2, scale_losses, dtype, with_scaler) for with_scaler in (True, False))
    assert_equal(scaled, plain)
    assert [r["scale"] for r in scaled] == [2.0**18] * 2
    assert [(r["step"], r["stats"].skipped) for r in scaled] == [(8, 1)] * 2
    assert [(r["step"], r["stats"].skipped) for r in plain] == [(8, 0)] * 2


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_non_finite_gradients_lose_nothing(horovod, on_nonfinite):
    results = horovod(2, poison, on_nonfinite)
    assert_conserved(results, 8)
    assert [(r["raised"], r["stats"].skipped) for r in results] == [(2 * (on_nonfinite == "raise"), 2)] * 2


def in_a_process_set():
    run = Run(momentum=0.0, horovod={"process_set": horovod_ranks.process_set})
    for step in range(10):
        run.train(integers(SHAPES, seed_of(step, hvd.rank())))
    return run.result()


def test_a_process_set_exchanges_by_itself_and_the_others_run_alone(horovod):
    results = horovod(3, in_a_process_set)

    def of_members(shapes, seed):
        step, rank = divmod(seed, 1000)
        return integers(shapes, seed_of(step, 2 * rank))

    def of_the_other(shapes, seed):
        return integers(shapes, seed + 1)

    exact = {"densities": lambda s: 0.008, "masking": lambda s: True, "momentum": 0.0}
    assert_close_to(oracle_for(2, 10, of_members, **exact), [results[0], results[2]], 0.0)
    assert_close_to(oracle_for(1, 10, of_the_other, **exact), [results[1]], 0.0)


class Mixed(nn.Module):
    """float32, float16-free: Horovod has no bfloat16, and here half of the model is; channels_last and a frozen one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(64, 300).bfloat16()
        self.frozen = nn.Linear(300, 10).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.linear(self.conv(x).mean((2, 3)).bfloat16()).float()).square().mean()


def train_mixed():
    run = Run(module=Mixed(), lr=0.3, momentum=0.9, cap=25)
    torch.manual_seed(hvd.rank())
    x = torch.randn(8, 64, 5, 5)
    losses = []
    for _ in range(30):
        run.optimizer.zero_grad()
        loss = run.net(x)
        loss.backward()
        run.optimizer.step()
        losses.append(float(loss))
    return {**run.result(), "losses": losses, "dense": run.state.stats.dense}


def test_bfloat16_channels_last_and_frozen_parameters(horovod):
    results = horovod(2, train_mixed)
    assert_replicas_equal(results)
    assert set(results[0]["dense"]) == {"conv.bias", "linear.bias"}
    assert results[0]["losses"][-1] < 0.5 * results[0]["losses"][0]


def odd_shapes():
    shapes = {"empty": (0, 5), "scalar": (), "w": (200, 100), "lonely": (0,)}
    run = Run(shapes=shapes, cap=1e-6)  # each parameter in a group of its own
    for step in range(3):
        run.train(normals(shapes, seed_of(step, hvd.rank())))
    return {**run.result(), "groups": len(run.optimizer._fusion._groups)}


def test_empty_parameters_and_scalars(horovod):
    results = horovod(2, odd_shapes)
    assert_replicas_equal(results)
    assert results[0]["groups"] == 4
    assert not torch.equal(results[0]["parameters"]["scalar"], Given({"scalar": ()}).scalar)


def test_groups_hold_one_type_and_no_more_tensors_than_the_kernels_take():
    small = [nn.Parameter(torch.zeros(2, dtype=torch.float16 if i % 2 else torch.float32)) for i in range(1200)]
    groups = fuse(small, None, 25)
    assert [len(group) for group in groups] == [256, 256, 88] * 2
    assert all(len({p.dtype for p in group}) == 1 for group in groups)
    assert [id(p) for p in groups[0][:2]] == [id(small[-1]), id(small[-3])]
    large = [nn.Parameter(torch.zeros(1024, 1024)) for _ in range(5)]
    assert [len(group) for group in fuse(large, None, 8.5)] == [2, 2, 1]
    assert [len(group) for group in fuse(large, None, 1)] == [1] * 5
