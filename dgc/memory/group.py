"""Groups: collectives that collect all ranks' shares in one state_dict, or take shares over into another group."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from dgc.exchange.base import Exchange
from dgc.exchange.islands import IslandExchange

from .memory import Memory
from .share import Share, differences, log_lost, wrap

logger = logging.getLogger("dgc")


def gather(exchange: Exchange, memory: Memory, own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all ranks' shares as a state_dict on rank 0, and {} elsewhere; a collective.

    Args:
        exchange: of the group.
        memory: this rank's.
        own: this rank's share, with views of the memory.
    """
    flats = {"residual": memory.residual, **memory.kinds}
    texts = exchange.everyone(json.dumps({k: v for k, v in own.items() if k not in {"momentum", *flats}}))
    ranks: dict[int, Mapping[str, Any]] = {}
    for rank, text in enumerate(texts):
        about = json.loads(text)
        if about["rank"] in ranks:
            continue  # ranks that share a payload have the same share
        # One share at a time, since all at once would need a rank's memory as often as there are ranks.
        theirs = {kind: flat.clone() for kind, flat in flats.items()}
        exchange.broadcast(list(theirs.values()), root=rank)
        ranks[about["rank"]] = {**about, **(memory.state_dict_of(theirs) if exchange.rank == 0 else {})}
    return wrap(ranks) if exchange.rank == 0 else {}


def gather_parts(exchange: IslandExchange, memory: Memory, own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all parts of all nodes' shares as a state_dict on the first rank, and {} elsewhere; a collective.

    Args:
        exchange: of the nodes.
        memory: this rank's.
        own: this rank's part, with views of its memory.

    Raises:
        RuntimeError: a rank has gone.
    """
    kinds = [kind for kind, value in own.items() if _by_name(value)]
    about = {key: value for key, value in own.items() if key not in {"momentum", *kinds}}
    shapes = {kind: {name: list(tensor.shape) for name, tensor in own[kind].items()} for kind in kinds}
    ranks: dict[int, Mapping[str, Any]] = {}
    for rank, text in enumerate(exchange.everyone(json.dumps([about, shapes]))):
        about, shapes = json.loads(text)
        share = {"momentum": {}, **about}
        for kind, shape_of in shapes.items():
            # One kind of one rank at a time, since a GPU need not have room for more.
            sizes = [math.prod(shape) for shape in shape_of.values()]
            if exchange.rank == rank:
                flat = torch.cat([tensor.reshape(-1) for tensor in own[kind].values()])
            else:
                flat = torch.empty(sum(sizes), dtype=torch.float32, device=memory.residual.device)
            if len(flat):
                exchange.bring(flat, rank)
            if exchange.rank == 0:
                parts = zip(flat.cpu().split(sizes), shape_of.items(), strict=True)
                # Copies, since a view would be pickled with the whole of flat.
                share[kind] = {name: part.view(shape).clone() for part, (name, shape) in parts}
        ranks[rank] = share
    return wrap(ranks) if exchange.rank == 0 else {}


def _by_name(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(tensor, Tensor) for tensor in value.values())


def regroup(exchange: Exchange, memory: Memory, mine: Share | None, averages: Collection[str] = ()) -> Share | None:
    """Takes momentum and residual over into the group of ranks that exchange has now; a collective.

    The update still to come is the mean of all shares of u and v. With N shares instead of M, each survivor's is
    multiplied by N/M to keep that mean; only the shares of ranks that left are lost. Newcomers start with shares of
    zero, and receive from a survivor the momentum that is equal on all ranks.

    Args:
        exchange: of the new group.
        memory: this rank's, which changes.
        mine: the share that this rank brings; None for a newcomer.
        averages: kinds that are not divided. Survivors keep theirs, and newcomers get the survivors' mean.

    Returns:
        A survivor's share, which has the step, density and dense switch of the run. None where all ranks are new.

    Raises:
        RuntimeError: survivors come from different groups or steps, or several bring the same share.
    """
    texts = exchange.everyone(json.dumps(mine and asdict(mine)))
    brought = [None if share is None else Share(**share) for share in map(json.loads, texts)]
    survivors = {f"rank {rank}": share for rank, share in enumerate(brought) if share is not None}
    if not survivors:
        return None
    one = next(iter(survivors.values()))
    topology = exchange.topology
    of_each = topology.ranks // topology.shares  # ranks that have the same share
    if len({share.rank for share in survivors.values()}) * of_each < len(survivors):
        raise RuntimeError(
            "DGCState: expected each rank to bring a share of its own, but "
            + "; ".join(f"{who} was rank {share.rank} of {share.world_size}" for who, share in survivors.items())
            + ". What ranks have trained, loaded or unpickled each by itself cannot be put together: call "
            "init_process_group() first, then load on each rank the state_dict() that it saved, or dgc.checkpoint"
        )
    if differ := differences(survivors):
        raise RuntimeError(
            f"DGCState.regroup: expected all ranks from one group at one step, but {differ}. Commit and restore them "
            "together: hvd.elastic.TorchState(model=model, optimizer=optimizer, dgc=optimizer.dgc_state)"
        )
    memory.diverged = set(one.diverged)
    memory.allocate(one.kinds)
    if topology.shares != one.world_size:
        memory.scale(topology.shares / one.world_size, averages)
    if len(survivors) < topology.ranks and one.kinds:
        same = [name for name in memory.slots if name not in memory.diverged]
        exchange.broadcast([memory.flat(kind, name) for kind in one.kinds for name in same], root=brought.index(one))
        _average(exchange, memory, mine is not None, len(survivors), [kind for kind in one.kinds if kind in averages])
    if exchange.rank == 0:
        before, now = one.world_size, topology.shares
        logger.info(
            "dgc: %d ranks now, %d before, %d new; residuals multiplied by %d/%d",
            now,
            before,
            topology.ranks - len(survivors),
            now,
            before,
        )
        if lost := sorted(set(range(before)) - {share.rank for share in survivors.values()}):
            log_lost(lost, before)
    # Ranks that hold the model together have k's of their own.
    entries = next((s.entries for s in survivors.values() if s.place == topology.place), [])
    return replace(one, entries=entries)


def _average(exchange: Exchange, memory: Memory, survivor: bool, survivors: int, kinds: Sequence[str]) -> None:
    """Gives newcomers the survivors' mean of some kinds, where they differ between ranks; a collective."""
    for kind in kinds:
        for name in sorted(memory.diverged):
            own = memory.flat(kind, name)
            mean = own * (exchange.world_size / survivors) if survivor else torch.zeros_like(own)
            transfer = exchange.start(f"mean of {kind} {name}", None, None, mean)
            exchange.finish()
            transfer.done.wait()
            with transfer.arrived():
                if not survivor:
                    own.copy_(mean)
