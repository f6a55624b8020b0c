"""Conversion of torch's optimizers to ours of the same name and back, in place: schedulers keep their object."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .adam import FIRST
from .adamw import Adam, AdamW
from .sgd import MOMENTUM, SGD

TWINS: dict[type[Optimizer], type[SGD] | type[AdamW]] = {
    torch.optim.SGD: SGD,
    torch.optim.AdamW: AdamW,
    torch.optim.Adam: Adam,
}
"""Ours for torch's. A subclass of torch's may do something of its own in step(), and is left as it is."""


@contextmanager
def converted(optimizer: Optimizer) -> Iterator[bool]:
    """Converts an optimizer for what follows, as convert(), whose answer it gives; an error there undoes it."""
    kind, values = type(optimizer), dict(vars(optimizer))
    groups = [dict(group) for group in optimizer.param_groups]
    changed = convert(optimizer)
    try:
        yield changed
    except BaseException:
        if changed:
            optimizer.__class__ = kind
            vars(optimizer).clear()
            vars(optimizer).update(values)
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(before)
        raise


def convert(optimizer: Optimizer) -> bool:
    """Makes torch.optim.SGD, AdamW or Adam ours of that name; returns False for any other.

    Groups, state, hooks and schedulers stay.

    Raises:
        ValueError: it has a setting that DGC cannot honour; then nothing has changed.
    """
    ours = TWINS.get(type(optimizer))
    if ours is None:
        return False
    # load_state_dict() of ours takes what torch's has saved; on a fresh one, since it may refuse.
    held = [group["params"] for group in optimizer.param_groups]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    if ours is SGD:
        settings = [{**group, "fused": None} for group in settings]  # a matter of speed alone
    fresh = ours([{"params": params, **group} for params, group in zip(held, settings, strict=True)])
    fresh.__setstate__({"state": dict(optimizer.state), "param_groups": fresh.param_groups})
    step = vars(optimizer).pop("step", None)
    vars(optimizer).pop("_step_supports_amp_scaling", None)  # of a fused one: ours asks the DGCState
    optimizer.__class__ = ours
    known = {key: value for key, value in optimizer.defaults.items() if key in fresh.defaults}
    optimizer.defaults = {**fresh.defaults, **known, **({"fused": None} if ours is SGD else {})}
    for group, fresh_group in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        group.update(fresh_group)
    optimizer.state = fresh.state
    if getattr(step, "_wrapped_by_lr_sched", False):
        _count_for_schedulers(optimizer)
    return True


def convert_back(optimizer: Optimizer, kept: Mapping[str, Mapping[Tensor, Tensor]]) -> bool:
    """Makes dgc.SGD, AdamW or Adam torch's of that name, the inverse of convert(); returns False for any other.

    Groups, hooks and schedulers stay.

    Args:
        optimizer: ours.
        kept: tensors of the rule by kind and parameter, equal on all ranks.
    """
    theirs: Any = next((theirs for theirs, ours in TWINS.items() if type(optimizer) is ours), None)
    if theirs is None:
        return False
    fresh = theirs([{**group, "params": group["params"]} for group in optimizer.param_groups])
    for group in fresh.param_groups:
        for p in group["params"]:
            tensors = {kind: of[p].to(p.dtype) for kind, of in kept.items() if p in of}
            if state := _state_of_torchs(optimizer.state.get(p, {}), tensors):
                fresh.state[p] = state
                if "step" in state and (group.get("fused") or group.get("capturable")):
                    state["step"] = state["step"].to(p.device)
    step = vars(optimizer).pop("step", None)
    optimizer.__class__ = theirs
    optimizer.defaults = {**fresh.defaults, **{k: v for k, v in optimizer.defaults.items() if k in fresh.defaults}}
    optimizer.state = fresh.state
    if "_step_supports_amp_scaling" in vars(fresh):  # of a fused one
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    if getattr(step, "_wrapped_by_lr_sched", False):
        _count_for_schedulers(optimizer)
    return True


def _state_of_torchs(ours: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the state of torch's optimizer for a parameter, from that of ours and the rule's tensors by kind."""
    if FIRST in tensors and "step" in ours:
        return {"step": ours["step"], **tensors}
    return {"momentum_buffer": tensors[MOMENTUM]} if MOMENTUM in tensors else {}


def _count_for_schedulers(optimizer: Optimizer) -> None:
    """Wraps step() as torch's schedulers do when they are made, by which they see that it was called before theirs."""
    step: Callable[..., Any] = optimizer.step

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]  # a scheduler's
        return step(*args, **kwargs)

    counted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # a scheduler's
    optimizer.step = counted  # type: ignore[method-assign]
