"""A run behind Horovod in one of its processes, whose gradients the test chooses.

Without Horovod, files that import this are skipped.
"""

import pytest
import torch

import dgc
from support.models import Given
from support.training import SHAPES, outcome, seed_of

hvd = pytest.importorskip("horovod.torch", reason="needs Horovod: ./launch/install_horovod.sh")

import dgc.horovod as dgc_hvd  # noqa: E402


class Run:
    """One process's model and optimizer behind Horovod."""

    def __init__(
        self,
        config=None,
        shapes=SHAPES,
        module=None,
        dtype=torch.float32,
        horovod=None,
        cap=0.1,
        optimizer=dgc.SGD,
        **settings,
    ):
        self.net = Given(shapes, dtype=dtype) if module is None else module
        defaults = {"lr": 0.5, "momentum": 0.5} if optimizer is dgc.SGD else {}
        self.compressor = dgc_hvd.DGCCompressor(config or dgc.DGCConfig(density=0.008), bucket_cap_mb=cap)
        self.horovod = horovod or {}
        self.optimizer = self.wrapped(optimizer(self.net.parameters(), **{**defaults, **settings}))
        self.state = self.optimizer.dgc_state

    def wrapped(self, optimizer):
        return dgc_hvd.DistributedOptimizer(optimizer, self.net.named_parameters(), self.compressor, **self.horovod)

    def rebind(self, optimizer=None, **back):
        wrapped = None if optimizer is None else self.wrapped(optimizer)
        left = self.state.rebind(self.net, wrapped, **back)
        self.optimizer = wrapped or self.optimizer
        return left

    def train(self, *inputs):
        self.optimizer.zero_grad()
        self.net(*inputs).sum().backward()
        self.optimizer.step()

    def result(self):
        return outcome(self.net, self.state)


def train_given(steps, make, kwargs, dense=()):
    """Trains; state.dense is on in the steps of `dense`."""
    run = Run(**kwargs)
    for step in range(steps):
        run.state.dense = step in dense
        run.train(make(SHAPES, seed_of(step, hvd.rank())))
    return run.result()
