"""Exchange: a bucket's two collectives, and the agreement at the start. The only file that talks to other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

# Renamed in torch 2.13, where the old name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Exchange:
    """A process group as DGC uses it; one rank by itself where torch.distributed is not initialised."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Takes the default group unless another is given."""
        self.active = dist.is_available() and dist.is_initialized()
        self.group = process_group
        self.rank = dist.get_rank(process_group) if self.active else 0
        self.world_size = dist.get_world_size(process_group) if self.active else 1

    def start(self, payload: Tensor | None, gathered: Tensor | None, dense: Tensor | None) -> Future[list[Any]]:
        """Starts the all-gather of a payload and the all-reduce (sum) of dense gradients; either may be None.

        Every rank must call this for the same buckets in the same order, from inside the hook: a collective started
        in a callback could meet another rank's next one.

        Args:
            payload: uint8 [bytes], this rank's.
            gathered: uint8 [world size, bytes], receives all.
            dense: any float type, summed in place.

        Returns:
            A future that completes when both have. It completes too when one fails: read value() of every future in
            its list before touching the tensors.
        """
        futures = []
        if payload is not None and gathered is not None:
            if self.world_size == 1:
                gathered[0].copy_(payload)
            else:
                work = _all_gather(gathered.view(-1), payload, group=self.group, async_op=True)
                futures.append(work.get_future())
        if dense is not None and self.world_size > 1:
            work = dist.all_reduce(dense, group=self.group, async_op=True)
            futures.append(work.get_future())
        return torch.futures.collect_all(futures)

    def agree(self, mine: Mapping[str, object]) -> None:
        """Compares a description of this rank's set-up with all others'; a collective.

        Raises:
            ValueError: on every rank, naming what differs and where.
        """
        if self.world_size == 1:
            return
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, dict(mine), group=self.group)
        wrong = [
            f"{key}: rank 0 has {everyone[0].get(key)!r}, rank {rank} has {other.get(key)!r}"
            for rank, other in enumerate(everyone)
            for key in dict.fromkeys([*everyone[0], *other])
            if everyone[0].get(key) != other.get(key)
        ]
        if wrong:
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise ValueError(
                "DGCState: expected the same configuration and parameters on all ranks, but "
                + "; ".join(wrong[:5])
                + more
            )
