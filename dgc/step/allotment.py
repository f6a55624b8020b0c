"""Allotment: k of each parameter where one selection is made over all of them (DGCConfig.selection="global").

Sizes have to be known before a payload is made, so one threshold cannot be searched for at each step. It is approached:
all ranks have received the same payloads, and move the same entries for the steps to come. Everything is in integers,
which every machine adds up to the same result, in any order.

A magnitude is measured by the bits of its float32, read as an integer. They grow nearly as its logarithm, 2^23 for each
factor of two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.ops import wire
from dgc.ops.segments import Segments
from dgc.ops.selection import values_of_all

EVERY = 8
"""Steps from one change of the k's to the next. A change costs a bucket new tables and buffers, which are checked."""
NOT_IN_NODES = (
    'DGCState: expected DGCConfig(selection="parameter") where the ranks of a node divide momentum and residual '
    '(mesh=, nodes=), got "global": each rank would choose the numbers of entries for its own rows, which the others '
    'of its node need to read what it passes on. Set "parameter", leave that out, or shard the model by fully_shard'
)
"""What is said where nodes are the workers under DDP."""
_MOST_EXCESS = 2**25
"""What a value counts for at most beside the smallest of its parameter: a factor of 16. An exact zero has bits 0."""
_LEAST_EXCESS = 2**13
"""The least mean of all values' excess, 0.1 %, so that values that are all equal do not divide by zero."""
_SCALED = 2**20


class Part(NamedTuple):
    """One parameter's part of all entries, and its bounds."""

    entries: int
    """k."""
    least: int
    """The smallest k that it may have."""
    numel: int
    """Its elements, the largest."""


class Evidence(NamedTuple):
    """What the payloads of one step say of one parameter. Sums are over ranks."""

    lowest: int
    """Sum of the bits of each rank's smallest sent magnitude."""
    total: int
    """Sum of the bits of all sent magnitudes."""
    used: bool
    """Whether any rank's gradient of it was not zero."""


def evidence_of(selections: Tensor, segments: Segments, dtype: torch.dtype) -> Tensor:
    """Returns each parameter's Evidence: int64 [3, parameters], on the device.

    Args:
        selections: uint8 [rows, bytes], of all ranks, as received.
        segments: of the bucket.
        dtype: of the values.
    """
    bits = values_of_all(selections, segments, dtype).float().abs().view(torch.int32).long()
    owner = segments.column("segment_of_entry", bits.device)
    rows, parameters = len(bits), len(segments)
    lowest = bits.new_full((rows, parameters), 2**31).scatter_reduce(1, owner.expand(rows, -1), bits, "amin")
    total = bits.new_zeros(parameters).index_add(0, owner, bits.sum(0))
    at = segments.wire(dtype).used
    used = (selections[:, at : at + parameters] & wire.USED).amax(0)
    return torch.stack([lowest.sum(0), total, used.long()])


def moved(parts: Sequence[Part], evidence: Sequence[Evidence | None], rows: int) -> list[int]:
    """Returns the next k of each parameter, with the same sum: half of a Newton step towards one threshold.

    Of a parameter that sends k entries above a threshold of bits t, with a mean excess of e bits over it, about
    k * (1 + (t - x) / e) lie above another threshold x: the slope of a Pareto tail, whose exponent is Hill's estimate
    (Annals of Statistics 3(5), 1975). x is that at which they add up to what there is. Half of the way is gone, since a
    single step is noisy, and none is more than doubled or halved. So nothing moves where all thresholds are equal.

    Args:
        parts: of all parameters.
        evidence: in the same order; None, or one that is not used, keeps its k.
        rows: number of payloads that the evidence sums over.
    """
    excess = [
        0 if e is None else min(e.total - p.entries * e.lowest, rows * (p.entries - 1) * _MOST_EXCESS)
        for p, e in zip(parts, evidence, strict=True)
    ]
    # The smallest has no excess over itself, so k - 1 of k count; one with the mean of all parameters joins them.
    counted = sum(rows * (p.entries - 1) for p, e in zip(parts, evidence, strict=True) if e is not None)
    joining = rows * max(_LEAST_EXCESS, sum(excess) // max(1, counted))
    moving = [
        (p, e.lowest, 2 * (s + joining))
        for p, e, s in zip(parts, evidence, excess, strict=True)
        if e is not None and e.used
    ]
    if not moving:
        return [p.entries for p in parts]

    def at(minus_x: int) -> list[int]:
        """Returns k of those that move; `minus_x` is -rows * x, so that more of it gives more entries."""
        return [
            min(
                max(p.entries + _rounded(p.entries**2 * (lowest + minus_x), twice), p.least, p.entries // 2),
                p.numel,
                2 * p.entries,
            )
            for p, lowest, twice in moving
        ]

    thresholds = [lowest for _, lowest, _ in moving]
    found = iter(filled(at, -max(thresholds), -min(thresholds), sum(p.entries for p, _, _ in moving)))
    return [p.entries if e is None or not e.used else next(found) for p, e in zip(parts, evidence, strict=True)]


def scaled(parts: Sequence[Part], budget: int) -> list[int]:
    """Returns k of each parameter in the present proportions, but with another sum, for a phase of another density."""

    def at(factor: int) -> list[int]:
        return [min(max(p.entries * factor // _SCALED, p.least), p.numel) for p in parts]

    return filled(at, 0, _SCALED * max(p.numel for p in parts), budget)


def filled(at: Callable[[int], list[int]], low: int, high: int, budget: int) -> list[int]:
    """Returns numbers that add up to exactly a budget, between those of two neighbouring arguments of a function.

    Args:
        at: returns numbers none of which falls where its argument grows.
        low: an argument at which they add up to the budget at most.
        high: one at which they add up to it at least.
        budget: their sum.
    """
    while high - low > 1:
        middle = (low + high) // 2
        if sum(at(middle)) <= budget:
            low = middle
        else:
            high = middle
    found, more = at(low), at(high)
    left = budget - sum(found)
    for i, (few, many) in enumerate(zip(found, more, strict=True)):
        added = min(many - few, left)
        found[i] += added
        left -= added
    return found


def _rounded(numerator: int, denominator: int) -> int:
    """Returns a quotient, rounded to the nearest."""
    return (2 * numerator + denominator) // (2 * denominator)


class Allotment:
    """The k of all parameters that are compressed in the present phase.

    Attributes:
        entries: k by name, in an order that is equal on all ranks; empty before the first compressed phase.
    """

    def __init__(self) -> None:
        """Starts without any."""
        self.entries: dict[str, int] = {}
        self._bounds: dict[str, tuple[int, int]] = {}

    def enter(self, plain: Mapping[str, int], bounds: Mapping[str, tuple[int, int]]) -> None:
        """Makes the k's fit a phase. Where they do already, as those of a checkpoint, they stay.

        Args:
            plain: k of each parameter that the phase compresses, were it selected from alone; their sum is the budget.
            bounds: the least k of each, and its elements.
        """
        self._bounds = dict(bounds)
        if not plain:
            return  # a dense phase; what comes after it goes on from here
        known = {name: self.entries.get(name, k) for name, k in plain.items()}
        fits = all(least <= known[name] <= numel for name, (least, numel) in bounds.items())
        budget = sum(plain.values())
        if not fits or sum(known.values()) != budget:
            parts = [Part(k, *bounds[name]) for name, k in known.items()]
            known = dict(zip(known, scaled(parts, budget), strict=True))
        self.entries = known

    def learn(self, evidence: Mapping[str, Evidence], rows: int) -> None:
        """Moves entries between the parameters, after a step of which all payloads were received.

        Args:
            evidence: by name; those that were not reduced in this step are missing, and keep their k.
            rows: number of payloads.
        """
        names = [*self.entries]
        parts = [Part(k, *self._bounds[name]) for name, k in self.entries.items()]
        self.entries = dict(zip(names, moved(parts, [evidence.get(n) for n in names], rows), strict=True))
