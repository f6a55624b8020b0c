"""dgc.SGD: torch.optim.SGD whose momentum is applied before sparsification."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dgc.local import gradient_of, local
from dgc.ops import Accumulation

from . import saved
from .apply import advance, shrink, subtract, with_momentum
from .base import DGCOptimizer, Reducer, Rule
from .own import Own
from .saved import Format
from .work import Work

MOMENTUM = "momentum"
FORMAT = Format(
    twin="SGD",
    numbers=("lr", "momentum", "weight_decay"),
    needed=("lr", "momentum", "weight_decay", "nesterov"),
    unsupported={"dampening": 0, "maximize": False, "differentiable": False, "fused": None},
    hints={"foreach": None},  # dgc.SGD always works on lists
    tensors=("decay_momentum", "momentum_buffer"),
    empty=("decay_momentum",),
)
"""momentum_buffer is torch.optim.SGD's, and stays until a DGCState takes it."""


def check_groups(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuses parameter groups whose values DGC cannot honour.

    Raises:
        ValueError: the message names the value.
    """
    groups = list(groups)
    saved.check_groups(groups, FORMAT)
    if len({bool(group.get("nesterov")) for group in groups}) > 1:
        raise ValueError("nesterov: expected the same in all parameter groups, got both True and False")


class MomentumCorrection(Own):
    """Keeps momentum u, and adds it to v: u <- mu*u + h, v <- v + u, or v + h + mu*u for Nesterov (section 3.1)."""

    def __init__(self, optimizer: SGD) -> None:
        """Takes the optimizer."""
        self.optimizer: SGD = optimizer

    @property
    def kept(self) -> tuple[str, ...]:
        """Momentum, where any parameter group has a momentum factor at present."""
        return (MOMENTUM,) if any(map(_trains_with_momentum, self.optimizer.param_groups)) else ()

    @property
    def may_keep(self) -> tuple[str, ...]:
        """Momentum, which a schedule or load_state_dict() may bring."""
        return (MOMENTUM,)

    def factors(self, parameter: Tensor, group: Mapping[str, Any], workers: int) -> tuple[float, ...]:
        """Returns mu."""
        return (float(group["momentum"]),)

    def check(self) -> None:
        """Refuses values that DGC cannot honour.

        Raises:
            ValueError: the message names the value.
        """
        check_groups(self.optimizer.param_groups)

    @property
    def keeps_state(self) -> bool:
        """Whether there is momentum."""
        return bool(self.kept)

    def beside(self, parameter: Tensor) -> dict[str, Tensor]:
        """Returns the momentum of weight decay, where there is one."""
        u = self.optimizer.state.get(parameter, {}).get("decay_momentum")
        return {} if u is None or u.shape != parameter.shape else {"decay_momentum": u}

    def brought(self) -> dict[Tensor, dict[str, Tensor]]:
        """Removes the momentum of a dense run, and returns it; see SGD.take_momentum."""
        return {p: {MOMENTUM: buffer} for p, buffer in self.optimizer.take_momentum().items()}

    def added(self) -> dict[Tensor, dict[str, Tensor]]:
        """Removes the momentum of weight decay, and returns it: both momenta obey one equation."""
        found = {}
        for p, state in self.optimizer.state.items():
            if (decay := state.get("decay_momentum")) is not None and decay.numel():
                found[p] = {MOMENTUM: decay}
                state["decay_momentum"] = decay.new_empty(0)
        return found

    def compress(self, work: Work) -> None:
        """Accumulates, selects and packs in one op."""
        if MOMENTUM not in work.kinds:
            work.compress(Accumulation.SUM)
        elif self.optimizer.param_groups[0]["nesterov"]:
            work.compress(Accumulation.NESTEROV, MOMENTUM)
        else:
            work.compress(Accumulation.MOMENTUM, MOMENTUM)


class SGD(DGCOptimizer):
    """SGD with momentum, Nesterov momentum and weight decay, for gradients that DGC reduces.

    It takes the arguments of torch.optim.SGD, and gives the same results where everything is sent. DGC accumulates
    momentum locally, before it selects entries (momentum correction, paper section 3.1). For a compressed parameter,
    the reduced gradient that step() applies therefore contains momentum already. momentum and nesterov are read from
    the parameter groups at every backward pass, so schedulers may change momentum. Weight decay has a momentum buffer
    of its own, equal on all ranks; by linearity the sum is the same.

    dgc.SGD and torch.optim.SGD can load each other's state_dict. A parameter's state has two tensors. `step`, float32
    on the CPU, counts the steps applied to it, and on a GPU also those that the device left out. `decay_momentum` has
    no elements until weight decay meets momentum. It is always there, since torch.distributed.checkpoint reads the
    device from the state (StateDictOptions(full_state_dict=True)).

    Raises:
        ValueError: an argument is out of range, or is one of torch.optim.SGD's that DGC cannot honour.
            add_param_group(), load_state_dict() and step() raise it too; load_state_dict() then has changed nothing.
    """

    _twin = "SGD"

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
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        check_groups([defaults])
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, checking its values."""
        group = {**self.defaults, **param_group}
        check_groups([*self.param_groups[:1], group])
        # Refused here only: a schedule or a state_dict may set momentum to 0 later, which is plain SGD.
        if group["nesterov"] and group["momentum"] <= 0:
            raise ValueError(f"momentum: expected a number > 0 with nesterov=True, got {group['momentum']!r}")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over the state that load_state_dict() or pickle has read; changes nothing unless all of it is valid."""
        groups = state["param_groups"]
        # Muon has all the other settings, and buffers of another kind.
        torchs = any("momentum_buffer" in entries for entries in state["state"].values())
        saved.check_saved(groups, state["state"], FORMAT, *(["dampening"] if torchs else []))
        for group in groups:
            saved.fill(group, FORMAT)
        check_groups(groups)
        super().__setstate__({**state, "state": saved.take_over(groups, state["state"], FORMAT)})
        saved.fill(self.defaults, FORMAT)

    def rule(self) -> Rule:
        """Returns momentum correction (paper, section 3.1)."""
        return MomentumCorrection(self)

    @property
    def steps(self) -> int:
        """The largest number of steps that a parameter has had; 0 where there is no state."""
        return int(saved.most_steps(self.state))

    def take_momentum(self) -> dict[Tensor, Tensor]:
        """Removes the momentum of torch.optim.SGD from loaded state, and returns it by parameter.

        DGCState calls this before it accumulates or saves, and copies each buffer into u. The buffer's weight-decay
        part may go into u too, while decay_momentum begins at 0. Both momenta decay by the same factor and are applied
        alike, so only their sum matters.
        """
        return {p: state.pop("momentum_buffer") for p, state in self.state.items() if "momentum_buffer" in state}

    def _check(self) -> None:
        check_groups(self.param_groups)

    def _needs_reducer(self) -> bool:
        return any(group["momentum"] > 0 for group in self.param_groups)

    def _apply(self, reducer: Reducer | None) -> None:
        """Subtracts the reduced gradients and the weight decay, times lr."""
        # A tensor, since _foreach_add_ would make one of a number for each addition.
        steps = [self._state(p)["step"] for group in self.param_groups for p in group["params"] if p.grad is not None]
        if steps:
            torch._foreach_add_(steps, saved.count(1), alpha=1)
        for group in self.param_groups:
            self._step_group(group, reducer)

    def _step_group(self, group: dict[str, Any], reducer: Reducer | None) -> None:
        lr, mu, decay, nesterov = group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]
        skip = reducer.skip if reducer is not None else None
        held = [(p, gradient) for p in group["params"] if (gradient := gradient_of(p)) is not None]
        if decay and held:
            self._decay_weights([p for p, _ in held], lr, mu, decay, nesterov, skip)
        # What is sent dense has its momentum here; what is compressed has had it before it was selected.
        us = [None if reducer is None or not mu else _momentum_of(p, reducer) for p, _ in held]
        updates = with_momentum([gradient for _, gradient in held], us, mu, nesterov, skip)
        subtract([local(p) for p, _ in held], updates, lr, skip)

    def _decay_weights(
        self, parameters: Sequence[Tensor], lr: float, mu: float, decay: float, nesterov: bool, skip: Tensor | None
    ) -> None:
        """Subtracts the weight-decay part of the update: lr times the momentum form of decay * p."""
        values = [local(p) for p in parameters]
        if not mu:
            shrink(values, 1 - lr * decay, skip)
            return
        us = [local(self._decay_momentum(p)) for p in parameters]
        advance(us, values, mu, skip, alpha=decay)
        if nesterov:
            shrink(values, 1 - lr * decay, skip)
        subtract(values, us, lr * mu if nesterov else lr, skip)

    def _state(self, p: Tensor) -> dict[str, Any]:
        """Returns the state of a parameter, made where it is missing.

        Every parameter has a state, though one count would do, since torch.distributed.checkpoint expects it.
        hvd.broadcast_optimizer_state() does not broadcast learning rates where there is no state at all.
        """
        state: dict[str, Any] = self.state[p]
        if "step" not in state:
            state.update(saved.fresh(p, FORMAT))
        return state

    def _decay_momentum(self, p: Tensor) -> Tensor:
        state = self._state(p)
        if state["decay_momentum"].shape != p.shape:
            state["decay_momentum"] = torch.zeros_like(p)
        u: Tensor = state["decay_momentum"]
        return u

    def _allocate(self, parameters: Sequence[Tensor]) -> None:
        with_decay = {id(p) for g in self.param_groups if g["weight_decay"] and g["momentum"] for p in g["params"]}
        for p in parameters:
            self._state(p)
            if id(p) in with_decay:
                self._decay_momentum(p)


def _momentum_of(p: Tensor, reducer: Reducer) -> Tensor | None:
    kept = reducer.kept_of(p)
    return None if kept is None else kept[MOMENTUM]


def _trains_with_momentum(group: Mapping[str, Any]) -> bool:
    return bool(group["momentum"]) and any(p.requires_grad for p in group["params"])
