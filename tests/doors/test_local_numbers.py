"""dgc.LocalSteps: its rounds against a simulation in float64, what is conserved, and the bits of plain training."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.fsdp_run import whole
from support.models import Given, integers, normals
from support.oracle_rounds import RoundOracle
from support.ranks import run_ranks
from support.round_run import RoundRun
from support.training import LARGE, SHAPES, assert_replicas_equal, seed_of

EVERY, STEPS = 3, 13  # four rounds, and one step that finish() exchanges
SCALE = 2.0**-10  # of the weights at the start: differences then keep the precision of a float32
INNER = 0.1
DENSITY = 0.008
CASES = {
    "averaging": {},
    "SparseLoCo": {"decay": 0.95},
    "half an average": {"decay": 0.9, "lr": 0.5},
    "DiLoCo": {"outer": "nesterov", "lr": 0.7, "momentum": 0.9},
    "delayed": {"decay": 0.95, "delay": 2},
    "DiLoCo, delayed": {"outer": "nesterov", "lr": 0.7, "momentum": 0.9, "delay": 1},
    "corrected": {"outer": "corrected", "lr": 0.7, "momentum": 0.9},
    "corrected and masked": {"outer": "corrected", "lr": 0.7, "momentum": 0.9, "masking": True, "decay": 0.95},
}


def outer_of(case):
    """Returns what a user writes for a case."""
    lr, momentum = case.get("lr", 1.0), case.get("momentum", 0.0)
    if case.get("outer") == "nesterov":
        return partial(dgc.OuterSGD, lr=lr, momentum=momentum)
    if case.get("outer") == "corrected":
        return partial(dgc.SGD, lr=lr, momentum=momentum, nesterov=True)
    return partial(dgc.SGD, lr=lr)


def config_of(case):
    return dgc.DGCConfig(
        density=DENSITY, residual_decay=case.get("decay", 1.0), momentum_masking=case.get("masking", False)
    )


def train(rank, world_size, names, inside=None, places=1):
    results = {}
    for name in names:
        case = CASES[name]
        local = {"outer": outer_of(case), "delay": case.get("delay", 0)}
        run = RoundRun(config_of(case), EVERY, inside, places, scale=SCALE, lr=INNER, local=local)
        for step in range(STEPS):
            run.train(normals(SHAPES, seed_of(step, rank)))
        before = run.result()
        arrived = STEPS // EVERY - (local["delay"] > STEPS % EVERY)
        assert (before["rounds"], before["position"]) == (arrived, STEPS % EVERY)
        run.local.finish()
        results[name] = run.result()
    return results


def piece(array, place, places):
    """Returns a place's rows of a parameter, flat, by the rule of fully_shard: ceil(rows / places) each."""
    each = -(-len(array) // places)
    return np.asarray(array[place * each : (place + 1) * each], dtype=np.float64).ravel()


def replay(name, islands, places=1):
    """Replays a case: the way of an island is the sum of its ranks' mean gradients; each piece is selected alone.

    A delay changes nothing where gradients do not depend on weights, since what was moved since is kept.
    """
    start = {n: p.detach().numpy() * SCALE for n, p in Given(SHAPES).named_parameters()}
    parts = {(n, i): piece(p, i, places) for n, p in start.items() for i in range(places)}
    compressed = {(n, i) for n, i in parts if n in LARGE}
    case = {key: value for key, value in CASES[name].items() if key != "delay"}
    oracle = RoundOracle(parts, islands, compressed, DENSITY, **case)
    for first in range(0, STEPS, EVERY):
        moved = []
        for island in range(islands):
            way = {n: np.zeros(SHAPES[n]) for n in SHAPES}
            for step in range(first, min(first + EVERY, STEPS)):
                for rank in range(island * places, (island + 1) * places):
                    for n, g in normals(SHAPES, seed_of(step, rank)).items():
                        way[n] += INNER * g.double().numpy() / places
            moved.append({(n, i): piece(way[n], i, places) for n, i in parts})
        oracle.round(moved)
    return oracle


def check(results, oracle, islands, places):
    assert_replicas_equal(results)
    for n in SHAPES:
        expected = np.concatenate([oracle.p[n, i] for i in range(places)])
        assert_close(results[0]["parameters"][n], expected, n)
        assert torch.equal(results[0]["parameters"][n], results[0]["start"][n])
        if n not in LARGE:
            continue
        kinds = {"residual": oracle.e, **({"momentum": oracle.u} if results[0]["momentum"] else {})}
        for kind, by_island in kinds.items():
            for island, tensor in enumerate(whole(results, islands, places, kind, n)):
                assert_close(
                    tensor, np.concatenate([by_island[island][n, i] for i in range(places)]), (kind, island, n)
                )


def assert_close(tensor, expected, what):
    error = np.linalg.norm(tensor.double().numpy().ravel() - expected)
    assert error <= 1e-5 * np.linalg.norm(expected), (what, error)


def test_rounds_follow_the_equations():
    results = run_ranks(3, train, [*CASES])
    for name in CASES:
        check([r[name] for r in results], replay(name, 3), 3, 1)
        assert results[0][name]["rounds"] == 5
        assert 0.99 * DENSITY < results[0][name]["stats"].sent_density < 1.02 * DENSITY


@pytest.mark.parametrize("inside", ["ddp", "fsdp"])
def test_islands_of_several_ranks_follow_the_equations(inside):
    names = ["SparseLoCo", "DiLoCo", "corrected and masked", "delayed"]
    results = run_ranks(4, train, names, inside, 2)
    for name in names:
        check([r[name] for r in results], replay(name, 2, 2), 2, 2)
    # Each rank keeps e of its own rows alone.
    assert sum(t.numel() for t in results[0]["DiLoCo"]["residual"].values()) == (100 * 100 + 65 * 130 + 130 * 260)


def conserve(rank, world_size, bad, on_nonfinite, delay=0):
    """Integer gradients; in the bad steps one island's gradient has a NaN, in a large parameter or in a dense one."""
    config = dgc.DGCConfig(density=DENSITY, on_nonfinite=on_nonfinite)
    run = RoundRun(config, EVERY, local={"delay": delay})
    errors = []
    for step in range(STEPS):
        gradients = integers(SHAPES, seed_of(step, rank))
        if rank == 1 and step in bad:
            gradients[bad[step]].view(-1)[-1] = torch.nan
        try:
            run.train(gradients)
        except FloatingPointError as error:
            errors.append(str(error))
    run.local.finish()
    return {**run.result(), "errors": errors}


def assert_conserved(results, lost=()):
    """What has moved theta_0, and what waits in e, are all steps there were.

    But for the last elements of `lost`, (name, steps) of island 1, which were not finite in these rounds.
    """
    assert_replicas_equal(results)
    start = dict(Given(SHAPES).named_parameters())
    for name in SHAPES:
        waiting = sum(r["residual"][name] for r in results) / 2 if name in LARGE else 0
        moved = (start[name].detach() - results[0]["start"][name]).flatten()
        total = sum(integers(SHAPES, seed_of(s, r))[name].flatten() for s in range(STEPS) for r in range(2)) / 2
        for which, steps in lost:
            if which == name:
                total[-1] -= sum(integers(SHAPES, seed_of(s, 1))[name].flatten()[-1] for s in steps) / 2
        assert torch.equal(moved + waiting, total), name


@pytest.mark.parametrize("delay", [0, 2])
def test_nothing_is_lost(delay):
    assert_conserved(run_ranks(2, conserve, {}, "raise", delay))


@pytest.mark.parametrize(("on_nonfinite", "delay"), [("skip", 0), ("raise", 0), ("raise", 1)])
def test_a_round_with_a_nan_is_left_out_on_all_islands(on_nonfinite, delay):
    results = run_ranks(2, conserve, {4: "e", 7: "b"}, on_nonfinite, delay)
    assert_conserved(results, [("e", range(3, 6 + delay)), ("b", range(3, 9 + delay))])  # b's of both rounds
    for result in results:
        assert (result["stats"].skipped, result["rounds"]) == (2, 5)
        assert len(result["errors"]) == (2 if on_nonfinite == "raise" else 0)
        for error, name in zip(result["errors"], ("e on rank 1", "dense parameters b"), strict=False):
            assert error.startswith("LocalSteps: round "), error
            assert name in error, error


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 5))


def batch(step, rank=0):
    generator = torch.Generator().manual_seed(seed_of(step, rank))
    x = torch.randn(32, 40, generator=generator)
    return x, x[:, :5].argmax(1)


def steps_of(net, optimizer, rank=0):
    for step in range(30):
        x, y = batch(step, rank)
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


SGD = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}
ALL = dgc.DGCConfig(density=1.0)


@pytest.mark.parametrize("every", [1, 4])
def test_one_island_that_sends_all_has_the_bits_of_its_own_optimizer(every, one_thread):
    net = network()
    expected = steps_of(net, torch.optim.SGD(net.parameters(), **SGD))
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    local = dgc.LocalSteps(net, optimizer, ALL, every=every)
    found = steps_of(net, optimizer)
    assert local.rounds == 30 // every
    assert all(map(torch.equal, found, expected))


def averaged(rank, world_size):
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)  # momentum would be each island's own
    dgc.LocalSteps(net, optimizer, ALL, every=1)
    found = steps_of(net, optimizer, rank)
    net = DistributedDataParallel(network())
    return found, steps_of(net, torch.optim.SGD(net.parameters(), lr=0.3), rank)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_round_at_every_step_that_sends_all_is_ddp_with_sgd(ranks):
    """To the bit on one rank, to rounding on two."""
    for found, expected in run_ranks(ranks, averaged):
        for one, other in zip(found, expected, strict=True):
            if ranks == 1:
                assert torch.equal(one, other)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def uneven(rank, world_size):
    run = RoundRun(dgc.DGCConfig(density=DENSITY), EVERY)
    for step in range(STEPS if rank == 0 else STEPS - 5):
        run.train(integers(SHAPES, seed_of(step, rank)))
    run.local.finish()
    return run.result()


def test_islands_that_took_fewer_steps_stay_until_all_have_finished():
    results = run_ranks(2, uneven)
    assert_replicas_equal(results)
    assert results[0]["rounds"] == results[1]["rounds"] == 5
    start = dict(Given(SHAPES).named_parameters())
    for name in SHAPES:
        waiting = sum(r["residual"][name] for r in results) / 2 if name in LARGE else 0
        moved = (start[name].detach() - results[0]["start"][name]).flatten()
        taken = [(s, r) for r in range(2) for s in range(STEPS - 5 * r)]
        assert torch.equal(moved + waiting, sum(integers(SHAPES, seed_of(*one))[name].flatten() for one in taken) / 2)


def bytes_of(rank, world_size, wire_dtype):
    """Bytes of a step by the state's own count, of a model whose matrices are large, and those of DDP's gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    config = dgc.DGCConfig(density=0.01, wire_dtype=wire_dtype)
    local = dgc.LocalSteps(net, inner, config, every=15)
    for _ in range(30):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        inner.step()
    return local.state.stats.total_bytes_sent / 30, local.state.stats.bytes_dense


@pytest.mark.parametrize(("wire_dtype", "times"), [("bfloat16", 1000), ("8bit", 2000)])
def test_a_step_sends_a_thousandth_of_ddp(wire_dtype, times):
    for sent, dense in run_ranks(2, bytes_of, wire_dtype):
        assert sent < dense / times
