"""DDP with nodes as workers, used wrongly, and bytes that are damaged."""

import os
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import dgc
from dgc.ops import wire
from support.messages import Messages, error_of
from support.models import integers
from support.node_run import NodeRun
from support.ranks import run_ranks
from support.training import SHAPES, seed_of

CONFIG = dgc.DGCConfig(density=0.01, momentum_masking=False)
SETTINGS = {"lr": 0.25, "momentum": 0.5}


def misuse(rank, world_size):
    messages = Messages()
    run = NodeRun(2, CONFIG, **SETTINGS)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    three = init_device_mesh("cpu", (4,))

    def state(**options):
        net = nn.Linear(200, 200)
        return dgc.DGCState(net.named_parameters(), dgc.SGD(net.parameters(), lr=0.1), CONFIG, **options)

    def dense():
        run.state.dense = True

    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = "2", str(rank % 2)
    found = {
        "one dimension": error_of(lambda: state(mesh=three)),
        "a word": error_of(lambda: state(mesh="nodes")),
        "both": error_of(lambda: state(mesh=mesh, process_group=mesh.get_group(0))),
        "dense": error_of(dense),
        "auto": repr(state(mesh="auto")._standing.own_exchange.topology),
    }
    os.environ["LOCAL_WORLD_SIZE"] = "4" if rank else "2"
    found["sizes differ"] = error_of(lambda: state(mesh="auto"))
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = "4", str(rank)
    found["one node"] = repr(state(mesh="auto")._standing.own_exchange.topology)
    return found, messages.lines


def test_each_wrong_use_says_what_to_write():
    expected = {
        "one dimension": ["ValueError", "expected two dimensions", "got 1"],
        "a word": ["ValueError", '"auto"', "'nodes'"],
        "both": ["ValueError", "process_group: expected None with mesh"],
        "dense": ["RuntimeError", "set_density(1.0)"],
        "auto": ["rows=2", "places=2"],
        "sizes differ": ["ValueError", "nodes of one size", "2/0, 4/1"],
        "one node": ["rows=4", "places=1"],
    }
    results = run_ranks(4, misuse)
    for found, _ in results:
        for case, parts in expected.items():
            assert all(part in found[case] for part in parts), (case, found[case])
    assert any("finds one node: each rank is a worker of its own" in line for line in results[0][1])


def on_two_machines(rank, world_size):
    messages = Messages()
    swapped, right = ("ab"[rank % 2], "ab"[rank // 2])
    for host in (swapped, right):
        with mock.patch("socket.gethostname", return_value=host):
            NodeRun(2, CONFIG)
    return [line for line in messages.lines if "swapped" in line]


def test_nodes_that_lie_across_machines_are_noticed():
    first, *others = run_ranks(4, on_two_machines)
    assert len(first) == 1
    assert "a node of ranks on a, b averages densely between machines" in first[0]
    assert others == [[]] * 3


def damaged(rank, world_size, where):
    """A payload is damaged between the nodes, or inside one."""
    run = NodeRun(2, CONFIG, lr=0.25, momentum=0.0)
    exchange = run.state.exchange
    start, gather = exchange.start, exchange.gather_in_node

    def started(name, payload, gathered, dense):
        if where == "between" and rank == 3 and payload is not None:
            payload = payload.clone()
            wire.header(payload)[0] += 1
        return start(name, payload, gathered, dense)

    def passed_on(name, own):
        if where == "inside" and rank == 3:
            own[8] += 1
        return gather(name, own)

    exchange.start, exchange.gather_in_node = started, passed_on
    run.ddp(integers(SHAPES, seed_of(0, rank))).backward()
    before = {n: p.detach().clone() for n, p in run.net.named_parameters()}
    error = error_of(run.optimizer.step)
    return error, all(torch.equal(p, before[n]) for n, p in run.net.named_parameters())


@pytest.mark.parametrize(("where", "who"), [("between", range(4)), ("inside", (2, 3))])
def test_damaged_bytes_are_an_error_on_all_ranks_of_the_node(where, who):
    results = run_ranks(4, damaged, where)
    for rank in who:
        error, unchanged = results[rank]
        assert error.startswith("PayloadError: payload"), (rank, error)
        assert unchanged
