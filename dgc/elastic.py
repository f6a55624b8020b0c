"""Elastic runs: momentum and residual when ranks come and go."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass

from .exchange import Exchange
from .memory import Memory

logger = logging.getLogger("dgc")


@dataclass(frozen=True)
class Share:
    """What a rank brings into a new group: whose share of the residual its memory holds, and where the run stands."""

    rank: int
    world_size: int
    """Of the group in which the share was accumulated."""
    step: int
    dense: bool
    diverged: list[str]
    """Parameters whose momentum is a share too; that of the others is the same on all ranks."""
    momentum: bool
    """Whether there is any."""


def regroup(exchange: Exchange, memory: Memory, mine: Share | None) -> Share | None:
    """Takes momentum and residual over into the group of ranks that exchange has now; a collective.

    What is still to come, the mean over all ranks of u and v, stays the same but for the shares of ranks that left:
    with N ranks instead of M, each survivor's share is multiplied by N/M. Newcomers' shares are zero, and they get the
    momentum that is the same on all ranks from a survivor.

    Args:
        exchange: of the new group.
        memory: this rank's, which changes.
        mine: what this rank brings; None where it is new.

    Returns:
        What any survivor brought: where the run stands. None where all ranks are new.

    Raises:
        RuntimeError: survivors come from different groups or steps.
    """
    texts = exchange.everyone(json.dumps(mine and asdict(mine)))
    brought = [None if share is None else Share(**share) for share in map(json.loads, texts)]
    survivors = [share for share in brought if share is not None]
    if not survivors:
        return None
    one = survivors[0]
    if any({**asdict(share), "rank": one.rank} != asdict(one) for share in survivors):
        where = "; ".join(
            f"rank {rank} was rank {share.rank} of {share.world_size} at step {share.step}"
            for rank, share in enumerate(brought)
            if share is not None
        )
        raise RuntimeError(
            f"DGCState.regroup: expected all ranks from one group at one step, but {where}. Commit and restore them "
            "together: hvd.elastic.TorchState(model=model, optimizer=optimizer, dgc=optimizer.dgc_state)"
        )
    memory.diverged = set(one.diverged)
    if one.momentum:
        memory.allocate_momentum()
    if exchange.world_size != one.world_size:
        memory.scale(exchange.world_size / one.world_size)
    if len(survivors) < exchange.world_size and one.momentum:
        same = [name for name in memory.parameters if name not in memory.diverged]
        exchange.broadcast([memory.flat_momentum(name) for name in same], root=brought.index(one))
    if exchange.rank == 0:
        _log(one.world_size, {share.rank for share in survivors}, exchange.world_size)
    return one


def _log(before: int, survivors: set[int], now: int) -> None:
    logger.info(
        "dgc: %d ranks now, %d before, %d new; residuals multiplied by %d/%d",
        *(now, before, now - len(survivors), now, before),
    )
    if lost := sorted(set(range(before)) - survivors):
        logger.warning(
            "dgc: rank %s of %d left: what it had not sent is lost, %d/%d of all that waited",
            *(", ".join(map(str, lost)), before, len(lost), before),
        )
