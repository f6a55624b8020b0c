"""The numbers of dgc.AdamW behind DDP on gloo processes: against an oracle, and what is sent and waits."""

import numpy as np
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
    adam_oracle_for,
    assert_close_to_adam,
    assert_replicas_equal,
    assert_resumed,
    seed_of,
)

# With a large eps a direction depends on the gradient's size from the first step on: with a small one all entries
# would be equal then, and rounding would select.
ADAM = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 0.4, "weight_decay": 0.1}
CONFIG = dgc.DGCConfig(density=0.008, warmup_steps=12, warmup_densities=(0.25, 0.05), clip_norm=150.0)


def density(step):
    return 0.25 if step < 6 else 0.05 if step < 12 else 0.008


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_moments_decay_clipping_warm_up_and_dense_phases_match_the_oracle(world_size):
    dense = (0, 1, 9, 10, 11, 20)  # a dense start, and phases between compressed ones
    kwargs = {"optimizer": dgc.AdamW, "config": CONFIG, **ADAM}
    results = run_ranks(world_size, train_given, 30, normals, kwargs, dense)
    assert_replicas_equal(results)
    oracle = adam_oracle_for(world_size, 30, normals, density, dense.__contains__, clip_norm=150.0, **ADAM)
    assert_close_to_adam(oracle, results, 1e-5)
    assert all(result["residual"][name].any() for result in results for name in LARGE)


@pytest.mark.parametrize("betas", [(0.5, 0.75), (0.0, 0.9)], ids=str)  # a > 0, and no momentum to correct by
def test_other_betas_match_the_oracle_and_there_is_nothing_to_mask(betas):
    adam = {**ADAM, "betas": betas}
    config = dgc.DGCConfig(density=0.02, momentum_masking=True)
    results = run_ranks(2, train_given, 20, normals, {"optimizer": dgc.AdamW, "config": config, **adam})
    assert_replicas_equal(results)
    assert_close_to_adam(adam_oracle_for(2, 20, normals, lambda _: 0.02, **adam), results, 1e-5)


def test_adam_without_decay_matches_the_oracle():
    adam = {**ADAM, "weight_decay": 0.0}
    results = run_ranks(2, train_given, 12, normals, {"optimizer": dgc.Adam, **adam})
    assert_close_to_adam(adam_oracle_for(2, 12, normals, lambda _: 0.008, **adam), results, 1e-5)


def test_signs_on_four_ranks_are_sent_or_wait_exactly():
    # Without decay of the moments a direction is the sign of an integer, times lr: sums of them are exact.
    adam = {"lr": 0.25, "betas": (0.0, 0.0), "eps": 2.0**-60, "weight_decay": 0.0}
    results = run_ranks(4, train_given, 40, integers, {"optimizer": dgc.AdamW, **adam})
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        signs = sum(integers(SHAPES, seed_of(step, rank))[name].sign() for step in range(40) for rank in range(4))
        moved = start[name].detach() - results[0]["parameters"][name]
        assert torch.equal(4 * moved + sum(r["residual"][name] for r in results), 0.25 * signs), name
    oracle = adam_oracle_for(4, 40, integers, lambda _: 0.008, **adam)
    assert_close_to_adam(oracle, results, 0.0)  # to the bit, ties included


@pytest.mark.parametrize(("world_size", "wire_dtype"), [(2, torch.bfloat16), (3, torch.float16)])
def test_directions_of_many_steps_are_sent_or_wait(world_size, wire_dtype):
    # The moments do not depend on what was sent, so the sum of all directions is the oracle's, whatever was selected.
    adam = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    config = dgc.DGCConfig(density=0.005, wire_dtype=wire_dtype)
    results = run_ranks(world_size, train_given, 60, normals, {"optimizer": dgc.AdamW, "config": config, **adam})
    assert_replicas_equal(results)
    oracle = adam_oracle_for(world_size, 60, normals, lambda _: 0.005, **adam)
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        total = sum(of[name] for of in oracle.accumulated)
        moved = (start[name].detach() - results[0]["parameters"][name]).double().numpy().ravel()
        waiting = sum(r["residual"][name].double() for r in results).numpy().ravel()
        assert np.linalg.norm(world_size * moved + waiting - total) < 1e-4 * np.linalg.norm(total), name


def test_another_split_into_buckets_gives_the_same_bits():
    kwargs = {"optimizer": dgc.AdamW, "config": CONFIG, **ADAM}
    small, large = (
        run_ranks(2, train_given, 20, normals, {"ddp": {"bucket_cap_mb": mb}, **kwargs}, (8, 9)) for mb in (0.02, 25)
    )
    for name in SHAPES:
        assert torch.equal(small[0]["parameters"][name], large[0]["parameters"][name]), name


def compare_with_torch(rank, world_size, adam):
    ours = Run(dgc.DGCConfig(density=1.0), optimizer=dgc.AdamW, **adam)
    theirs = DistributedDataParallel(Given(SHAPES), bucket_cap_mb=0.05)
    optimizer = torch.optim.AdamW(theirs.parameters(), **adam)
    for step in range(20):
        g = normals(SHAPES, seed_of(step, rank))
        ours.train(g)
        optimizer.zero_grad()
        theirs(g).backward()
        optimizer.step()
    return [(p.detach(), q.detach()) for p, q in zip(ours.net.parameters(), theirs.module.parameters(), strict=True)]


def test_density_one_is_torch_adamw_behind_ddp():
    for rank in run_ranks(2, compare_with_torch, {"lr": 1e-2}):
        for ours, theirs in rank:
            assert torch.equal(ours, theirs)


def resume(rank, world_size, folder):
    config = dgc.DGCConfig(density=0.008, warmup_steps=10, warmup_densities=(0.25, 0.05))
    straight, resumed = (Run(config, optimizer=dgc.AdamW, **ADAM) for _ in range(2))
    for step in range(16):
        straight.state.dense = step in (4, 5)
        straight.train(normals(SHAPES, seed_of(step, rank)))
        if step == 6:
            parts = {"model": straight.net, "optimizer": straight.optimizer, "dgc": straight.state}
            torch.save({key: part.state_dict() for key, part in parts.items()}, f"{folder}/{rank}.pt")
    saved = torch.load(f"{folder}/{rank}.pt", weights_only=True)
    resumed.net.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.state.load_state_dict(saved["dgc"])
    for step in range(7, 16):
        resumed.train(normals(SHAPES, seed_of(step, rank)))
    return straight.result(), resumed.result()


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_in_the_middle_of_warm_up_is_bit_exact(world_size, tmp_path):
    for straight, resumed in run_ranks(world_size, resume, str(tmp_path)):
        assert_resumed(straight, resumed, world_size)
        assert straight["step"] == resumed["step"] == 16
