"""A run behind DDP on one gloo rank: model, optimizer and state, and how one step goes."""

import dataclasses

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dgc
from support.models import Given

WIDE = {"a": (200, 100), "b": (130, 130), "bias": (50,)}
CONFIG = dgc.DGCConfig(density=0.01, dense_below=1000)
DROPPABLE = dataclasses.replace(CONFIG, droppable=True)


def one(config=CONFIG, shapes=WIDE, optimizer=dgc.SGD, module=None, ddp=None, late=None, **sgd):
    """Returns a DDP model, its optimizer and the state registered on it."""
    model = DistributedDataParallel(Given(shapes) if module is None else module, **(ddp or {}))
    sgd = sgd or {"lr": 0.5, "momentum": 0.5}
    optimizer = optimizer(model.parameters(), **sgd)
    state = dgc.DGCState(model.named_parameters(), optimizer, config, late=late)
    state.register(model)
    return model, optimizer, state


def step(model, optimizer, gradients, between=lambda: None):
    optimizer.zero_grad()
    model(gradients).backward()
    between()
    optimizer.step()


def memory_of(state):
    return state.memory.residual.clone(), None if state.memory.momentum is None else state.memory.momentum.clone()


def assert_same(one, other):
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Head(nn.Module):
    """Forward uses "extra" only where it is there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.top = nn.Linear(100, 100), nn.Linear(100, 100)

    def forward(self, x):
        return self.top(self.body(x)).square().mean()
