"""FSDP2 with DGC between nodes: its numbers against a simulation of islands, and its two promises."""

import numpy as np
import pytest
import torch

import dgc
from support.ddp_run import Run
from support.fsdp_run import IslandRun, whole
from support.models import Given, integers, normals
from support.oracle import Oracle
from support.oracle_adam import AdamOracle
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, assert_replicas_equal, seed_of

STEPS = 6
ODD = {**SHAPES, "f": (1, 20000), "g": (3, 6000)}
"""With a parameter of one row, of which a second rank holds nothing, and one of three rows."""
CONFIG = dgc.DGCConfig(density=0.008, clip_norm=60.0, momentum_masking=False)


def train(rank, world_size, places, optimizer, settings, shapes, make, options):
    run = IslandRun(places, CONFIG, shapes, optimizer=optimizer, **settings, **options)
    for step in range(STEPS):
        run.train(make(shapes, seed_of(step, rank)))
    return run.result()


def piece(array, place, places):
    """Returns a place's rows of a parameter, flat, by the rule of fully_shard: ceil(rows / places) each."""
    each = -(-len(array) // places)
    return np.asarray(array[place * each : (place + 1) * each], dtype=np.float64).ravel()


def islands(oracle, nodes, places, shapes, large, **settings):
    """Replays islands: each node is a worker with the mean of its ranks' gradients, and selects in each piece alone."""
    start = {n: p.detach().numpy() for n, p in Given(shapes).named_parameters()}
    parts = {(n, i): piece(p, i, places) for n, p in start.items() for i in range(places)}
    compressed = {(n, i) for n, i in parts if n in large and parts[n, i].size}
    one = oracle(parts, nodes, compressed, clip_norm=60.0, **settings)
    for step in range(STEPS):
        gradients = []
        for node in range(nodes):
            ranks = [normals(shapes, seed_of(step, node * places + i)) for i in range(places)]
            mean = {n: sum(g[n].double().numpy() for g in ranks) / places for n in shapes}
            gradients.append({(n, i): piece(mean[n], i, places) for n, i in parts})
        one.step(gradients, 0.008, *([False] if oracle is Oracle else []))  # without masking
    return one


@pytest.mark.parametrize(("nodes", "places", "shapes"), [(2, 2, ODD), (3, 1, SHAPES), (1, 2, SHAPES)])
def test_sgd_follows_the_simulation_of_islands(nodes, places, shapes):
    settings = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}
    results = run_ranks(nodes * places, train, places, dgc.SGD, settings, shapes, normals, {})
    large = LARGE | ({"f", "g"} & shapes.keys())
    expected = islands(Oracle, nodes, places, shapes, large, **settings)
    check(results, expected, nodes, places, shapes, {"residual": expected.v, "momentum": expected.u}, large)


def test_adamw_follows_the_simulation_of_islands():
    settings = {"lr": 0.01, "weight_decay": 0.1, "eps": 0.3}  # a small eps makes first steps of lr everywhere: ties
    results = run_ranks(4, train, 2, dgc.AdamW, settings, SHAPES, normals, {})
    expected = islands(AdamOracle, 2, 2, SHAPES, LARGE, **settings)
    kept = {"residual": expected.v, "exp_avg": expected.m, "exp_avg_sq": expected.s}
    check(results, expected, 2, 2, SHAPES, kept, LARGE)


def check(results, expected, nodes, places, shapes, kept, large):
    assert_replicas_equal(results)
    for name in shapes:
        parts = np.concatenate([expected.p[name, i] for i in range(places)])
        found = results[0]["parameters"][name].double().numpy().ravel()
        assert np.linalg.norm(found - parts) <= 1e-5 * np.linalg.norm(parts), name
        if name not in large:
            continue
        for kind, by_node in kept.items():
            for node, tensor in enumerate(whole(results, nodes, places, kind, name)):
                parts = np.concatenate([by_node[node][name, i] for i in range(places)])
                error = np.linalg.norm(tensor.double().numpy() - parts)
                assert error <= 1e-5 * np.linalg.norm(parts), (kind, node, name)


def flat(rank, world_size):
    run = Run(CONFIG, lr=0.1)
    for step in range(STEPS):
        run.train(normals(SHAPES, seed_of(step, rank)))
    return run.result()


def test_nodes_of_one_rank_have_the_bits_of_ddp():
    results = run_ranks(2, train, 1, dgc.SGD, {"lr": 0.1}, SHAPES, normals, {})
    for island, ddp in zip(results, run_ranks(2, flat), strict=True):
        for kind in ("parameters", "residual", "momentum"):
            for name, tensor in ddp[kind].items():
                assert torch.equal(island[kind][name].flatten(), tensor.flatten()), (kind, name)


def test_what_moved_and_what_waits_is_every_gradient_there_was():
    results = run_ranks(4, conserve, [])
    assert_replicas_equal(results)
    check_conserved(results, lambda step: True)


def test_what_one_rank_finds_all_ranks_of_all_nodes_leave_out():
    results = run_ranks(4, conserve, [2, 3])
    assert_replicas_equal(results)
    assert [r["stats"].skipped for r in results] == [2, 2, 2, 2]
    assert [r["step"] for r in results] == [STEPS - 2] * 4
    check_conserved(results, lambda step: step not in (2, 3))


def conserve(rank, world_size, bad):
    """In the bad steps one rank's gradient has an infinity, which only its node's second rank gets to hold."""
    config = dgc.DGCConfig(density=0.008, on_nonfinite="skip")
    run = IslandRun(2, config, lr=0.25, momentum=0.0)
    for step in range(STEPS):
        gradients = integers(SHAPES, seed_of(step, rank))
        if step in bad and rank == 2:
            gradients["e"][-1, -1] = torch.inf
        run.train(gradients)
    return run.result()


def check_conserved(results, applied):
    start = dict(Given(SHAPES).named_parameters())
    for name in LARGE:
        waiting = sum(whole(results, 2, 2, "residual", name)) / 2
        moved = (start[name].detach() - results[0]["parameters"][name]).flatten() / 0.25
        total = sum(integers(SHAPES, seed_of(s, r))[name].flatten() for s in range(STEPS) for r in range(4)) / 4
        there = moved + waiting
        if name == "e":  # its last element was infinite on one rank, whose node left the others' out with it
            there, total = there[:-1], total[:-1]
        assert torch.equal(there, total), name


@pytest.mark.parametrize("settings", [{"lr": 0.1}, {"lr": 0.1, "bucket_cap_mb": 25}])
def test_exchange_in_step_has_the_bits_of_exchange_in_backward(settings):
    hooks = run_ranks(4, train, 2, dgc.SGD, settings, SHAPES, normals, {})
    in_step = run_ranks(4, train, 2, dgc.SGD, settings, SHAPES, normals, {"in_step": True})
    for one, other in zip(hooks, in_step, strict=True):
        for kind in ("parameters", "residual", "momentum"):
            assert all(torch.equal(tensor, other[kind][name]) for name, tensor in one[kind].items())


def test_memory_is_that_of_the_shard_and_bytes_are_those_between_nodes():
    results = run_ranks(4, train, 2, dgc.SGD, {"lr": 0.1}, SHAPES, normals, {})
    ddp = run_ranks(2, flat)
    for result in results:
        for kind in ("residual", "momentum"):
            elements = sum(t.numel() for t in result[kind].values())
            assert elements == sum(t.numel() for t in ddp[0][kind].values()) / 2
        # Half the entries, on each of a node's two ranks, but for headers: as many bytes on its link as one flat rank.
        assert result["stats"].bytes_sent < 0.55 * ddp[0]["stats"].bytes_sent
