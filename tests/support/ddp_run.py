"""A run behind DDP on one of several gloo ranks, whose gradients the test chooses."""

import torch
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.models import Given
from support.training import SHAPES, outcome, seed_of


class Run:
    """One rank's model, optimizer and state behind DDP."""

    def __init__(
        self,
        config=None,
        shapes=SHAPES,
        module=None,
        dtype=torch.float32,
        ddp=None,
        state=None,
        optimizer=dgc.SGD,
        device="cpu",
        **settings,
    ):
        self.config = config or dgc.DGCConfig(density=0.008)
        self.net = (Given(shapes, dtype=dtype) if module is None else module).to(device)
        self.wrapping = {"bucket_cap_mb": 0.05, **(ddp or {})}
        self.ddp = DistributedDataParallel(self.net, **self.wrapping)
        defaults = {"lr": 0.5, "momentum": 0.5} if optimizer is dgc.SGD else {}
        self.optimizer = optimizer(self.ddp.parameters(), **{**defaults, **settings})
        self.state = dgc.DGCState(self.ddp.named_parameters(), self.optimizer, self.config, **(state or {}))
        self.state.register(self.ddp)

    def train(self, *inputs):
        self.optimizer.zero_grad()
        self.ddp(*inputs).sum().backward()
        self.optimizer.step()

    def rebind(self, optimizer=None, **back):
        self.ddp = None  # the old one has to be gone
        self.ddp = DistributedDataParallel(self.net, **self.wrapping)
        left = self.state.rebind(self.ddp, optimizer, **back)
        self.optimizer = optimizer or self.optimizer
        return left

    def result(self):
        return outcome(self.net, self.state)


def train_given(rank, world_size, steps, make, kwargs, dense=()):
    """Trains; state.dense is on in the steps of `dense`."""
    run = Run(**kwargs)
    for step in range(steps):
        run.state.dense = step in dense
        run.train(make(SHAPES, seed_of(step, rank)))
    return run.result()
