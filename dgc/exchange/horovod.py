"""The exchange over Horovod's collectives."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor
from torch.futures import Future

from .base import Exchange


class HorovodTransfer:
    """The collectives of one bucket; `finish` waits for them.

    On a GPU, Horovod waits for the current stream before it reads a tensor, and a handle is done only when its result
    is complete. No second stream is needed.
    """

    def __init__(self) -> None:
        """Starts without collectives."""
        self.done: Future[Any] = Future()
        self._handles: list[tuple[int, Tensor | None]] = []
        self._error: Exception | None = None

    def add(self, handle: int, gathered: Tensor | None = None) -> None:
        """Adds a collective; the result of an all-gather or an all-to-all goes to `gathered`."""
        self._handles.append((handle, gathered))

    def finish(self) -> None:
        """Waits for the collectives, then completes `done`, whose callbacks run here."""
        for handle, gathered in self._handles:
            # Also after one has failed, since Horovod reads and writes the tensors of the others until they are done.
            self._error = _wait(handle, gathered) or self._error
        self.done.set_result(None)

    @contextmanager
    def arrived(self) -> Iterator[None]:
        """Raises the error of a failed collective; see Transfer."""
        if self._error is not None:
            raise self._error
        yield


def everyone_of(process_set: Any, text: str) -> list[str]:
    """Returns the texts of a process set's ranks, in their order; a collective."""
    mine = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)  # torch takes no empty buffer
    length = torch.tensor([len(mine)], device="cpu")
    lengths = hvd.allgather(length, name="dgc.lengths", process_set=process_set).tolist()
    texts = hvd.allgather(mine, name="dgc.texts", process_set=process_set).split(lengths)
    return [bytes(t[:-1].tolist()).decode() for t in texts]


def broadcast_in(process_set: Any, tensors: Sequence[Tensor], root: int) -> None:
    """Copies the tensors of a process set's rank `root` to its other ranks; a collective."""
    root_rank = process_set.ranks[root]
    handles = [
        hvd.broadcast_async_(t, root_rank, name=f"dgc.broadcast.{i}", process_set=process_set)
        for i, t in enumerate(tensors)
    ]
    for handle in handles:
        hvd.synchronize(handle)


def _wait(handle: int, gathered: Tensor | None) -> Exception | None:
    """Waits for a collective; returns its error, or None."""
    try:
        # hvd.synchronize() spins on a core that Horovod's own thread may need. With as many processes as cores, that
        # made one wait in ten 10 ms long instead of 2.
        while not hvd.poll(handle):
            time.sleep(1e-4)
        output = hvd.synchronize(handle)
    except (HorovodInternalError, ValueError) as error:  # ValueError: a handle that Horovod does not know any more
        failure: Exception = error
        return failure
    if isinstance(output, tuple):  # an all-to-all also says how much has come from each rank
        output = output[0]
    if gathered is not None:
        # Horovod also gathers tensors of different lengths, without an error.
        if output.numel() != gathered.numel():
            return RuntimeError(
                f"dgc.horovod: expected {gathered[0].numel()} bytes from each of {len(gathered)} ranks, got "
                f"{output.numel()} in all: ranks send different buckets, or are at different steps of the warm-up"
            )
        gathered.copy_(output.view(gathered.shape))
    return None


class HorovodExchange(Exchange):
    """The exchange in a process set of Horovod, which matches collectives by name, not by order."""

    # Horovod's torch adapter has no bfloat16.
    reducible = (torch.float32, torch.float16)

    def __init__(
        self,
        device: torch.device,
        process_set: Any = hvd.global_process_set,
        predivide_factor: float = 1.0,
        agreed: Mapping[str, object] | None = None,
    ) -> None:
        """Takes the global process set unless another is given.

        Args:
            device: the device of all tensors that are exchanged.
            process_set: a horovod.torch.ProcessSet. A process outside of it runs as a single rank.
            predivide_factor: divides dense gradients before the sum; world size / predivide_factor divides the sum.
            agreed: further values that must be equal on all ranks, besides DGCState's own description.
        """
        self.elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
        self._device = device
        self.process_set = process_set
        self._predivide_factor = predivide_factor
        self._agreed = dict(agreed or {})
        self._under_way: list[HorovodTransfer] = []
        self._stale = True
        self.rank, self.world_size = self._place()

    def _place(self) -> tuple[int, int]:
        return (self.process_set.rank(), self.process_set.size()) if self.process_set.included() else (0, 1)

    @property
    def changed(self) -> bool:  # type: ignore[override]
        """Whether ranks may have come or gone since the last refresh(); False in a run that is not elastic."""
        return self.elastic and (self._stale or self._place() != (self.rank, self.world_size))

    def agreeing_on(self, agreed: Mapping[str, object]) -> HorovodExchange:
        """Returns the exchange of the same ranks, between two passes, for a model that has changed."""
        other = copy.copy(self)
        other._agreed, other._under_way = dict(agreed), []
        return other

    def refresh(self) -> None:
        """Updates rank and world_size to the present process set."""
        self.rank, self.world_size = self._place()
        self._stale = False

    def roll_back(self, rank: int, world_size: int) -> None:
        """Sets rank and world_size to those of an earlier group, until the next refresh()."""
        super().roll_back(rank, world_size)
        self._stale = True

    def future(self) -> Future[Tensor]:
        """Returns a future for a reduced tensor."""
        return Future(devices=[self._device] if self._device.type == "cuda" else None)

    def start(
        self, name: str, payload: Tensor | None, gathered: Tensor | None, dense: Tensor | None
    ) -> HorovodTransfer:
        """Starts both collectives; see Exchange. finish() completes them."""
        transfer, rows = HorovodTransfer(), self.topology.rows
        # Listed first, since finish() has to wait for the first collective even if the second fails to start.
        self._under_way.append(transfer)
        if payload is not None and gathered is not None:
            if rows == 1:
                gathered[0].copy_(payload)
            else:
                handle = hvd.allgather_async(payload, name=f"dgc.payload.{name}", process_set=self.process_set)
                transfer.add(handle, gathered)
        if dense is not None and rows > 1:
            handle = hvd.allreduce_async_(
                dense,
                name=f"dgc.dense.{name}",
                op=hvd.Sum,
                prescale_factor=1 / self._predivide_factor,
                postscale_factor=self._predivide_factor / rows,
                process_set=self.process_set,
            )
            transfer.add(handle)
        return transfer

    def finish(self) -> None:
        """Waits for all started transfers, in the order of their start; `arrived` of a failed one raises its error."""
        under_way, self._under_way = self._under_way, []
        for transfer in under_way:
            transfer.finish()

    def everyone(self, text: str) -> list[str]:
        """Returns the texts of all ranks, in their order; a collective."""
        return [text] if self.world_size == 1 else everyone_of(self.process_set, text)

    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        """Copies one rank's tensors to all other ranks; a collective."""
        broadcast_in(self.process_set, tensors, root)

    def agree(self, mine: Mapping[str, object]) -> None:
        """Compares a description of this rank's set-up with all others'; see Exchange."""
        super().agree({**mine, **self._agreed})
