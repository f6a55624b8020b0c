"""Saved rounds of dgc.LocalSteps: what is read back, and what each island takes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgc.local import local
from dgc.memory.share import Share, unwrap
from dgc.memory.weights import weights

VERSION = 1


class Saved(NamedTuple):
    """What islands have saved together."""

    shares: list[Mapping[str, Any]]
    """DGCState's, of all of them."""
    outer: dict[str, Any]
    start: Mapping[str, Tensor]
    """theta_0, equal on all islands."""
    rounds: int
    islands: int
    """Their number at that time."""
    positions: Mapping[int, int]
    """Inner steps since the last round, by island."""
    weights: Mapping[int, Mapping[str, Tensor]]
    """theta of the islands whose weights had left theta_0, as in the middle of a round."""

    def position_of(self, island: int, islands: int) -> int:
        """Returns the place in the round of an island, among the present ones."""
        return max(self.positions.get(s, 0) for s in weights(island, islands, self.islands))

    def weights_of(self, name: str, island: int, islands: int) -> Tensor:
        """Returns theta of an island, among the present ones: theta_0 less its part of how far all had come.

        The parts are those of e, so the mean of the differences stays the same.
        """
        parts = weights(island, islands, self.islands)
        if parts == {island: 1.0}:
            return self.weights.get(island, self.start)[name]
        start = self.start[name]
        moved = torch.zeros_like(start)
        for s, weight in parts.items():
            if s in self.weights:
                moved.add_(start - self.weights[s][name].to(start), alpha=weight)
        return start - moved


def read(state_dicts: Sequence[Mapping[str, Any]], start: Mapping[str, Tensor], every: int) -> Saved:
    """Checks what some islands have saved.

    Args:
        state_dicts: of LocalSteps, of one island or of all.
        start: the present theta_0, for names and shapes.
        every: the present H.

    Raises:
        ValueError: they do not fit each other or this model; the message names what.
    """
    if not state_dicts:
        raise ValueError("state_dict: expected at least one, got none")
    shares: list[Mapping[str, Any]] = []
    positions: dict[int, int] = {}
    theirs: dict[int, Mapping[str, Tensor]] = {}
    islands = 0
    for one in state_dicts:
        expected = {"version", "every", "rounds", "position", "start", "weights", "outer", "dgc"}
        if not isinstance(one, Mapping) or (missing := sorted(expected - one.keys())):
            what = f"one without {', '.join(missing)}" if isinstance(one, Mapping) else type(one).__name__
            raise ValueError(f"state_dict: expected that of a LocalSteps, got {what}")
        if one["version"] != VERSION:
            raise ValueError(f"state_dict['version']: expected {VERSION}, got {one['version']!r:.100}")
        for key, low, high in (("rounds", 0, 2**62), ("position", 0, every)):
            if type(one[key]) is not int or not low <= one[key] < high:
                raise ValueError(f"state_dict[{key!r}]: expected a number in [{low}, {high}), got {one[key]!r:.100}")
        if one["position"] and one["every"] != every:
            raise ValueError(
                f"every: expected {one['every']!r:.100}, as in the round that was saved half way, got {every}. Save "
                "after a round to change it"
            )
        _check(one["start"], start, "start")
        if one["weights"]:
            _check(one["weights"], start, "weights")
        (about,) = map(Share.of, unwrap(one["dgc"]))
        shares += unwrap(one["dgc"])
        islands = about.world_size
        positions[about.rank] = one["position"]
        if one["weights"]:
            theirs[about.rank] = one["weights"]
    first = state_dicts[0]
    for one in state_dicts:
        if one["rounds"] != first["rounds"]:
            raise ValueError(f"state_dict: expected one round, got {first['rounds']} and {one['rounds']}")
        same = [
            torch.equal(one["start"][n].cpu(), t.cpu())
            for n, t in first["start"].items()
            if t.shape == one["start"][n].shape
        ]
        if not all(same):
            raise ValueError(
                "state_dict: expected the same theta_0 of all islands, got others: they are of different runs"
            )
    return Saved(shares, first["outer"], first["start"], first["rounds"], islands, positions, theirs)


def _check(found: object, expected: Mapping[str, Tensor], what: str) -> None:
    """Checks tensors by name.

    Raises:
        ValueError: names, shapes or values do not fit.
    """
    if not isinstance(found, Mapping) or found.keys() != expected.keys():
        names = (
            sorted(map(str, found.keys() ^ expected.keys())) if isinstance(found, Mapping) else [type(found).__name__]
        )
        raise ValueError(
            f"state_dict[{what!r}]: expected this model's parameters, but it differs in {', '.join(names[:5])}"
        )
    for name, tensor in expected.items():
        one, shape = found[name], tuple(local(tensor).shape)
        if not isinstance(one, Tensor) or tuple(one.shape) != shape or not one.is_floating_point():
            got = f"{one.dtype} {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
            raise ValueError(f"state_dict[{what!r}]: {name}: expected numbers {shape}, as this rank holds, got {got}")
        # An island whose weights are broken in the middle of a round says so in that round.
        if what == "start" and not bool(one.isfinite().all()):
            raise ValueError(f"state_dict['start']: {name}: expected finite values; the file is damaged")
