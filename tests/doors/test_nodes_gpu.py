"""Nodes as workers on GPUs over NCCL: the numbers of the same run on CPUs. It needs four GPUs, one for each rank."""

import pytest
import torch

import dgc
from support.fsdp_run import IslandRun
from support.models import normals
from support.node_run import NodeRun
from support.ranks import run_ranks
from support.training import SHAPES, assert_replicas_equal, seed_of

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 4, reason=f"needs 4 GPUs, one for each rank, got {torch.cuda.device_count()}"
)


def train(rank, world_size, kind, on_gpu):
    device = f"cuda:{rank}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(rank)
    run = kind(2, dgc.DGCConfig(density=0.008, clip_norm=60.0), device=device, lr=0.1)
    for step in range(6):
        run.train({name: g.to(device) for name, g in normals(SHAPES, seed_of(step, rank)).items()})
    run.state.state_dict()  # reads the late verdict
    return {"parameters": {name: p.cpu() for name, p in run.result()["parameters"].items()}}


@pytest.mark.parametrize("kind", [NodeRun, IslandRun])
def test_on_gpus_the_numbers_are_those_on_cpus(kind):
    gpus = run_ranks(4, train, kind, True, backend="nccl")
    assert_replicas_equal(gpus)
    for name, p in run_ranks(4, train, kind, False)[0]["parameters"].items():
        torch.testing.assert_close(gpus[0]["parameters"][name], p, rtol=1e-5, atol=1e-5)
