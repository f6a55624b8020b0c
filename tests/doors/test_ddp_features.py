"""DDP's own features with the hook: no_sync, unused parameters, join, mixed types, torch.compile; and dense phases."""

import numpy as np
import pytest
import torch
from torch import nn

from support.ddp_run import Run
from support.models import Given, integers, normals
from support.ranks import run_ranks
from support.training import (
    LARGE,
    SHAPES,
    assert_close_to,
    assert_replicas_equal,
    oracle_for,
    seed_of,
)


def accumulate(rank, world_size):
    run = Run(momentum=0.0)
    for step in range(6):
        run.optimizer.zero_grad()
        with run.ddp.no_sync():
            run.ddp(integers(SHAPES, seed_of(2 * step, rank))).backward()
        run.ddp(integers(SHAPES, seed_of(2 * step + 1, rank))).backward()
        run.optimizer.step()
    return run.result()


def test_no_sync_accumulates_before_anything_is_sent():
    results = run_ranks(2, accumulate)

    def sums(shapes, seed):
        step, rank = divmod(seed, 1000)
        first, second = (integers(shapes, seed_of(2 * step + i, rank)) for i in (0, 1))
        return {name: first[name] + second[name] for name in shapes}

    assert_close_to(oracle_for(2, 6, sums, lambda s: 0.008, lambda s: True, momentum=0.0), results, 0.0)


def accumulate_without_no_sync(rank, world_size):
    run = Run()
    run.ddp(normals(SHAPES, rank)).backward()
    try:
        run.ddp(normals(SHAPES, rank)).backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_two_synchronised_backwards_are_refused():
    assert all("no_sync()" in message for message in run_ranks(2, accumulate_without_no_sync))


def branches(rank, world_size, to_none):
    """Branch "e" is used every other step, "c" on rank 0 only."""
    run = Run(ddp={"find_unused_parameters": True, "bucket_cap_mb": 25}, momentum=0.0, lr=0.25)
    for step in range(20):
        g = integers(SHAPES, seed_of(step, rank))
        if step % 2:
            del g["e"], g["d"]
        if rank:
            del g["c"]
        run.optimizer.zero_grad(set_to_none=to_none)
        run.ddp(g).backward()
        run.optimizer.step()
    return run.result()


@pytest.mark.parametrize("to_none", [True, False])
def test_unused_parameters_lose_nothing(to_none):
    results = run_ranks(2, branches, to_none)
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        total = torch.zeros(SHAPES[name])
        for step in range(20):
            for rank in range(2):
                if not (name == "e" and step % 2) and not (name == "c" and rank):
                    total += integers(SHAPES, seed_of(step, rank))[name]
        moved = start[name].detach() - results[0]["parameters"][name]
        assert torch.equal(8 * moved + sum(r["residual"][name] for r in results), total), name


def uneven(rank, world_size):
    run = Run(momentum=0.0, lr=0.25)
    with run.ddp.join():
        for step in range(6 + 4 * rank):
            run.train(integers(SHAPES, seed_of(step, rank)))
    return run.result()


def test_join_keeps_sending_the_residual_of_a_rank_that_ran_out_of_data():
    results = run_ranks(2, uneven)
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        total = sum(integers(SHAPES, seed_of(s, r))[name] for r in range(2) for s in range(6 + 4 * r))
        moved = start[name].detach() - results[0]["parameters"][name]
        assert torch.equal(8 * moved + sum(r["residual"][name] for r in results), total)
    assert [r["step"] for r in results] == [10, 10]


class Mixed(nn.Module):
    """float32 and bfloat16 parameters and a frozen one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(150, 200)
        self.second = nn.Linear(200, 150).bfloat16()
        self.frozen = nn.Linear(150, 150).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.second(self.first(x).relu().bfloat16()).float()).square().mean()


def train_mixed(rank, world_size, compiled=False):
    net = Mixed()
    module = torch.compile(net, backend="aot_eager") if compiled else net
    # torch.compile cuts the graph along the buckets and wants none below 1 MB.
    run = Run(module=module, lr=0.3, momentum=0.9, ddp={"bucket_cap_mb": 1})
    before = [p.detach().clone() for p in net.parameters()]
    losses = []
    torch.manual_seed(rank)
    x = torch.randn(64, 150)
    for _ in range(40):
        run.optimizer.zero_grad()
        loss = run.ddp(x)
        loss.backward()
        run.optimizer.step()
        losses.append(float(loss))
    moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
    return {**run.result(), "losses": losses, "moved": moved, "names": list(run.state.memory.compressed)}


@pytest.mark.parametrize("compiled", [False, True])
def test_mixed_types_frozen_parameters_and_torch_compile(compiled):
    results = run_ranks(2, train_mixed, compiled)
    assert_replicas_equal(results)
    assert results[0]["moved"] == [True] * 4 + [False] * 2
    assert results[0]["names"] == ["first.weight", "second.weight"]
    assert results[0]["losses"][-1] < 0.5 * results[0]["losses"][0]


def refuse_sparse(rank, world_size):
    run = Run(module=nn.Embedding(300, 100, sparse=True))
    try:
        run.train(torch.tensor([1, 2, 3]))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def test_sparse_gradients_are_refused():
    for message in run_ranks(2, refuse_sparse):
        assert "sparse=False" in message


def switch(rank, world_size):
    run = Run(lr=0.1)
    for step in range(30):
        run.state.dense = 10 <= step < 20
        run.train(normals(SHAPES, seed_of(step, rank)))
        if step == 9:
            waiting = {n: run.state.memory.residual_of(n).clone() for n in LARGE}
        if step == 10:
            averaged = {n: run.state.memory.momentum_of(n).clone() for n in LARGE}
        if step == 19:
            assert all(torch.equal(run.state.memory.residual_of(n), waiting[n]) for n in LARGE)
            assert run.state.memory.diverged == set()
    return {**run.result(), "averaged": averaged}


def test_switching_to_dense_and_back_averages_momentum_once_and_keeps_the_residual():
    results = run_ranks(3, switch)
    assert_replicas_equal(results)
    for name in LARGE:
        assert all(torch.equal(r["averaged"][name], results[0]["averaged"][name]) for r in results)
        assert not torch.equal(results[1]["momentum"][name], results[0]["momentum"][name])
    # The average itself: ten sparse steps by the oracle, then one dense one.
    oracle = oracle_for(3, 10, normals, lambda s: 0.008, lambda s: True, lr=0.1)
    for name in LARGE:
        mean = sum(normals(SHAPES, seed_of(10, rank))[name].double() for rank in range(3)) / 3
        u = 0.5 * sum(oracle.u[rank][name] for rank in range(3)) / 3 + mean.numpy().ravel()
        np.testing.assert_allclose(results[0]["averaged"][name].numpy().ravel(), u, atol=1e-5)
