"""A training run on several ranks whose gradients the test chooses, and what is expected of it; for every framework."""

import numpy as np
import torch

from support.models import Given
from support.oracle import Oracle
from support.oracle_adam import AdamOracle

# Several buckets of 0.05 MB; the second dimension and the sizes decide what is compressed.
SHAPES = {"a": (200, 100), "b": (100,), "c": (130, 130), "d": (60, 20), "e": (260, 260)}
LARGE = {"a", "c", "e"}
MOMENTS = ("exp_avg", "exp_avg_sq")


def outcome(net, state):
    """Returns what one rank has at the end."""
    memory = state.memory
    momentum = {} if memory.momentum is None else {n: memory.momentum_of(n).clone() for n in memory.slots}
    return {
        "parameters": {n: p.detach().clone() for n, p in net.named_parameters()},
        "residual": {n: memory.residual_of(n).clone() for n in memory.compressed},
        "momentum": momentum,
        **{kind: {n: memory.of(n)[kind].clone() for n in memory.slots} for kind in memory.kinds if kind in MOMENTS},
        "stats": state.stats,
        "step": state.step,
    }


def seed_of(step, rank):
    return 1000 * step + rank


def kinds_of(result):
    return [kind for kind in ("parameters", "residual", "momentum", *MOMENTS) if kind in result]


def assert_replicas_equal(results):
    for other in results[1:]:
        for name, p in results[0]["parameters"].items():
            assert torch.equal(p, other["parameters"][name]), name


def assert_same(results, others):
    """Ranks have the same bits in all that they keep."""
    for one, other in zip(results, others, strict=True):
        for kind in kinds_of(one):
            assert all(torch.equal(t, other[kind][name]) for name, t in one[kind].items()), kind


def assert_resumed(straight, resumed, world_size):
    """A resumed run has the bits of one that went straight on, as far as DDP's buckets let it."""
    for kind in kinds_of(straight):
        for name, tensor in straight[kind].items():
            # A fresh DDP starts with other buckets, and with three ranks the ring adds in another order.
            if world_size < 3 or name in LARGE:
                assert torch.equal(tensor, resumed[kind][name]), (kind, name)
            else:
                torch.testing.assert_close(tensor, resumed[kind][name])


def oracle_for(world_size, steps, make, densities, masking, start=None, **kwargs):
    start = start or {n: p.detach().numpy() for n, p in Given(SHAPES).named_parameters()}
    oracle = Oracle(start, world_size, LARGE, **{"lr": 0.5, "momentum": 0.5, **kwargs})
    for step in range(steps):
        gradients = [{n: g.numpy() for n, g in make(SHAPES, seed_of(step, rank)).items()} for rank in range(world_size)]
        oracle.step(gradients, densities(step), masking(step))
    return oracle


def assert_close_to(oracle, results, tolerance):
    for rank, result in enumerate(results):
        for kind, expected in (("parameters", oracle.p), ("residual", oracle.v[rank]), ("momentum", oracle.u[rank])):
            for name, tensor in result[kind].items():
                reference = oracle.dense_u[name] if kind == "momentum" and name not in LARGE else expected[name]
                error = np.linalg.norm(tensor.double().numpy().ravel() - reference)
                assert error <= tolerance * max(1.0, np.linalg.norm(reference)), (rank, kind, name, error)


def adam_oracle_for(world_size, steps, make, densities, dense=lambda step: False, **kwargs):
    """Replays a run."""
    start = {n: p.detach().numpy() for n, p in Given(SHAPES).named_parameters()}
    oracle = AdamOracle(start, world_size, LARGE, **kwargs)
    for step in range(steps):
        gradients = [{n: g.numpy() for n, g in make(SHAPES, seed_of(step, rank)).items()} for rank in range(world_size)]
        oracle.step(gradients, densities(step), dense(step))
    return oracle


def assert_close_to_adam(oracle, results, tolerance):
    """Compares with the oracle to a share of what there is, or of one step of lr where there is nothing."""
    for rank, result in enumerate(results):
        expected = {
            "parameters": oracle.p,
            "residual": oracle.v[rank],
            "exp_avg": oracle.m[rank],
            "exp_avg_sq": oracle.s[rank],
        }
        for kind, references in expected.items():
            for name, tensor in result[kind].items():
                error = np.linalg.norm(tensor.double().numpy().ravel() - references[name])
                assert error <= tolerance * max(oracle.lr, np.linalg.norm(references[name])), (rank, kind, name, error)


def assert_equal(results, others, dense_too=True):
    for one, other in zip(results, others, strict=True):
        for kind in kinds_of(one):
            assert one[kind].keys() == other[kind].keys()
            for name, tensor in one[kind].items():
                if dense_too or name in LARGE:
                    assert torch.equal(tensor, other[kind][name]), (kind, name)
                else:
                    torch.testing.assert_close(tensor, other[kind][name])


def assert_conserved(results, factor=8):
    """What has moved the parameters, and what still waits, is every finite gradient there was."""
    assert_replicas_equal(results)
    for name in LARGE:
        moved = Given(SHAPES).get_parameter(name).detach() - results[0]["parameters"][name]
        total = sum(r["total"][name] for r in results)
        assert torch.equal(factor * moved + sum(r["residual"][name] for r in results), total), name
