"""The saved state of torch.optim.SGD and dgc.SGD: its check, and its conversion from one to the other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

UNSUPPORTED = {"dampening": 0, "maximize": False, "differentiable": False, "fused": None}
"""Settings of torch.optim.SGD that DGC cannot honour, with their unset values."""
STATE = {"step", "decay_momentum", "momentum_buffer"}
"""Keys of a parameter's state; momentum_buffer is torch.optim.SGD's, and stays until a DGCState takes it."""


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
    """Refuses the state of an optimizer other than dgc.SGD or torch.optim.SGD, or state that does not fit.

    Args:
        groups: the parameter groups.
        saved: the saved state, by parameter.

    Raises:
        ValueError: the message names the group or entry that shows it.
    """
    needed = ["lr", "momentum", "weight_decay", "nesterov"]
    if any("momentum_buffer" in entries for entries in saved.values()):
        needed.append("dampening")  # Muon has all the other keys, and buffers of another kind
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


def take_over(
    groups: Iterable[Mapping[str, Any]], saved: Mapping[Tensor, Mapping[str, Any]]
) -> defaultdict[Tensor, dict[str, Any]]:
    """Returns a copy of saved state, completed to what step() would have made.

    It is a copy, since torch passes the state_dict's own tensors, which later steps would change. A parameter without
    `step` gets the largest one of the others, since earlier versions kept it for the first parameter only.
    """
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    if not any(saved.values()):
        return state
    steps = most_steps(saved)
    held = [p for group in groups for p in group["params"] if p.requires_grad]
    for p in dict.fromkeys([*saved, *held]):
        state[p] = fresh(p, steps)
        for name, value in saved.get(p, {}).items():
            if name == "step":
                state[p]["step"].fill_(float(value))
            elif value is not None:
                state[p][name] = value.clone()
    return state


def fresh(p: Tensor, steps: float = 0) -> dict[str, Any]:
    return {
        "step": count(steps),
        "decay_momentum": torch.empty(0, dtype=p.dtype, device=p.device),
    }


def count(steps: float) -> Tensor:
    return torch.tensor(steps, dtype=torch.float32, device="cpu")


def most_steps(state: Mapping[Tensor, Mapping[str, Any]]) -> float:
    return max((float(entries["step"]) for entries in state.values() if "step" in entries), default=0)


def fill(group: dict[str, Any]) -> None:
    """Adds the settings of torch.optim.SGD that earlier versions of dgc.SGD did not have."""
    for name, value in {**UNSUPPORTED, "foreach": None}.items():
        group.setdefault(name, value)
