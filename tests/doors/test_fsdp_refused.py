"""FSDP2 with DGC, used wrongly, and what one rank of one node does to the others."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import dgc
from dgc.ops import wire
from support.fsdp_run import IslandRun
from support.messages import error_of
from support.models import Given, integers
from support.ranks import run_ranks
from support.training import SHAPES, assert_replicas_equal, seed_of


def build(mesh, dims, group, net=None, **options):
    """Makes a sharded model and its state, registered."""
    net = Given(SHAPES) if net is None else net
    fully_shard(net, mesh=mesh if dims is None else mesh[dims], **options)
    state = dgc.DGCState(net.named_parameters(), dgc.SGD(net.parameters(), lr=0.1), process_group=group)
    state.register(net)
    return net, state


def misuse(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    across, node = mesh["replicate"].get_group(), mesh["shard"].get_group()
    net, state = build(mesh, "shard", across)
    again = dgc.DGCState(net.named_parameters(), dgc.SGD(net.parameters(), lr=0.1), process_group=across)
    half = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(half[0], mesh=mesh["shard"])
    odd = Given(SHAPES, seed=rank // 2)  # nodes that start from other weights

    def partly():
        fully_shard(half, mesh=mesh["shard"], ignored_params=set(half[1].parameters()))
        dgc.DGCState(half.named_parameters(), dgc.SGD(half.parameters(), lr=0.1), process_group=across).register(half)

    def optimizer_made_before():
        net = Given(SHAPES)
        optimizer = dgc.SGD(net.parameters(), lr=0.1)
        fully_shard(net, mesh=mesh["shard"])
        dgc.DGCState(net.named_parameters(), optimizer, process_group=across)

    def by_columns(p):
        return Shard(1) if p.ndim == 2 else None

    return {
        "HSDP": error_of(lambda: build(mesh, None, across)),
        "no group": error_of(lambda: build(mesh, "shard", None)),
        "the node's group": error_of(lambda: build(mesh, "shard", node)),
        "columns": error_of(lambda: build(mesh, "shard", across, shard_placement_fn=by_columns)),
        "ignored": error_of(partly),
        "twice": error_of(lambda: again.register(net)),
        "twice, one state": error_of(lambda: state.register(net)),
        "other weights": error_of(lambda: build(mesh, "shard", across, odd)),
        "optimizer made before": error_of(optimizer_made_before),
        "foreign parameter": error_of(
            lambda: dgc.DGCState(
                list(net.named_parameters())[:1],
                dgc.SGD([dict(net.named_parameters())["a"]], lr=0.1),
                process_group=across,
            ).register(net)
        ),
    }


def test_each_wrong_use_says_what_to_write():
    expected = {
        "HSDP": ["TypeError", "a", 'fully_shard(module, mesh=mesh["shard"])', "DGCState(..., mesh=mesh)"],
        "no group": ["ValueError", "mesh: expected", "got None", "pass mesh=mesh"],
        "the node's group": ["ValueError", "hold other shards", 'mesh["replicate"].get_group()'],
        "columns": ["TypeError", "expected a parameter sharded over its first dimension"],
        "ignored": ["ValueError", "1.weight", "without ignored_params"],
        "twice": ["ValueError", "got a, b, c, d, e", "Build the model anew"],
        "twice, one state": ["ValueError", "got a, b, c, d, e", "Build the model anew"],
        "other weights": ["ValueError", "equal weights", "others on rank 2 than on the first", "Seed all ranks alike"],
        "optimizer made before": ["ValueError", "holds none of its parameters (a, ...)", "as fully_shard does"],
        "foreign parameter": ["ValueError", "not of b, c, d, e"],
    }
    for found in run_ranks(4, misuse):
        for case, parts in expected.items():
            assert all(part in found[case] for part in parts), (case, found[case])


def passes(rank, world_size):
    run = IslandRun(2, dgc.DGCConfig(density=0.01), lr=0.25)
    gradients = integers(SHAPES, seed_of(0, rank))
    run.backward(gradients)
    second = error_of(lambda: run.backward(gradients))
    run.optimizer.step()
    return second, run.state.residual_norm > 0


def test_a_second_pass_before_step_says_how_to_accumulate():
    for second, waits in run_ranks(4, passes):
        assert "no_sync()" in second
        assert waits


def damaged(rank, world_size):
    run = IslandRun(2, dgc.DGCConfig(density=0.01), lr=0.25, momentum=0.0)
    start = run.state.exchange.start

    def started(name, payload, gathered, dense):
        if rank == 3 and payload is not None:
            payload = payload.clone()
            wire.header(payload)[0] += 1
        return start(name, payload, gathered, dense)

    run.state.exchange.start = started
    run.backward(integers(SHAPES, seed_of(0, rank)))
    error = error_of(run.optimizer.step)
    return error, {n: p.full_tensor() for n, p in run.net.named_parameters()}


def test_bytes_that_do_not_fit_in_one_shard_stop_all_ranks_with_the_same_words():
    start = dict(Given(SHAPES).named_parameters())
    errors = set()
    for error, parameters in run_ranks(4, damaged):
        assert error.startswith("PayloadError: payload of rank 1")
        errors.add(error)
        assert all(torch.equal(p, start[name]) for name, p in parameters.items())
    assert len(errors) == 1


def die(rank, world_size, folder):
    run = IslandRun(2, dgc.DGCConfig(density=0.01), lr=0.25, momentum=0.0)
    run.train(integers(SHAPES, seed_of(0, rank)))
    if rank == 3:
        os._exit(0)  # with 0, so that run_ranks() lets the others go on

    def go_on():
        for step in range(1, 3):
            run.train(integers(SHAPES, seed_of(step, rank)))

    Path(folder, str(rank)).write_text(error_of(go_on))


def test_a_rank_that_dies_is_an_error_on_all_ranks_of_all_nodes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"3\.pt"):  # the dead rank has returned nothing
        run_ranks(4, die, str(tmp_path), timeout=20)
    for rank in range(3):
        assert (tmp_path / str(rank)).read_text().startswith("RuntimeError"), rank


def not_finite(rank, world_size):
    config = dgc.DGCConfig(density=0.01, on_nonfinite="raise")
    run = IslandRun(2, config, lr=0.25, momentum=0.0)
    gradients = integers(SHAPES, seed_of(0, rank))
    if rank == 0:
        gradients["a"][0, 0] = torch.nan
    run.backward(gradients)
    error = error_of(run.optimizer.step)
    run.train(integers(SHAPES, seed_of(1, rank)))
    return error, run.result()


def test_a_gradient_that_is_not_finite_is_an_error_on_all_ranks_and_they_go_on_alike():
    results = run_ranks(4, not_finite)
    assert_replicas_equal([result for _, result in results])
    assert all("FloatingPointError" in error and "a on rank 0" in error for error, _ in results)
