"""Exchange: how ranks talk. A bucket's two collectives and the agreement at the start; here over torch.distributed."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

# Renamed in torch 2.13, where the old name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Transfer(Protocol):
    """The collectives of one bucket, under way."""

    @property
    def done(self) -> Future[Any]:
        """Completes when all collectives have, or one has failed; on a GPU perhaps before."""

    def arrived(self) -> AbstractContextManager[None]:
        """Surrounds the work on what has been received, in a callback of `done`.

        Raises:
            RuntimeError: a collective failed; its buffers hold nothing of worth.
        """


class Exchange(ABC):
    """What DGCState asks of a framework's collectives.

    Attributes:
        rank: of this process, among those that exchange.
        world_size: how many these are.
        reducible: types that the all-reduce takes; gradients of another travel as float32.
        go_on: what to do after a backward pass that broke off, for messages.
        changed: whether ranks, or the group, may be others than when refresh() was called last. DGCState agrees with
            the other ranks at the beginning of the next backward pass then, and not already when it is made.
    """

    rank: int
    world_size: int
    reducible: Collection[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
    go_on = "Call state.discard(drop_gradient=False) and zero_grad(); or restart from a checkpoint"
    changed = False

    @abstractmethod
    def refresh(self) -> None:
        """Looks again which rank this is, and of how many."""

    def roll_back(self, rank: int, world_size: int) -> None:
        """Returns to an earlier group, until refresh() looks again."""
        self.rank, self.world_size = rank, world_size

    def future(self) -> Future[Tensor]:
        """Returns a future for a reduced tensor."""
        return Future()

    @abstractmethod
    def start(self, name: str, payload: Tensor | None, gathered: Tensor | None, dense: Tensor | None) -> Transfer:
        """Starts the all-gather of a payload and the averaging of dense gradients; either may be missing.

        Every rank must call this for the same buckets in the same order, from inside the hook: a collective started
        in a callback could meet another rank's next one.

        Args:
            name: the bucket's, the same on all ranks.
            payload: uint8 [bytes], this rank's.
            gathered: uint8 [world size, bytes], receives all.
            dense: any type of `reducible`, averaged in place.
        """

    def finish(self) -> None:
        """Completes all that has been started, where no thread of the framework does that by itself."""
        return

    @abstractmethod
    def everyone(self, text: str) -> list[str]:
        """Returns the texts of all ranks, in their order; a collective."""

    @abstractmethod
    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        """Copies one rank's tensors, contiguous, to all others; a collective."""

    def agree(self, mine: Mapping[str, object]) -> None:
        """Compares a description of this rank's set-up with all others'; a collective.

        Raises:
            ValueError: on every rank, naming what differs and where.
        """
        everyone = [json.loads(text) for text in self.everyone(json.dumps({k: repr(v) for k, v in mine.items()}))]
        wrong = [
            f"{key}: rank 0 has {everyone[0].get(key)}, rank {rank} has {other.get(key)}"
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


def is_alive(group: dist.ProcessGroup) -> bool:
    """Returns whether torch.distributed still has a group: it has not after destroy_process_group()."""
    try:
        return _default_group() is not None and dist.get_rank(group) >= 0
    except ValueError:
        return False


def _default_group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _failed(what: str, error: RuntimeError) -> RuntimeError:
    """Returns the error of a collective with what it means."""
    return RuntimeError(
        f"dgc: {what} failed, since a rank has gone, hangs, or has run fewer backward passes than this one: look at "
        f"the other ranks' logs for its reason, and restart all ranks from a checkpoint. The backend says: {error}"
    )


class DistributedTransfer:
    """The collectives of one bucket over torch.distributed.

    On a GPU three things have to come in order, on three streams:

    - Compress, then the collectives. Both are queued from inside the hook, on the stream that is current there; NCCL's
      stream waits for that one, and gloo copies to the host on a stream that waits for it.
    - The collectives, then unpack. NCCL's future completes when the collective has been queued, not when it is done,
      and a future of collect_all carries no stream: its callback runs wherever, in order with nothing. So `arrived`
      puts what follows on a stream of ours that waits for the collectives; the stream of the backward pass must not
      wait, or nothing would overlap.
    - Unpack, then the optimizer. The future that DDP gets is completed under that stream and knows the device: it
      records an event there, and DDP's wait makes the stream of the backward pass wait for it.
    """

    def __init__(self, works: list[dist.Work], stream: torch.cuda.Stream | None) -> None:
        """Takes the collectives, and on a GPU the stream for what follows them."""
        self._works = works
        self._stream = stream
        self._futures = [work.get_future() for work in works]
        self.done: Future[list[Any]] = torch.futures.collect_all(self._futures)
        # For what does not depend on a collective: with one rank there is none.
        self._queued = None if stream is None else torch.cuda.current_stream(stream.device).record_event()

    @contextmanager
    def arrived(self) -> Iterator[None]:
        """Puts what it surrounds on the stream that waits for the collectives; see Transfer."""
        try:
            for future in self._futures:
                if future.done():  # where one has failed, the other may be under way
                    future.value()
        except RuntimeError as error:
            raise _failed("the exchange of gradients", error) from error
        if self._stream is None or self._queued is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._queued)
            for work in self._works:
                work.synchronize()  # this stream waits, nobody else does
            yield


class DistributedExchange(Exchange):
    """A process group; one rank by itself where torch.distributed is not initialised."""

    go_on = (
        "If no exception ended it, parameters were unused: find_unused_parameters=True. DDP cannot go on after such a "
        "pass: call state.discard(drop_gradient=False) and zero_grad(), delete the DDP model, wrap the module again "
        "and call state.register(model); or restart from a checkpoint"
    )

    def __init__(self, device: torch.device, process_group: dist.ProcessGroup | None = None) -> None:
        """Takes a group for good, or for the time being the default group, until bind() names DDP's.

        Args:
            device: that of all tensors to come.
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
        """Whether the group is not agreed upon yet, or torch.distributed was initialised again since."""
        return not self._settled or self._world is not _default_group()

    def bind(self, group: dist.ProcessGroup) -> None:
        """Takes the group of the DDP module whose gradients come; refresh() looks at it.

        Raises:
            ValueError: DGCState was made for another one.
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
        """Looks again which rank this is, and of how many.

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

    def roll_back(self, rank: int, world_size: int) -> None:
        """Returns to an earlier group, until refresh() looks again."""
        super().roll_back(rank, world_size)
        self._settled = False

    def future(self) -> Future[Tensor]:
        """Returns a future; on a GPU, whoever waits for it waits for the stream of `arrived`."""
        return Future(devices=None if self._stream is None else [self._device])

    def start(
        self, name: str, payload: Tensor | None, gathered: Tensor | None, dense: Tensor | None
    ) -> DistributedTransfer:
        """Starts both collectives; a process group goes by their order, not by name."""
        works: list[dist.Work] = []
        if payload is not None and gathered is not None:
            if self.world_size == 1:
                gathered[0].copy_(payload)
            else:
                works.append(_all_gather(gathered.view(-1), payload, group=self.group, async_op=True))
        if dense is not None and self.world_size > 1:
            dense.div_(self.world_size)  # before the sum, as DDP divides, so that 16-bit sums do not overflow
            works.append(dist.all_reduce(dense, group=self.group, async_op=True))
        return DistributedTransfer(works, self._stream)

    def everyone(self, text: str) -> list[str]:
        """Returns the texts of all ranks, in their order; a collective."""
        if self.world_size == 1:
            return [text]
        texts = [""] * self.world_size
        try:
            dist.all_gather_object(texts, text, group=self.group)
        except RuntimeError as error:
            raise _failed("the comparison of the ranks", error) from error
        return texts

    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        """Copies one rank's tensors, contiguous, to all others; a collective."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, group_src=root, group=self.group)
