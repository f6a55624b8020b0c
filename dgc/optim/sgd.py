"""dgc.SGD: torch.optim.SGD whose momentum is applied before sparsification."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from dgc import ops

UNSUPPORTED = {"dampening": 0, "maximize": False, "differentiable": False, "fused": None}
"""torch.optim.SGD's settings that DGC cannot honour, and what they are where they are unset."""
STATE = {"step", "decay_momentum", "momentum_buffer"}
"""What is kept of a parameter; the last is torch.optim.SGD's, until a DGCState takes it."""


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

    load_state_dict() takes torch.optim.SGD's state too, and torch.optim.SGD's takes this one's. A parameter's state is
    `step`, the steps applied to it (on a GPU with those that the device left out), float32 on the CPU, and
    `decay_momentum`, of no elements until weight decay meets momentum: always there, since
    torch.distributed.checkpoint asks the state which device it is on (StateDictOptions(full_state_dict=True)).

    Raises:
        ValueError: an argument out of range, or one of torch.optim.SGD's that DGC cannot honour. The same comes from
            add_param_group(), from load_state_dict(), which then has changed nothing, and from step(), where a
            parameter group has been changed since.
    """

    # Weak, or a DGCState that is dropped keeps its memory until the garbage collector comes. Of the class too, so that
    # a copy without a DGCState says what is missing.
    _attached: tuple[weakref.ref[Reducer], ...] = ()

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
            "foreach": foreach,  # a hint about speed; dgc.SGD always works on lists
            "differentiable": differentiable,
            "fused": fused,
        }
        check_groups([defaults])
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, checking its values."""
        group = {**self.defaults, **param_group}
        check_groups([*self.param_groups[:1], group])
        # Not where a schedule or a state_dict comes to 0 later, which is plain SGD.
        if group["nesterov"] and group["momentum"] <= 0:
            raise ValueError(f"momentum: expected a number > 0 with nesterov=True, got {group['momentum']!r}")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over what load_state_dict() or pickle has read; changes nothing unless all of it can be honoured."""
        groups = state["param_groups"]
        check_saved(groups, state["state"])
        for group in groups:
            _fill(group)
        check_groups(groups)
        super().__setstate__({**state, "state": _take_over(groups, state["state"])})
        _fill(self.defaults)

    def attach(self, reducer: Reducer) -> None:
        """Names the DGCState that reduces the gradients, without keeping it alive; DGCState calls this itself."""
        self._attached = (*(one for one in self._attached if one() is not None), weakref.ref(reducer))

    @property
    def reducer(self) -> Reducer | None:
        """The DGCState that reduces the gradients: the last one that was made and is not gone; None without one."""
        return next((reducer for one in reversed(self._attached) if (reducer := one()) is not None), None)

    @property
    def steps(self) -> int:
        """The largest number of steps that a parameter has had; 0 where there is no state."""
        return int(_most_steps(self.state))

    def take_momentum(self) -> dict[Tensor, Tensor]:
        """Returns the momentum that torch.optim.SGD's state brought along, by parameter, and forgets it.

        DGCState calls this before it accumulates or saves, and puts each buffer into u. Weight decay's part of it may
        go there too, with decay_momentum beginning at 0: both momenta decay by the same factor and are applied alike,
        so only their sum matters.
        """
        return {p: state.pop("momentum_buffer") for p, state in self.state.items() if "momentum_buffer" in state}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Answers GradScaler.step(), which alone asks: no, it has to unscale the gradients itself.

        Raises:
            RuntimeError: the DGCState does not know of the loss scale, and has accumulated scaled gradients.
        """
        reducer = self.reducer
        if reducer is not None and not reducer.unscales:
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
            ValueError: a parameter group has a value that DGC cannot honour.
            FloatingPointError: a gradient was not finite on some rank (DGCConfig.on_nonfinite). On a GPU the device
                leaves the step out, and the next step() raises.
        """
        check_groups(self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        reducer = self.reducer
        if not parameters and not (reducer is not None and reducer.pending):
            return loss
        if not (reducer is not None and reducer.pending) and all_zero(p.grad for p in parameters):
            self._allocate()
            return loss
        if reducer is not None:
            if not reducer.take():
                return loss
        elif any(group["momentum"] > 0 for group in self.param_groups):
            raise RuntimeError(
                "dgc.SGD: expected a DGCState to have reduced these gradients, got none, so momentum would be missing. "
                "Create state = dgc.DGCState(model.named_parameters(), optimizer), keep it, and register it: "
                "state.register(model); with Horovod, wrap the optimizer: "
                "dgc.horovod.DistributedOptimizer(optimizer, model.named_parameters()). Without DGC, use "
                "torch.optim.SGD"
            )
        # A tensor, which each addition would make of a number again.
        if parameters:
            torch._foreach_add_([self._state(p)["step"] for p in parameters], _count(1), alpha=1)
        for group in self.param_groups:
            self._step_group(group, reducer)
        return loss

    def _step_group(self, group: dict[str, Any], reducer: Reducer | None) -> None:
        lr, mu, decay, nesterov = group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]
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

    def _state(self, p: Tensor) -> dict[str, Any]:
        """Returns what is kept of a parameter.

        Of every one, though one count would do: torch.distributed.checkpoint misses a state that is not there, and
        hvd.broadcast_optimizer_state() leaves learning rates where they are if there is none at all.
        """
        state: dict[str, Any] = self.state[p]
        if "step" not in state:
            state.update(_fresh(p))
        return state

    def _decay_momentum(self, p: Tensor) -> Tensor:
        state = self._state(p)
        if state["decay_momentum"].shape != p.shape:
            state["decay_momentum"] = torch.zeros_like(p)
        u: Tensor = state["decay_momentum"]
        return u

    def _allocate(self) -> None:
        """Makes what step() would make."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._state(p)
                    if group["weight_decay"] and group["momentum"]:
                        self._decay_momentum(p)


def check_groups(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuses parameter groups whose values DGC cannot honour.

    Raises:
        ValueError: the message names the value.
    """
    groups = list(groups)
    for group in groups:
        for name in ("lr", "momentum", "weight_decay"):
            value = group.get(name)
            if not (isinstance(value, Real) and 0 <= float(value) < math.inf):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        for name, unset in UNSUPPORTED.items():
            if group.get(name):
                raise ValueError(
                    f"{name}: expected it unset, got {group[name]!r}: dgc.SGD does not support it. Leave it out, or "
                    f"set it to {unset!r} in the parameter group; in a state_dict that is to be loaded, in each of "
                    'state_dict["param_groups"], if the run may go on without it'
                )
    if len({bool(group.get("nesterov")) for group in groups}) > 1:
        raise ValueError("nesterov: expected the same in all parameter groups, got both True and False")


def check_saved(groups: Iterable[Mapping[str, Any]], saved: Mapping[Any, Mapping[str, Any]]) -> None:
    """Refuses what another optimizer than dgc.SGD or torch.optim.SGD has saved, and what does not fit the parameters.

    Args:
        groups: the parameter groups.
        saved: what was saved of each parameter.

    Raises:
        ValueError: the message says what shows it.
    """
    needed = ["lr", "momentum", "weight_decay", "nesterov"]
    if any("momentum_buffer" in entries for entries in saved.values()):
        needed.append("dampening")  # Muon has all the others, and buffers of another kind
    for group in groups:
        if missing := [name for name in needed if name not in group]:
            raise _foreign(f"{', '.join(needed)} in each parameter group", f"a group without {', '.join(missing)}")
    for p, entries in saved.items():
        if extra := set(entries) - STATE if isinstance(p, Tensor) else {p}:
            raise _foreign(
                f"no more than {', '.join(sorted(STATE))} of each parameter", ", ".join(sorted(map(str, extra)))
            )
        step = entries.get("step", 0)
        if not isinstance(step, Real) and not (isinstance(step, Tensor) and step.numel() == 1):
            raise ValueError(f"state_dict: expected a number as step, got {step!r}. It is damaged: load another one")
        for name in ("decay_momentum", "momentum_buffer"):
            u = entries.get(name)
            if u is not None and not _fits(name, u, p):
                raise ValueError(
                    f"state_dict: expected {name} of the parameter's shape, {tuple(p.shape)}, got "
                    f"{tuple(u.shape) if isinstance(u, Tensor) else repr(u)}. Load it with the model that it was saved "
                    "with"
                )


def _fits(name: str, u: object, p: Tensor) -> bool:
    if not isinstance(u, Tensor) or u.layout != p.layout:
        return False
    return u.shape == p.shape or (name == "decay_momentum" and not u.numel())


def _foreign(expected: str, got: str) -> ValueError:
    return ValueError(
        f"state_dict: this is not the state of dgc.SGD or torch.optim.SGD: expected {expected}, got {got}. Load it "
        "into an optimizer of the kind that saved it; or load the model alone, and begin with a fresh dgc.SGD"
    )


def _take_over(
    groups: Iterable[Mapping[str, Any]], saved: Mapping[Tensor, Mapping[str, Any]]
) -> defaultdict[Tensor, dict[str, Any]]:
    """Returns saved state as step() would have made it, in tensors of its own.

    torch hands over those of the state_dict, which a run that goes on changes. Where step is missing, it is that of the
    others: it used to be kept of the first parameter only.
    """
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    if not any(saved.values()):
        return state
    steps = _most_steps(saved)
    held = [p for group in groups for p in group["params"] if p.requires_grad]
    for p in dict.fromkeys([*saved, *held]):
        state[p] = _fresh(p, steps)
        for name, value in saved.get(p, {}).items():
            if name == "step":
                state[p]["step"].fill_(float(value))
            elif value is not None:
                state[p][name] = value.clone()
    return state


def _fresh(p: Tensor, steps: float = 0) -> dict[str, Any]:
    return {
        "step": _count(steps),
        "decay_momentum": torch.empty(0, dtype=p.dtype, device=p.device),
    }


def _count(steps: float) -> Tensor:
    return torch.tensor(steps, dtype=torch.float32, device="cpu")


def _most_steps(state: Mapping[Tensor, Mapping[str, Any]]) -> float:
    return max((float(entries["step"]) for entries in state.values() if "step" in entries), default=0)


def _fill(group: dict[str, Any]) -> None:
    """Adds torch.optim.SGD's settings that dgc.SGD used to have none of."""
    for name, value in {**UNSUPPORTED, "foreach": None}.items():
        group.setdefault(name, value)


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
