"""dgc.SGD: torch.optim.SGD whose momentum is applied before sparsification."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import ops


class Reducer(Protocol):
    """What dgc.SGD asks of the DGCState that reduces its gradients."""

    @property
    def pending(self) -> bool:
        """Whether gradients were reduced that no step() has taken."""

    def take(self) -> bool:
        """Claims the gradients of the last backward pass; False if this step is to be left out."""

    @property
    def skip(self) -> Tensor | None:
        """On a GPU, a uint8 scalar there: not 0 where the claimed step must change nothing. None on the CPU."""

    @property
    def unscales(self) -> bool:
        """Whether it knows of the loss scale that gradients have."""

    def dense_momentum(self, parameter: Tensor) -> Tensor | None:
        """Returns u if the gradient is a plain average; None if it is an update that has momentum in it already."""


class SGD(Optimizer):
    """SGD with momentum, Nesterov momentum and weight decay, for gradients that DGC reduces.

    Takes torch.optim.SGD's arguments and gives its results: exactly where everything is sent, in expectation of what
    is sent where not. DGC accumulates momentum locally, before it selects (momentum correction, paper section 3.1), so
    for a compressed parameter step() finds it in the gradient already. momentum and nesterov are read from the
    parameter groups at every backward pass, so schedulers may change momentum. Weight decay has a momentum buffer of
    its own, equal on all ranks; by linearity the sum is the same.

    Raises:
        ValueError: an argument out of range, or one of torch.optim.SGD's that DGC cannot honour.
    """

    _reducer: Reducer | None = None  # of the class too, so that a copy without a DGCState says what is missing

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        """Checks the arguments; see the class."""
        refused = {"dampening": dampening, "maximize": maximize, "differentiable": differentiable, "fused": fused}
        for name, value in refused.items():
            if value:
                raise ValueError(f"{name}: expected it unset, got {value!r}: dgc.SGD does not support it")
        del foreach  # a hint about speed; dgc.SGD always works on lists
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, checking its values."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "momentum", "weight_decay"):
            value = group[name]
            if isinstance(value, Tensor) or not value >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {value!r}")
        if group["nesterov"] and group["momentum"] <= 0:
            raise ValueError(f"momentum: expected a number > 0 with nesterov=True, got {group['momentum']!r}")

    def attach(self, reducer: Reducer) -> None:
        """Names the DGCState that reduces the gradients; DGCState calls this itself."""
        self._reducer = reducer

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Answers GradScaler.step(), which alone asks: no, it has to unscale the gradients itself.

        Raises:
            RuntimeError: the DGCState does not know of the loss scale, and has accumulated scaled gradients.
        """
        if self._reducer is not None and not self._reducer.unscales:
            raise RuntimeError(
                "GradScaler.step: expected a DGCState that knows of the loss scale, got one that has accumulated "
                "scaled gradients, which a change of scale makes wrong: DGCState(..., grad_scaler=scaler), or "
                "dgc.horovod.DistributedOptimizer(..., grad_scaler=scaler)"
            )
        return False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Applies lr, the reduced gradient and weight decay.

        Raises:
            RuntimeError: there are gradients and momentum, but no DGCState has reduced since the last step: momentum
                would be silently missing.
            FloatingPointError: a gradient was not finite on some rank (DGCConfig.on_nonfinite). On a GPU the device
                leaves the step out, and the next step() raises.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return loss
        if not (self._reducer is not None and self._reducer.pending) and all_zero(gradients):
            self._allocate()
            return loss
        if self._reducer is not None:
            if not self._reducer.take():
                return loss
        elif any(group["momentum"] > 0 for group in self.param_groups):
            raise RuntimeError(
                "dgc.SGD: expected a DGCState to have reduced these gradients, got none, so momentum would be missing. "
                "Create dgc.DGCState(model.named_parameters(), optimizer) and register it: "
                "model.register_comm_hook(state, dgc.dgc_hook); with Horovod, wrap it: "
                "dgc.horovod.DistributedOptimizer(optimizer, model.named_parameters()). Without DGC, use "
                "torch.optim.SGD"
            )
        self._steps().add_(1)
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        lr, mu, decay, nesterov = group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]
        reducer = self._reducer
        skip = reducer.skip if reducer is not None else None
        parameters = [p for p in group["params"] if p.grad is not None]
        if decay:
            for p in parameters:
                self._decay_weights(p, lr, mu, decay, nesterov, skip)
        updates = []
        for p in parameters:
            update = p.grad
            u = reducer.dense_momentum(p) if reducer is not None and mu else None
            if u is not None:
                _unless(skip, u, partial(_advance, gradient=p.grad, mu=mu))
                update = p.grad.add(u, alpha=mu) if nesterov else u
            updates.append(update)
        _subtract(parameters, updates, lr, skip)

    def _decay_weights(
        self, p: Tensor, lr: float, mu: float, decay: float, nesterov: bool, skip: Tensor | None
    ) -> None:
        """Takes the weight-decay part of the update off p: lr times the momentum form of decay * p."""
        shrink = partial(torch.Tensor.mul_, other=1 - lr * decay)
        if not mu:
            _unless(skip, p, shrink)
            return
        u = self._decay_momentum(p)
        _unless(skip, u, partial(_advance, gradient=p, mu=mu, alpha=decay))
        if nesterov:
            _unless(skip, p, shrink)
        _subtract([p], [u], lr * mu if nesterov else lr, skip)

    def _decay_momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "decay_momentum" not in state:
            state["decay_momentum"] = torch.zeros_like(p)
        u: Tensor = state["decay_momentum"]
        return u

    def _steps(self) -> Tensor:
        """Returns the number of steps applied, on a GPU with those that the device left out: float32 on the CPU.

        Kept so that there is a state at all: hvd.broadcast_optimizer_state() leaves learning rates where they are if
        there is none.
        """
        state = self.state[self.param_groups[0]["params"][0]]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        steps: Tensor = state["step"]
        return steps

    def _allocate(self) -> None:
        """Makes what step() would make."""
        self._steps()
        for group in self.param_groups:
            if group["weight_decay"] and group["momentum"]:
                for p in group["params"]:
                    if p.grad is not None:
                        self._decay_momentum(p)


def all_zero(gradients: Iterable[Tensor]) -> bool:
    """Returns whether there is nothing to apply, and so nothing that DGC could have missed.

    hvd.broadcast_optimizer_state() steps on such gradients, to have the state made that it broadcasts then.
    """
    return not any(bool(gradient.any()) for gradient in gradients)


def _advance(u: Tensor, gradient: Tensor, mu: float, alpha: float = 1) -> None:
    """Advances a momentum, as torch.optim.SGD does: u <- mu*u + alpha*gradient."""
    u.mul_(mu).add_(gradient, alpha=alpha)


def _subtract(parameters: list[Tensor], updates: list[Tensor], lr: float, skip: Tensor | None) -> None:
    """Takes lr * update off each parameter, together where the op can."""
    together: list[Tensor] = []
    their_updates: list[Tensor] = []
    for p, update in zip(parameters, updates, strict=True):
        if p.dtype == update.dtype == torch.float32 and p.is_contiguous() and update.is_contiguous():
            together.append(p)
            their_updates.append(update)
        else:
            _unless(skip, p, partial(torch.Tensor.add_, other=update, alpha=-lr))
    if together:
        ops.subtract_(together, their_updates, lr, skip)


def _unless(skip: Tensor | None, tensor: Tensor, change: Callable[[Tensor], object]) -> None:
    """Changes a tensor in place, unless the device says that this step is to be skipped; the host never knows."""
    if skip is None:
        change(tensor)
        return
    changed = tensor.clone()
    change(changed)
    torch.where(skip != 0, tensor, changed, out=tensor)
