"""Activation recomputation, torch.utils.checkpoint: the bits of the run without it, under DDP and Horovod."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dgc
from support.ddp_run import Run
from support.ranks import run_ranks
from support.training import assert_replicas_equal

CONFIG = dgc.DGCConfig(density=0.01, dense_below=1000, warmup_steps=3, warmup_densities=(0.25,))


class Blocks(nn.Module):
    """Three blocks with dropout, whose activations are computed again in the backward pass where this is asked for."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(20, 150)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(150, 150), nn.Dropout(0.2), nn.Tanh()) for _ in range(3))
        self.reentrant, self.runs = reentrant, 0
        self.blocks[1].register_forward_pre_hook(self.count)

    def count(self, module, inputs):
        self.runs += 1

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x.square().mean(1)


def train(run, rank):
    torch.manual_seed(rank)
    for _ in range(8):
        run.train(torch.randn(4, 20))
    return {**run.result(), "runs": run.net.runs}


def under_ddp(rank, world_size, static):
    ddp = {"static_graph": static, "bucket_cap_mb": 0.1}
    return [train(Run(CONFIG, module=Blocks(how), ddp=ddp), rank) for how in (None, True, False)]


def assert_same(results):
    """Both kinds of recomputation have the bits of the run without, on every rank, and did recompute."""
    assert_replicas_equal([plain for plain, *_ in results])
    for plain, *others in results:
        assert plain["stats"].sent_density < 0.02
        assert plain["runs"] == 8
        for other in others:
            assert other["runs"] == 16
            for kind in ("parameters", "residual", "momentum"):
                assert plain[kind].keys() == other[kind].keys()
                for name, tensor in plain[kind].items():
                    assert torch.equal(tensor, other[kind][name]), (kind, name)


@pytest.mark.parametrize("static", [False, True])
def test_recomputation_has_the_same_bits_under_ddp(static):
    assert_same(run_ranks(2, under_ddp, static))


def under_horovod():
    from support.horovod_run import Run as HorovodRun
    from support.horovod_run import hvd

    return [train(HorovodRun(CONFIG, module=Blocks(how)), hvd.rank()) for how in (None, True, False)]


def test_recomputation_has_the_same_bits_under_horovod(horovod):
    pytest.importorskip("horovod.torch", reason="needs Horovod: ./launch/install_horovod.sh")
    assert_same(horovod(2, under_horovod))
