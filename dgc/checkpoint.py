"""Checkpoints of all ranks' momentum and residual in one directory, by torch.distributed.checkpoint (DCP).

    dgc.checkpoint.save(state, "runs/step1000/dgc")
    dgc.checkpoint.load(state, "runs/step1000/dgc")

With save(..., background=True) the run goes on as soon as momentum and residual are copied.

Both are collectives. Model and optimizer are equal on all ranks and are saved as always. Save them first, so that a
directory of DGC's shows that the whole step is saved.

dgc.LocalSteps is saved in the same way, in place of its DGCState, with theta_0, the outer optimizer and, in the middle
of a round, each island's weights. Inner optimizers and buffers differ between islands: each saves its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from .checkpoint_parts import check_replaceable, entries, on_the_host, remove, replace
from .checkpoint_reader import Reader, without_process_group
from .exchange.distributed import DistributedExchange, everyone_of
from .local_steps import LocalSteps
from .memory import share as shares
from .memory.weights import taken
from .rounds.saved import ROUNDS
from .state import DGCState

_logger = logging.getLogger("dgc")

_under_way: WeakKeyDictionary[DGCState | LocalSteps, Saving] = WeakKeyDictionary()
_groups: WeakKeyDictionary[DistributedExchange, tuple[object, dist.ProcessGroup]] = WeakKeyDictionary()
"""By exchange: the group that a thread in the background talks in, and the group that it was made for."""


class Saving:
    """A checkpoint that is being written, by a thread of its own."""

    def __init__(self, written: Future[None]) -> None:
        """Takes the future of its directory."""
        self._written = written

    @property
    def done(self) -> bool:
        """Whether the directory has its name, or an error has come."""
        return self._written.done()

    def wait(self) -> None:
        """Waits until the directory has its name. Call it on all ranks, before the process group is destroyed.

        Raises:
            RuntimeError: on every rank, as save().
        """
        self._written.result()


def save(
    state: DGCState | LocalSteps,
    directory: str | Path,
    *,
    background: bool = False,
    residual_dtype: torch.dtype = torch.float32,
) -> Saving:
    """Writes all ranks' state_dict() to a directory; a collective.

    The directory is there only when every rank's part is: until then it is called <directory>.partial. A checkpoint of
    that name is replaced.

    Args:
        state: between step() and the next backward(); a LocalSteps where no round is under way.
        directory: for this alone, on a file system that all ranks share.
        background: whether to return as soon as momentum and residual are copied to the host's memory, and write the
            copy while the run goes on. A save() that comes before it is written waits for it. Its ranks talk in a group
            of their own, over gloo.
        residual_dtype: torch.bfloat16 halves the residual in the file. Its rounding error, logged by each rank, is lost
            to a run that loads it.

    Returns:
        What waits for the directory; without background there is nothing to wait for.

    Raises:
        RuntimeError: on every rank: an update is outstanding, something else has that name, or a rank could not write,
            or wrote somewhere else. With background, what comes after the copy is raised by wait() and the next save(),
            and logged.
        ValueError: residual_dtype is another type.
        TypeError: the ranks talk over Horovod.
    """
    exchange = _exchange_of(state)
    if residual_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"residual_dtype: expected torch.float32 or torch.bfloat16, got {residual_dtype!r}")
    if (before := _under_way.pop(state, None)) is not None:
        before.wait()
    whole = Path(directory).absolute()
    failure: BaseException | None = None
    share: Mapping[str, Any] = {}
    try:
        share = shares.unwrap(state.state_dict())[0]
        if background:
            share = on_the_host(share)
        if exchange.rank == 0:
            check_replaceable(whole)
            remove(Path(f"{whole}.partial"))
    except Exception as error:
        failure = error
    # Also a barrier: DCP makes the directory on every rank, before any rank writes.
    _raise_on_all(exchange, exchange.everyones_group, failure, "save", whole)
    if not background:
        _write(exchange, exchange.everyones_group, share, residual_dtype, whole)
        written: Future[None] = Future()
        written.set_result(None)
        return Saving(written)
    thread = ThreadPoolExecutor(1, "dgc.checkpoint")
    written = thread.submit(_write, exchange, _group_for(exchange), share, residual_dtype, whole)
    written.add_done_callback(partial(_log_failure, whole))
    thread.shutdown(wait=False)
    _under_way[state] = saving = Saving(written)
    return saving


def _write(
    exchange: DistributedExchange,
    group: dist.ProcessGroup | None,
    share: Mapping[str, Any],
    residual_dtype: torch.dtype,
    whole: Path,
) -> None:
    """Writes this rank's share, and gives the directory its name; a collective of the group.

    DCP's async_save() would not do: it ends when the parts are written, before the ranks have seen that all of them are
    there and the directory has its name.
    """
    partial_ = Path(f"{whole}.partial")
    failure: BaseException | None = None
    try:
        tensors = entries(share, residual_dtype, exchange.rank)
        with without_process_group():
            dcp.save(
                {f"rank{exchange.rank}.{name}": tensor for name, tensor in tensors.items()},
                storage_writer=dcp.FileSystemWriter(str(partial_)),
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
        if exchange.rank == 0:
            if missing := [rank for rank, there in Reader(partial_).complete().items() if not there]:
                raise RuntimeError(f"rank {missing} wrote somewhere else: expected a file system that all ranks share")
            replace(whole, partial_)
    except (Exception, dcp.CheckpointException) as error:
        failure = error
    _raise_on_all(exchange, group, failure, "save", whole)


def _group_for(exchange: DistributedExchange) -> dist.ProcessGroup | None:
    """Returns the group of a thread in the background, made at its first use; a collective.

    In the run's own group its collectives would be matched with those of the run.
    """
    if exchange.world_size == 1:
        return exchange.everyones_group
    known = exchange.everyones_group or dist.group.WORLD
    if exchange not in _groups or _groups[exchange][0] is not known:
        ranks = dist.get_process_group_ranks(known)
        _groups[exchange] = known, dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _groups[exchange][1]


def _log_failure(whole: Path, written: Future[None]) -> None:
    if (error := written.exception()) is not None:
        _logger.error("dgc: the checkpoint %s was not written: %s", whole, error)


def load(state: DGCState | LocalSteps, directory: str | Path, *, allow_missing_ranks: bool = False) -> None:
    """Continues from a saved checkpoint; a collective. On an error, no rank's state has changed.

    On another number of ranks or nodes, or with a model that is divided among ranks in another way, each takes over its
    part of the saved shares, so that the mean over the ranks stays the same (docs/reliability.md). A LocalSteps sets
    the model's weights too.

    Args:
        state: of the same model and DGCConfig; a LocalSteps, of the same outer optimizer too.
        directory: that of save().
        allow_missing_ranks: goes on without ranks whose file is not there, and logs what is lost.

    Raises:
        ValueError: on every rank: the directory is not complete, is damaged, or does not fit; the message says which
            rank found what.
        TypeError: the ranks talk over Horovod.
    """
    exchange = _exchange_of(state)
    choice: shares.Choice | None = None
    failure: BaseException | None = None
    try:
        choice = _choose(state, exchange, Path(directory), allow_missing_ranks)
    except (Exception, dcp.CheckpointException) as error:  # of whatever kind, the other ranks have to know
        failure = error
    _raise_on_all(exchange, None, failure, "load", Path(directory))
    assert choice is not None
    everyone = exchange.everyone(json.dumps(asdict(choice.share)))  # place apart, these are to be equal
    if differ := shares.differences(
        {f"that of rank {rank}": shares.Share(**json.loads(text)) for rank, text in enumerate(everyone)}
    ):
        raise ValueError(f"dgc.checkpoint.load: {directory}: expected the same checkpoint on all ranks, but {differ}")
    state.take_up(choice)


def _choose(
    state: DGCState | LocalSteps, exchange: DistributedExchange, directory: Path, allow_missing_ranks: bool
) -> shares.Choice:
    if not directory.is_dir():
        whole = directory.absolute()
        partial, replaced = Path(f"{whole}.partial"), Path(f"{whole}.replaced")
        why = f"{partial} is one that was not completed" if partial.exists() else "there is none"
        if replaced.exists():
            why = f"the run died when it replaced one: rename {replaced}, which is complete, and remove {partial}"
        raise FileNotFoundError(f"expected a checkpoint, but {why}")
    reader = Reader(directory)
    complete = reader.complete()
    topology, places = exchange.topology, reader.places()
    there = [rank for rank in range(len(complete) // places) if all(complete[rank * places + i] for i in range(places))]
    chosen = taken(topology.share, topology.shares, len(complete) // places, there)
    # Cut in the same way, a rank's own part is enough; else any part may have elements that this rank holds.
    parts = [topology.place] if places == topology.places else range(places)
    state_dicts = [reader.state_dict_of(rank * places + place) for rank in chosen for place in parts]
    if isinstance(state, DGCState) and any(ROUNDS in one for one in state_dicts):
        raise ValueError(
            "expected a DGCState's, got that of a LocalSteps, with theta_0: dgc.checkpoint.load(local, directory)"
        )
    return state.choose(state_dicts, allow_missing_ranks)


def _exchange_of(state: DGCState | LocalSteps) -> DistributedExchange:
    if not isinstance(state.exchange, DistributedExchange):
        raise TypeError(
            "dgc.checkpoint: expected ranks that talk over torch.distributed, got "
            f"{type(state.exchange).__name__}. Write torch.save(state.state_dict(), file) on each rank, and "
            "state.load_state_dict(); with the state_dicts of all ranks it loads on another number of them"
        )
    return state.exchange


def _raise_on_all(
    exchange: DistributedExchange,
    group: dist.ProcessGroup | None,
    failure: BaseException | None,
    what: str,
    directory: Path,
) -> None:
    """Raises on every rank what any rank has met; a collective of the group that saving goes on in.

    Raises:
        RuntimeError: that was saving; ValueError: that was loading.
    """
    rank, cause = exchange.rank, failure
    if isinstance(failure, dcp.CheckpointException) and failure.failures:
        # DCP raises it on all ranks, with the whole traceback of the one that it comes from.
        rank, (cause, _) = next(iter(failure.failures.items()))
    mine = "" if cause is None else f"rank {rank}: {type(cause).__name__}: {cause}"
    # In DCP's group: in another, a rank that saw a peer die would wait for one that waits for it in DCP.
    in_group = what == "save" and exchange.world_size > 1
    everyone = everyone_of(group, mine) if in_group else exchange.everyone(mine)
    errors = list(dict.fromkeys(filter(None, everyone)))
    if not errors:
        return
    message = f"dgc.checkpoint.{what}: {directory}: {errors[0]}"
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more)"
    if what == "save":
        raise RuntimeError(message) from failure
    raise ValueError(f"{message}. No rank's state has changed") from failure
