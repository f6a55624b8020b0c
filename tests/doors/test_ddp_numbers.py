"""The numbers of the hook in DDP on gloo processes: against the oracle and torch.optim.SGD, and after a resume."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.ddp_run import Run, train_given
from support.models import Given, integers, normals
from support.ranks import run_ranks
from support.training import (
    LARGE,
    SHAPES,
    assert_close_to,
    assert_replicas_equal,
    assert_resumed,
    oracle_for,
    seed_of,
)
from support.wire_oracle import payload_bytes


def test_integer_gradients_on_two_ranks_match_the_oracle_exactly():
    # Momentum 0: integers stay integers, so float32 and float64 agree in every bit, ties included.
    results = run_ranks(2, train_given, 40, integers, {"momentum": 0.0})
    assert_close_to(oracle_for(2, 40, integers, lambda s: 0.008, lambda s: True, momentum=0.0), results, 0.0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_momentum_nesterov_decay_clipping_and_warm_up_match_the_oracle(world_size):
    config = dgc.DGCConfig(density=0.008, warmup_steps=12, warmup_densities=(0.25, 0.05), clip_norm=20.0)
    sgd = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    results = run_ranks(world_size, train_given, 30, normals, {"config": config, **sgd})
    assert_replicas_equal(results)
    oracle = oracle_for(
        world_size,
        30,
        normals,
        lambda s: 0.25 if s < 6 else 0.05 if s < 12 else 0.008,
        lambda s: s >= 12,
        clip_norm=20.0,
        **sgd,
    )
    assert_close_to(oracle, results, 1e-5)


@pytest.mark.parametrize(("world_size", "wire_dtype"), [(2, torch.float32), (3, torch.bfloat16), (4, torch.float16)])
def test_replicas_stay_bit_identical_and_nothing_is_lost(world_size, wire_dtype):
    steps = 300
    config = dgc.DGCConfig(density=0.005, wire_dtype=wire_dtype)
    results = run_ranks(world_size, train_given, steps, normals, {"config": config, "momentum": 0.0, "lr": 0.1})
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        total = torch.zeros(SHAPES[name], dtype=torch.float64)
        for rank in range(world_size):
            for step in range(steps):
                total += normals(SHAPES, seed_of(step, rank))[name] / world_size
        moved = (start[name].detach().double() - results[0]["parameters"][name].double()) / 0.1
        waiting = sum(r["residual"][name].double() for r in results) / world_size
        assert float((moved + waiting - total).norm() / total.norm()) < 1e-5


def test_conservation_of_integers_is_exact_on_four_ranks():
    results = run_ranks(4, train_given, 60, integers, {"momentum": 0.0, "lr": 0.25})
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        total = sum(integers(SHAPES, seed_of(step, rank))[name] for step in range(60) for rank in range(4))
        moved = start[name].detach() - results[0]["parameters"][name]
        assert torch.equal(16 * moved + sum(r["residual"][name] for r in results), total)


def test_another_split_into_buckets_gives_the_same_bits():
    split = [
        run_ranks(3, train_given, 20, normals, {"ddp": {"bucket_cap_mb": mb}, "config": config})
        for mb in (0.02, 25)
        for config in [dgc.DGCConfig(density=0.008, clip_norm=30.0)]
    ]
    for name in SHAPES:
        one, other = (results[0]["parameters"][name] for results in split)
        if name in LARGE:
            assert torch.equal(one, other), name
        else:
            torch.testing.assert_close(one, other)


def compare_with_torch_sgd(rank, world_size, sgd):
    ours = Run(dgc.DGCConfig(density=1.0), **sgd)
    theirs = DistributedDataParallel(Given(SHAPES), bucket_cap_mb=0.05)
    optimizer = torch.optim.SGD(theirs.parameters(), **sgd)
    for step in range(30):
        g = normals(SHAPES, seed_of(step, rank))
        ours.train(g)
        optimizer.zero_grad()
        theirs(g).backward()
        optimizer.step()
    return [(p.detach(), q.detach()) for p, q in zip(ours.net.parameters(), theirs.module.parameters(), strict=True)]


@pytest.mark.parametrize("nesterov", [False, True])
def test_density_one_is_torch_sgd(nesterov):
    sgd = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    for ours, theirs in run_ranks(1, compare_with_torch_sgd, sgd)[0]:
        assert torch.equal(ours, theirs)
    for rank in run_ranks(3, compare_with_torch_sgd, sgd):
        for ours, theirs in rank:
            torch.testing.assert_close(ours, theirs)


def test_bytes_on_the_wire_are_what_stats_and_the_formula_say():
    for result in run_ranks(3, count_bytes):
        assert result["measured"] == result["stats"]


def count_bytes(rank, world_size):
    """Measures the tensors given to the collectives."""
    run = Run()
    sizes = {"gather": [], "reduce": []}
    start = run.state.exchange.start

    def spy(name, payload, gathered, dense):
        sizes["gather"].append(0 if payload is None else payload.nbytes)
        sizes["reduce"].append(0 if dense is None else dense.nbytes)
        return start(name, payload, gathered, dense)

    run.state.exchange.start = spy
    total = 0
    for step in range(3):
        sizes["gather"].clear()
        sizes["reduce"].clear()
        run.train(normals(SHAPES, step))
        total += run.state.stats.bytes_sent  # the first step's buckets are others
        assert run.state.stats.total_bytes_sent == total
    formula = 0
    for bucket in run.state._pass.buckets:
        rows = bucket.sparse.receiving.rows if bucket.sparse else []
        if rows:
            formula += payload_bytes((r.numel, r.entries) for r in rows)
    assert sum(sizes["gather"]) == formula
    assert sum(sizes["reduce"]) == 4 * (100 + 1200)
    return {
        "measured": 2 * sum(sizes["gather"]) + 2 * 2 * sum(sizes["reduce"]) // 3,
        "stats": run.state.stats.bytes_sent,
    }


@pytest.mark.parametrize(
    "ddp",
    [{"gradient_as_bucket_view": True}, {"static_graph": True}, {"bucket_cap_mb": 0.001}],
    ids=lambda d: next(iter(d)),
)
def test_ddp_options_do_not_change_the_result(ddp):
    results = run_ranks(2, train_given, 20, integers, {"ddp": ddp, "momentum": 0.0})
    assert_close_to(oracle_for(2, 20, integers, lambda s: 0.008, lambda s: True, momentum=0.0), results, 0.0)


def resume(rank, world_size, folder):
    config = dgc.DGCConfig(density=0.008, warmup_steps=10, warmup_densities=(0.25, 0.05))
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "config": config}
    straight = Run(**sgd)
    for step in range(16):
        straight.train(normals(SHAPES, seed_of(step, rank)))
        if step == 6:
            parts = {"model": straight.net, "optimizer": straight.optimizer, "dgc": straight.state}
            torch.save({key: part.state_dict() for key, part in parts.items()}, f"{folder}/{rank}.pt")
    resumed = Run(**sgd)
    saved = torch.load(f"{folder}/{rank}.pt", weights_only=True)
    resumed.net.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.state.load_state_dict(saved["dgc"])
    for step in range(7, 16):
        resumed.train(normals(SHAPES, seed_of(step, rank)))
    return straight.result(), resumed.result()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resume_in_the_middle_of_warm_up_is_bit_exact(world_size, tmp_path):
    for straight, resumed in run_ranks(world_size, resume, str(tmp_path)):
        assert_resumed(straight, resumed, world_size)
        assert straight["step"] == resumed["step"] == 16
