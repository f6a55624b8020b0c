"""DDP with nodes as workers: its numbers against FSDP2's and a flat exchange's, and its two promises."""

import pytest
import torch

import dgc
from support.ddp_run import Run
from support.fsdp_run import IslandRun, whole
from support.models import Given, integers, normals
from support.node_run import NodeRun
from support.ranks import run_ranks
from support.training import LARGE, SHAPES, assert_replicas_equal, seed_of

STEPS = 6
ODD = {**SHAPES, "f": (1, 20000), "g": (3, 6000), "h": (2, 3, 4)}
CONFIG = dgc.DGCConfig(density=0.008, clip_norm=60.0, momentum_masking=False)
KINDS = ("parameters", "residual", "momentum", "exp_avg", "exp_avg_sq")


def train(rank, world_size, kind, places, optimizer, settings, config=CONFIG):
    run = kind(places, config, ODD, optimizer=optimizer, **settings)
    for step in range(STEPS):
        run.train(normals(ODD, seed_of(step, rank)))
    return run.result()


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(dgc.SGD, {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 0.01}), (dgc.AdamW, {"lr": 0.01})],
)
def test_the_same_numbers_as_fsdp2(optimizer, settings):
    """FSDP2 itself is compared with a simulation of islands in test_fsdp_numbers.py."""
    ddp = run_ranks(4, train, NodeRun, 2, optimizer, settings)
    fsdp = run_ranks(4, train, IslandRun, 2, optimizer, settings)
    assert_replicas_equal(ddp)
    for one, other in zip(ddp, fsdp, strict=True):
        assert one["step"] == other["step"] == STEPS
        for kind in KINDS:
            for name, tensor in one.get(kind, {}).items():
                large = name in LARGE | {"f", "g"}
                expected = other[kind][name].flatten()
                if kind == "parameters" or large:
                    torch.testing.assert_close(tensor.flatten(), expected, rtol=1e-6, atol=1e-6)


def halves(shapes):
    """Returns the shapes of the rows that each of two ranks gets, as parameters of their own."""
    return {f"{n}{i}": (shape[0] // 2, *shape[1:]) for n, shape in shapes.items() for i in range(2)}


def flat(rank, world_size):
    """Two ranks that exchange flatly, whose parameters are the halves of the others'."""
    run = Run(dgc.DGCConfig(density=0.008, dense_below=600), halves(SHAPES), lr=0.25)
    start = dict(Given(SHAPES).named_parameters())
    with torch.no_grad():
        for name, p in run.net.named_parameters():
            p.copy_(start[name[0]].chunk(2)[int(name[-1])])
    for step in range(STEPS):
        g = normals(SHAPES, seed_of(step, rank))
        run.train({f"{n}{i}": half for n in SHAPES for i, half in enumerate(g[n].chunk(2))})
    return run.result()


def alike(rank, world_size):
    """The ranks of a node have equal gradients."""
    run = NodeRun(2, dgc.DGCConfig(density=0.008, dense_below=1200), lr=0.25)
    for step in range(STEPS):
        run.train(normals(SHAPES, seed_of(step, rank // 2)))
    return run.result()


def test_nodes_of_equal_gradients_have_the_bits_of_flat_ranks():
    nodes, ranks = run_ranks(4, alike), run_ranks(2, flat)
    for rank, node in enumerate(nodes):
        theirs = ranks[rank // 2]
        for name in SHAPES:
            both = [theirs["parameters"][f"{name}{i}"] for i in range(2)]
            assert torch.equal(node["parameters"][name], torch.cat(both)), name
        for kind in ("residual", "momentum"):
            for name in LARGE | {"d"}:
                assert torch.equal(node[kind][name], theirs[kind][f"{name}{rank % 2}"].flatten()), (kind, name)


def conserve(rank, world_size, places, bad, dtype):
    config = dgc.DGCConfig(density=0.008, on_nonfinite="skip", wire_dtype=dtype)
    run = NodeRun(places, config, ODD, lr=0.25, momentum=0.0)
    for step in range(STEPS):
        gradients = integers(ODD, seed_of(step, rank))
        if step in bad and rank == world_size - 1:
            gradients["e"][-1, -1] = torch.inf
        run.train(gradients)
    return run.result()


@pytest.mark.parametrize(("ranks", "places", "bad"), [(4, 2, []), (4, 2, [1, 4]), (6, 3, [])])
def test_what_moved_and_what_waits_is_every_gradient_there_was(ranks, places, bad):
    results = run_ranks(ranks, conserve, places, bad, torch.float32)
    assert_replicas_equal(results)
    assert [r["stats"].skipped for r in results] == [len(bad)] * ranks
    start, nodes = dict(Given(ODD).named_parameters()), ranks // places
    for name in LARGE | {"f", "g"}:
        waiting = sum(whole(results, nodes, places, "residual", name)) / nodes
        moved = (start[name].detach() - results[0]["parameters"][name]).flatten() / 0.25
        total = sum(integers(ODD, seed_of(s, r))[name].flatten() for s in range(STEPS) for r in range(ranks)) / ranks
        there = moved + waiting
        if name == "e" and bad:
            there, total = there[:-1], total[:-1]
        if places == 2:
            assert torch.equal(there, total), name
        else:  # thirds are not exact
            torch.testing.assert_close(there, total, rtol=1e-5, atol=1e-4)


def test_memory_is_divided_and_what_leaves_a_node_is_a_quarter():
    config = dgc.DGCConfig(density=0.05)
    nodes = run_ranks(4, train, NodeRun, 2, dgc.SGD, {"lr": 0.1}, config)
    ranks = run_ranks(4, train_flat, config)
    for result in nodes:
        for kind in ("residual", "momentum"):
            for name in ("a", "c", "e"):
                assert 2 * result[kind][name].numel() == ranks[0][kind][name].numel()
    dense = 4 * sum(Given(ODD).get_parameter(name).numel() for name in ("b", "d", "h"))
    payload = (ranks[0]["stats"].bytes_sent - 2 * 3 * dense // 4) / 3
    # Each of a node's ranks sends half a payload to one rank, and half of the dense gradients. Flat, each of them sends
    # a payload to both ranks of the other node.
    sent = sum(r["stats"].bytes_sent for r in nodes[:2]) - dense
    assert 0.24 * 4 * payload < sent < 0.27 * 4 * payload
    assert nodes[0]["stats"].bytes_in_node > 0
    assert ranks[0]["stats"].bytes_in_node == 0


def train_flat(rank, world_size, config):
    run = Run(config, ODD, lr=0.1)
    for step in range(STEPS):
        run.train(normals(ODD, seed_of(step, rank)))
    return run.result()
