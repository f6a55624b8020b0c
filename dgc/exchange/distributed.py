"""The exchange over torch.distributed: a process group, and on a GPU the order of work on three streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_object_coll_device
from torch.futures import Future

from .base import Exchange

# Renamed in torch 2.13, where the old name warns.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def is_alive(group: dist.ProcessGroup) -> bool:
    """Returns whether a process group still exists; destroy_process_group() ends it."""
    try:
        return _default_group() is not None and dist.get_rank(group) >= 0
    except ValueError:
        return False


def _default_group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def everyone_of(group: dist.ProcessGroup | None, text: str) -> list[str]:
    """Returns the texts of a group's ranks, in their order; a collective.

    Raises:
        RuntimeError: a rank has gone.
    """
    # As bytes, since all_gather_object() needs numpy, which torch does not bring, and unpickles what comes.
    data = text.encode()
    world_size, device = dist.get_world_size(group), _get_object_coll_device(group)
    lengths = torch.empty(world_size, dtype=torch.int64, device=device)
    try:
        all_gather(lengths, torch.tensor([len(data)], device=device), group=group)
        longest = max(1, int(lengths.max()))
        mine = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8).to(device)
        everyone = torch.empty(world_size * longest, dtype=torch.uint8, device=device)
        all_gather(everyone, mine, group=group)
    except RuntimeError as error:
        raise failed("the comparison of the ranks", error) from error
    rows = everyone.view(world_size, longest).tolist()
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths.tolist(), strict=True)]


def failed(what: str, error: RuntimeError) -> RuntimeError:
    """Returns an error that explains why a collective failed."""
    return RuntimeError(
        f"dgc: {what} failed, since a rank has gone, hangs, or has run fewer backward passes than this one: look at "
        f"the other ranks' logs for its reason, and restart all ranks from a checkpoint. The backend says: {error}"
    )


class DistributedTransfer:
    """The collectives of one bucket over torch.distributed.

    On a GPU, work on three streams has to come in this order:

    - Compression before the collectives. The hook queues both on its current stream. NCCL's stream waits for that
      stream, and gloo copies to the host on a stream that waits for it.
    - The collectives before unpacking. NCCL's future completes when the collective has been queued, not when it is
      done. A future of collect_all carries no stream, so its callback is in order with no stream. `arrived` therefore
      puts unpacking on a stream of our own, which waits for the collectives. The stream of the backward pass must not
      wait, or nothing would overlap.
    - Unpacking before the optimizer. The future that DDP gets is made for the device, and records an event on our
      stream when it is completed. DDP's wait makes the stream of the backward pass wait for that event.
    """

    def __init__(self, works: list[dist.Work], stream: torch.cuda.Stream | None) -> None:
        """Takes the collectives, and on a GPU the stream for what follows them."""
        self._works = works
        self._stream = stream
        self._futures = [work.get_future() for work in works]
        self.done: Future[list[Any]] = torch.futures.collect_all(self._futures)
        # With one rank there is no collective to wait for, but start() has copied the payload on this stream.
        self._queued = None if stream is None else torch.cuda.current_stream(stream.device).record_event()

    @contextmanager
    def arrived(self) -> Iterator[None]:
        """Runs its body on a stream that waits for the collectives; see Transfer."""
        try:
            for future in self._futures:
                if future.done():  # where one has failed, the other may be under way
                    future.value()
        except RuntimeError as error:
            raise failed("the exchange of gradients", error) from error
        if self._stream is None or self._queued is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._queued)
            for work in self._works:
                work.synchronize()  # only this stream waits
            yield


class DistributedExchange(Exchange):
    """The exchange in a process group, or of a single rank where torch.distributed is not initialised."""

    go_on = (
        "If no exception ended it, parameters were unused: find_unused_parameters=True. DDP cannot go on after such a "
        "pass: call state.discard(drop_gradient=False) and zero_grad(), delete the DDP model, wrap the module again "
        "and call state.register(model); or restart from a checkpoint"
    )

    def __init__(self, device: torch.device, process_group: dist.ProcessGroup | None = None) -> None:
        """Takes process_group for good; without one, the default group until bind() replaces it by DDP's.

        Args:
            device: the device of all tensors that are exchanged.
            process_group: a group that this process is in.

        Raises:
            ValueError: this process is not in process_group.
            RuntimeError: torch.distributed is not initialised, or was shut down since process_group was made.
        """
        self.group = process_group
        self._given = process_group is not None
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.refresh()
        self._settled = self._given

    @property
    def changed(self) -> bool:  # type: ignore[override]
        """Whether refresh() has not seen the group yet, or torch.distributed was initialised again since then."""
        return not self._settled or self._world is not _default_group()

    def bind(self, group: dist.ProcessGroup) -> None:
        """Takes the group of the DDP module whose gradients come, in force from the next refresh() on.

        Raises:
            ValueError: DGCState was made with another process_group.
        """
        if group is self.group:
            return
        if self._given:
            raise ValueError(
                f"process_group: expected DDP's, of ranks {dist.get_process_group_ranks(group)}, got one of ranks "
                f"{self.ranks}. Leave process_group out: state.register(model) takes it from DDP"
            )
        self.group = group
        self._settled = False

    def refresh(self) -> None:
        """Updates rank and world_size to the present group.

        Raises:
            ValueError, RuntimeError: as __init__.
        """
        self._world = _default_group()
        self.rank, self.world_size = self._place()
        self._settled = True

    def _place(self) -> tuple[int, int]:
        if self._world is None and self.group is None:
            return 0, 1
        try:
            rank, world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        except ValueError as error:
            raise RuntimeError(
                "process_group: expected one that exists, got one from before torch.distributed was shut down. "
                "Wrap the model in DistributedDataParallel again and call state.register(model)"
            ) from error
        if rank < 0:
            raise ValueError("process_group: expected one that this process is in, got one of other processes")
        return rank, world_size

    @property
    def ranks(self) -> list[int]:
        """The group's ranks, by their numbers in the default group; [0] where torch.distributed is not initialised."""
        return [0] if _default_group() is None else dist.get_process_group_ranks(self.group)

    @property
    def everyones_group(self) -> dist.ProcessGroup | None:
        """The group of all that exchange; None for the default group, or without torch.distributed."""
        return self.group

    def roll_back(self, rank: int, world_size: int) -> None:
        """Sets rank and world_size to those of an earlier group, until the next refresh()."""
        super().roll_back(rank, world_size)
        self._settled = False

    def future(self) -> Future[Tensor]:
        """Returns a future; on a GPU, its wait() makes the current stream wait for the stream of `arrived`."""
        return Future(devices=None if self._stream is None else [self._device])

    def start(
        self, name: str, payload: Tensor | None, gathered: Tensor | None, dense: Tensor | None
    ) -> DistributedTransfer:
        """Starts both collectives; see Exchange. A process group matches them by order, not by name."""
        works: list[dist.Work] = []
        rows = self.topology.rows
        if payload is not None and gathered is not None:
            if rows == 1:
                gathered[0].copy_(payload)
            else:
                works.append(all_gather(gathered.view(-1), payload, group=self.group, async_op=True))
        if dense is not None and dense.numel() and rows > 1:
            dense.div_(rows)  # before the sum, as DDP divides, so that 16-bit sums do not overflow
            works.append(dist.all_reduce(dense, group=self.group, async_op=True))
        return DistributedTransfer(works, self._stream)

    def everyone(self, text: str) -> list[str]:
        """Returns the texts of all ranks, in their order; a collective."""
        return [text] if self.world_size == 1 else everyone_of(self.group, text)

    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        """Copies one rank's contiguous tensors to all other ranks; a collective."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, group_src=root, group=self.group)
