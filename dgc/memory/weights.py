"""Weights: how the shares of one group of ranks are divided among another."""

from __future__ import annotations

from collections.abc import Iterable


def weights(rank: int, world_size: int, before: int) -> dict[int, float]:
    """Returns the weights with which a rank takes over the shares of another group; proof in docs/reliability.md.

    The M old shares are the unit intervals [s, s+1) of a line, which is divided anew into N equal intervals, one for
    each new rank. Rank r gets share s with the weight (N/M) * |[rM/N, (r+1)M/N) intersected with [s, s+1)|. Each rank's
    weights add up to 1 and each share's to N/M, so the mean over the ranks stays the same. With N = M each rank gets
    its own share.

    Args:
        rank: r, in the new group.
        world_size: N, the size of the new group.
        before: M, the size of the old group.

    Returns:
        Weights by s, without those that are 0.
    """
    begin, end = rank * before, (rank + 1) * before
    pieces = range(begin // world_size, -(-end // world_size))
    return {s: (min(end, (s + 1) * world_size) - max(begin, s * world_size)) / before for s in pieces}


def taken(rank: int, world_size: int, before: int, there: Iterable[int]) -> list[int]:
    """Returns the shares that a rank reads, among those that can be read, in their order.

    Args:
        rank: this process's present share.
        world_size: present number of shares.
        before: number of shares when they were saved.
        there: the shares that can be read.
    """
    wanted = weights(rank, world_size, before)
    # Where all are missing, any share supplies the momentum that is equal on all ranks.
    return sorted(wanted.keys() & set(there)) or sorted(there)[:1]
