"""The saved state of an optimizer: its check, and its conversion between torch's optimizer and ours of that name."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """The settings and the state that an optimizer of ours has in common with torch's of the same name."""

    twin: str
    """The name that both have."""
    numbers: tuple[str, ...]
    """Settings of each group that are finite and not negative."""
    needed: tuple[str, ...]
    """Settings that each group of a saved state has, by which other optimizers are told apart."""
    unsupported: Mapping[str, object]
    """Settings that DGC cannot honour, with their unset values."""
    hints: Mapping[str, object]
    """Settings that change speed only, with their defaults."""
    tensors: tuple[str, ...]
    """Tensors of a parameter's state, of its shape, besides `step`."""
    empty: tuple[str, ...]
    """Those of them that are always there, and have no elements until they are needed."""


def check_groups(groups: Iterable[Mapping[str, Any]], form: Format) -> None:
    """Refuses parameter groups whose values DGC cannot honour.

    Raises:
        ValueError: the message names the value.
    """
    for group in groups:
        for name in form.numbers:
            value = group.get(name)
            if not (isinstance(value, Real) and 0 <= float(value) < math.inf):
                way_out = (
                    f'. Write group["{name}"] = float(group["{name}"]) for each of optimizer.param_groups'
                    if isinstance(value, Tensor)
                    else ""
                )
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}{way_out}")
        for name, unset in form.unsupported.items():
            if group.get(name):
                raise ValueError(
                    f"{name}: expected it unset, got {group[name]!r}: dgc.{form.twin} does not support it. Leave it "
                    f"out, or set it to {unset!r} in the parameter group; in a state_dict that is to be loaded, in "
                    'each of state_dict["param_groups"], if the run may go on without it'
                )


def check_saved(
    groups: Iterable[Mapping[str, Any]], saved: Mapping[Any, Mapping[str, Any]], form: Format, *more: str
) -> None:
    """Refuses the state of an optimizer of another name, or state that does not fit.

    Args:
        groups: the parameter groups.
        saved: the saved state, by parameter.
        form: of the optimizer that loads it.
        more: further settings that each group has to have.

    Raises:
        ValueError: the message names the group or entry that shows it.
    """
    needed = [*form.needed, *more]
    for group in groups:
        if missing := [name for name in needed if name not in group]:
            expected, got = f"{', '.join(needed)} in each parameter group", f"a group without {', '.join(missing)}"
            raise _foreign(form, expected, got)
    known = {"step", *form.tensors}
    for p, entries in saved.items():
        if extra := set(entries) - known if isinstance(p, Tensor) else {p}:
            raise _foreign(
                form, f"no more than {', '.join(sorted(known))} of each parameter", ", ".join(sorted(map(str, extra)))
            )
        step = entries.get("step", 0)
        if not isinstance(step, Real) and not (isinstance(step, Tensor) and step.numel() == 1):
            raise ValueError(f"state_dict: expected a number as step, got {step!r}. It is damaged: load another one")
        for name in form.tensors:
            value = entries.get(name)
            if value is not None and not _fits(value, p, may_be_empty=name in form.empty):
                raise ValueError(
                    f"state_dict: expected {name} of the parameter's shape, {tuple(p.shape)}, got "
                    f"{tuple(value.shape) if isinstance(value, Tensor) else repr(value)}. Load it with the model that "
                    "it was saved with"
                )


def _fits(value: object, p: Tensor, may_be_empty: bool) -> bool:
    if not isinstance(value, Tensor) or value.layout != p.layout:
        return False
    return value.shape == p.shape or (may_be_empty and not value.numel())


def _foreign(form: Format, expected: str, got: str) -> ValueError:
    name = form.twin
    return ValueError(
        f"state_dict: this is not the state of dgc.{name} or torch.optim.{name}: expected {expected}, got {got}. Load "
        f"it into an optimizer of the kind that saved it; or load the model alone, and begin with a fresh dgc.{name}"
    )


def take_over(
    groups: Iterable[Mapping[str, Any]], saved: Mapping[Tensor, Mapping[str, Any]], form: Format
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
        state[p] = fresh(p, form, steps)
        for name, value in saved.get(p, {}).items():
            if name == "step":
                state[p]["step"].fill_(float(value))
            elif value is not None:
                state[p][name] = value.clone()
    return state


def fresh(p: Tensor, form: Format, steps: float = 0) -> dict[str, Any]:
    """Returns the state of a parameter after so many steps.

    Its empty tensors are there since torch.distributed.checkpoint reads the device from them.
    """
    empty = {name: torch.empty(0, dtype=p.dtype, device=p.device) for name in form.empty}
    return {"step": count(steps), **empty}


def count(steps: float) -> Tensor:
    """Returns a number of steps as optimizers keep it: float32 on the CPU."""
    return torch.tensor(steps, dtype=torch.float32, device="cpu")


def most_steps(state: Mapping[Tensor, Mapping[str, Any]]) -> float:
    """Returns the largest number of steps of any parameter."""
    return max((float(entries["step"]) for entries in state.values() if "step" in entries), default=0)


def fill(group: dict[str, Any], form: Format) -> None:
    """Adds the settings of torch's optimizer that earlier versions of ours did not have."""
    for name, value in {**form.unsupported, **form.hints}.items():
        group.setdefault(name, value)
