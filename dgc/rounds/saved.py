"""Saved rounds of dgc.LocalSteps: what stands in a share beside DGCState's, and what an island takes of saved ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from dgc.local import local, mesh_of
from dgc.memory import pieces
from dgc.memory.share import Choice, Share
from dgc.memory.slots import Slot, lay_out

THETA_0, THETA = "theta_0", "theta"
"""Kinds of tensor by parameter name: theta_0, and the weights of an island where they have left it."""
OUTER = "outer "
"""Begin of the kinds that the outer optimizer keeps, as "outer momentum_buffer"."""
ROUNDS = "local_steps"
"""Key of the plain values."""


def entries(
    start: Mapping[str, Tensor], weights: Mapping[str, Tensor], outer: Optimizer, every: int, rounds: int, position: int
) -> dict[str, Any]:
    """Returns what an island saves beside its DGCState's share: views by kind and name, and plain values.

    Args:
        start: theta_0.
        weights: theta; empty where it is theta_0.
        outer: the outer optimizer, of theta_0.
        every: H.
        rounds: held so far.
        position: inner steps since the last one.
    """
    names, saved = _names(start, outer), outer.state_dict()
    kept: dict[str, dict[str, Tensor]] = {}
    numbers: dict[str, dict[str, object]] = {}
    for index, values in saved["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                kept.setdefault(OUTER + key, {})[names[index]] = local(value)
            else:
                numbers.setdefault(key, {})[names[index]] = value
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in saved["param_groups"]]
    return {
        THETA_0: {name: local(p.detach()) for name, p in start.items()},
        THETA: {name: local(p.detach()) for name, p in weights.items()},
        **kept,
        ROUNDS: {
            "every": every,
            "rounds": rounds,
            "position": position,
            "outer": type(outer).__name__,
            "groups": groups,
            "numbers": numbers,
        },
    }


def read(
    parts: Sequence[Mapping[str, Any]], start: Mapping[str, Tensor], outer: Optimizer, every: int
) -> list[Mapping[str, Any]]:
    """Returns saved shares whose theta_0, theta and tensors of the outer optimizer are this rank's parts of them.

    Args:
        parts: as entries() made them, with DGCState's share in each; several of an island whose ranks hold parts.
        start: the present theta_0, for names and shapes.
        outer: the present outer optimizer, for its groups.
        every: the present H.

    Raises:
        ValueError: they do not fit each other or this model; the message names what.
    """
    by_island: dict[int, list[Mapping[str, Any]]] = {}
    for part in parts:
        _check_numbers(part, start, outer, every)
        by_island.setdefault(Share.of(part).rank, []).append({**part, THETA: part.get(THETA) or part[THETA_0]})
    slots = lay_out(start, [])
    found: list[Mapping[str, Any]] = [
        {**part, **{kind: fitted[kind] for kind in _kinds(fitted)}}
        for several in by_island.values()
        if (fitted := _fitted(several, slots))
        for part in several
    ]
    for part in found:
        for kind in _kinds(part):
            _check_tensors(part[kind], slots, kind)
        if part[ROUNDS]["rounds"] != found[0][ROUNDS]["rounds"]:
            rounds = [one[ROUNDS]["rounds"] for one in (found[0], part)]
            raise ValueError(f"state_dict: expected one round, got {rounds[0]} and {rounds[1]}")
        if not all(torch.equal(t.cpu(), part[THETA_0][name].cpu()) for name, t in found[0][THETA_0].items()):
            raise ValueError(
                "state_dict: expected the same theta_0 of all islands, got others: they are of different runs"
            )
    return found


def theta(choice: Choice, name: str) -> Tensor:
    """Returns the weights of a parameter from which an island goes on: theta_0 less its part of how far all had come.

    The parts are those of e, so that the mean of the differences stays the same; those of missing islands are 0.
    """
    if [weight for weight, _ in choice.parts] == [1.0]:
        own: Tensor = choice.parts[0][1][THETA][name]
        return own
    start: Tensor = choice.parts[0][1][THETA_0][name]
    moved = torch.zeros_like(start)
    for weight, part in choice.parts:
        moved.add_(start - part[THETA][name].to(start), alpha=weight)
    return start - moved


def outer_state(share: Mapping[str, Any], start: Mapping[str, Tensor], outer: Optimizer) -> dict[str, Any]:
    """Returns the state_dict of the outer optimizer, with copies of the saved tensors."""
    index = {name: i for i, name in enumerate(_names(start, outer))}
    state: dict[int, dict[str, object]] = {}
    for kind in _kinds(share):
        if kind.startswith(OUTER):
            for name, tensor in share[kind].items():
                state.setdefault(index[name], {})[kind.removeprefix(OUTER)] = _as_kept(tensor, start[name])
    for key, named in share[ROUNDS]["numbers"].items():
        for name, number in named.items():
            state.setdefault(index[name], {})[key] = number
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in share[ROUNDS]["groups"]]
    return {"state": state, "param_groups": groups}


def _as_kept(tensor: Tensor, p: Tensor) -> Tensor:
    """Returns a copy of a saved tensor; of a shard's shape, as a DTensor like the parameter."""
    if mesh_of(p) is None or tensor.shape != local(p).shape:
        return tensor.clone()
    whole = torch.zeros_like(p.detach(), dtype=tensor.dtype)
    local(whole).copy_(tensor)
    return whole


def _names(start: Mapping[str, Tensor], outer: Optimizer) -> list[str]:
    """Returns the names of the outer optimizer's parameters, in the order in which its state_dict() numbers them."""
    name_of = {id(p): name for name, p in start.items()}
    return [name_of[id(p)] for group in outer.param_groups for p in group["params"]]


def _kinds(share: Mapping[str, Any]) -> list[str]:
    return [kind for kind in share if kind in (THETA_0, THETA) or kind.startswith(OUTER)]


def _fitted(parts: Sequence[Mapping[str, Any]], slots: Mapping[str, Slot]) -> Mapping[str, Any]:
    """Returns the share of one island with this rank's parts of all tensors that are divided as theta_0 is."""
    first = parts[0]
    kinds = [
        kind
        for kind in _kinds(first)
        if all(name in first[THETA_0] and t.shape == first[THETA_0][name].shape for name, t in first[kind].items())
    ]
    return pieces.fitted(parts, kinds, slots)


def _check_numbers(part: object, start: Mapping[str, Tensor], outer: Optimizer, every: int) -> None:
    """Checks the plain values of a share, and that its kinds are tensors by name.

    Raises:
        ValueError: it is not a LocalSteps', or does not fit this one.
    """
    if not isinstance(part, Mapping) or (missing := sorted({ROUNDS, THETA_0} - part.keys())):
        what = f"one without {', '.join(missing)}" if isinstance(part, Mapping) else type(part).__name__
        raise ValueError(f"state_dict: expected that of a LocalSteps, not of its DGCState, got {what}")
    about = part[ROUNDS]
    expected = {"every", "rounds", "position", "outer", "groups", "numbers"}
    if not isinstance(about, Mapping) or (missing := sorted(expected - about.keys())):
        what = f"none of {', '.join(missing)}" if isinstance(about, Mapping) else f"{about!r:.100}"
        raise ValueError(f"state_dict[{ROUNDS!r}]: expected {', '.join(sorted(expected))}, got {what}")
    for key, low, high in (("rounds", 0, 2**62), ("position", 0, every)):
        if type(about[key]) is not int or not low <= about[key] < high:
            raise ValueError(f"state_dict[{key!r}]: expected a number in [{low}, {high}), got {about[key]!r:.100}")
    if about["position"] and about["every"] != every:
        raise ValueError(
            f"every: expected {about['every']!r:.100}, as in the round that was saved half way, got {every}. Save "
            "after a round to change it"
        )
    if about["outer"] != type(outer).__name__:
        raise ValueError(
            f"outer: expected the optimizer that was saved, {about['outer']!r:.100}, got {type(outer).__name__}"
        )
    for kind in _kinds(part):
        if not isinstance(part[kind], Mapping) or not all(isinstance(t, Tensor) for t in part[kind].values()):
            raise ValueError(f"state_dict[{kind!r}]: expected tensors by parameter name, got {part[kind]!r:.100}")
    names = _names(start, outer)
    groups, numbers = about["groups"], about["numbers"]
    try:
        held = [name for group in groups for name in group["params"]]
        named = [name for values in numbers.values() for name in values]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"state_dict[{ROUNDS!r}]: expected groups and numbers by parameter name, got {groups!r:.100}"
        ) from error
    if len(groups) != len(outer.param_groups) or held != names or not set(named) <= set(names):
        raise ValueError(
            f"outer: expected the parameter groups that were saved, {len(groups)} of {', '.join(map(str, held[:5]))}, "
            f"got {len(outer.param_groups)} of {', '.join(names[:5])}. Make LocalSteps with the same model and outer"
        )


def _check_tensors(found: Mapping[str, Any], slots: Mapping[str, Slot], kind: str) -> None:
    """Checks the tensors of one kind by name.

    Raises:
        ValueError: names, shapes or values do not fit.
    """
    kept = kind.startswith(OUTER)
    if unknown := sorted(map(str, found.keys() - slots.keys() if kept else found.keys() ^ slots.keys())):
        raise ValueError(
            f"state_dict[{kind!r}]: expected this model's parameters, but it differs in {', '.join(unknown[:5])}"
        )
    for name, tensor in found.items():
        shape = slots[name].shape
        # An outer optimizer also keeps counts, and tensors that have no elements until they are needed.
        shapes = [shape, (), (0,)] if kept else [shape]
        if tensor is None or tuple(tensor.shape) not in shapes or not tensor.is_floating_point():
            got = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"state_dict[{kind!r}]: {name}: expected numbers {shape}, as this rank holds, got {got}")
        # An island whose weights are broken in the middle of a round says so in that round.
        if kind != THETA and not bool(tensor.isfinite().all()):
            raise ValueError(f"state_dict[{kind!r}]: {name}: expected finite values; the file is damaged")
