"""One rank without DDP: hands .grad tensors to DGCState as a framework would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import dgc
from dgc.memory.slots import Gradients
from support.models import Given

SHAPES = {"big": (300, 300), "small": (20, 20), "bias": (300,)}


def reduce(state: dgc.DGCState, model: torch.nn.Module, shadow: bool = False) -> None:
    """Reduces all gradients of the model in one bucket."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    state.begin(shadow)
    future = state.reduce(gradients_of(state, parameters))
    state.end()
    future.wait()


def gradients_of(state: dgc.DGCState, parameters: Sequence[Tensor]) -> Gradients:
    """Returns the .grad tensors of some parameters as one bucket."""
    buffers = [p.grad.view(-1) for p in parameters if p.grad is not None]
    return Gradients([state.slot(p) for p in parameters], buffers, [(i, 0) for i in range(len(buffers))])


class Alone:
    """A Given model with its optimizer and state."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        config: dgc.DGCConfig,
        dtype: torch.dtype = torch.float32,
        late: bool | None = None,
        optimizer: type[Optimizer] = dgc.SGD,
        **settings: Any,
    ) -> None:
        self.model = Given(shapes, dtype=dtype)
        self.optimizer = optimizer(self.model.parameters(), **settings)
        self.state = dgc.DGCState(self.model.named_parameters(), self.optimizer, config, late=late)

    def backward(self, gradients: Mapping[str, Tensor]) -> None:
        self.optimizer.zero_grad()
        self.model(gradients).backward()
        reduce(self.state, self.model)

    def train(self, gradients: Mapping[str, Tensor]) -> None:
        self.backward(gradients)
        self.optimizer.step()

    def parameter(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach()


def alone(momentum: float = 0.5, lr: float = 0.5, late: bool | None = None, **config: Any) -> Alone:
    """Returns one with a parameter that is compressed and two that are not."""
    return Alone(SHAPES, dgc.DGCConfig(**{"density": 0.01, **config}), lr=lr, momentum=momentum, late=late)


def own(state: dgc.DGCState) -> dict[str, Any]:
    """Returns the share of the only rank."""
    share: dict[str, Any] = state.state_dict()["ranks"]["0"]
    return share
