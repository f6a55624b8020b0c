"""Checkpoints of all ranks' momentum and residual in one directory, by torch.distributed.checkpoint (DCP).

    dgc.checkpoint.save(state, "runs/step1000/dgc")
    dgc.checkpoint.load(state, "runs/step1000/dgc")

Both are collectives. Model and optimizer are equal on all ranks and are saved as always. Save them first, so that a
directory of DGC's shows that the whole step is saved.

dgc.LocalSteps is saved in the same way, in place of its DGCState, with theta_0, the outer optimizer and, in the middle
of a round, each island's weights. Inner optimizers and buffers differ between islands: each saves its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from .checkpoint_reader import Reader, without_process_group
from .exchange.distributed import DistributedExchange, everyone_of
from .local import crc32
from .local_steps import LocalSteps
from .memory import share as shares
from .rounds.saved import ROUNDS
from .state import DGCState


def save(state: DGCState | LocalSteps, directory: str | Path) -> None:
    """Writes all ranks' state_dict() to a directory; a collective.

    The directory is there only when every rank's part is: until then it is called <directory>.partial. A checkpoint of
    that name is replaced.

    Args:
        state: between step() and the next backward(); a LocalSteps where no round is under way.
        directory: for this alone, on a file system that all ranks share.

    Raises:
        RuntimeError: on every rank: an update is outstanding, something else has that name, or a rank could not write,
            or wrote somewhere else.
        TypeError: the ranks talk over Horovod.
    """
    exchange = _exchange_of(state)
    whole = Path(directory).absolute()
    partial = Path(f"{whole}.partial")
    failure: BaseException | None = None
    tensors: dict[str, Tensor] = {}
    try:
        tensors = _entries(shares.unwrap(state.state_dict())[0])
        if exchange.rank == 0:
            _check_replaceable(whole)
            _remove(partial)
    except Exception as error:
        failure = error
    # Also a barrier: DCP makes the directory on every rank, before any rank writes.
    _raise_on_all(exchange, failure, "save", whole)
    try:
        with without_process_group():
            dcp.save(
                {f"rank{exchange.rank}.{name}": tensor for name, tensor in tensors.items()},
                storage_writer=dcp.FileSystemWriter(str(partial)),
                process_group=exchange.everyones_group,
                no_dist=not dist.is_initialized(),
            )
        if exchange.rank == 0:
            if missing := [rank for rank, there in Reader(partial).complete().items() if not there]:
                raise RuntimeError(f"rank {missing} wrote somewhere else: expected a file system that all ranks share")
            _replace(whole, partial)
    except (Exception, dcp.CheckpointException) as error:
        failure = error
    _raise_on_all(exchange, failure, "save", whole)


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
    _raise_on_all(exchange, failure, "load", Path(directory))
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
    chosen = shares.taken(topology.share, topology.shares, len(complete) // places, there)
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


def _raise_on_all(exchange: DistributedExchange, failure: BaseException | None, what: str, directory: Path) -> None:
    """Raises on every rank what any rank has met; a collective.

    Raises:
        RuntimeError: that was saving; ValueError: that was loading.
    """
    rank, cause = exchange.rank, failure
    if isinstance(failure, dcp.CheckpointException) and failure.failures:
        # DCP raises it on all ranks, with the whole traceback of the one that it comes from.
        rank, (cause, _) = next(iter(failure.failures.items()))
    mine = "" if cause is None else f"rank {rank}: {type(cause).__name__}: {cause}"
    if what == "save" and exchange.world_size > 1:
        # In DCP's group: in another, a rank that saw a peer die would wait for one that waits for it in DCP.
        everyone = everyone_of(exchange.everyones_group, mine)
    else:
        everyone = exchange.everyone(mine)
    errors = list(dict.fromkeys(filter(None, everyone)))
    if not errors:
        return
    message = f"dgc.checkpoint.{what}: {directory}: {errors[0]}"
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more)"
    if what == "save":
        raise RuntimeError(message) from failure
    raise ValueError(f"{message}. No rank's state has changed") from failure


def _entries(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns a rank's share as tensors alone, by name: DCP would pickle everything else."""
    kinds = {kind: named for kind, named in state_dict.items() if _are_tensors(named)}
    tensors = {f"{kind}.{name}": tensor for kind, named in kinds.items() for name, tensor in named.items()}
    about = {key: value for key, value in state_dict.items() if key not in kinds}
    about["version"] = shares.VERSION
    about["crc32"] = {name: crc32(tensor) for name, tensor in tensors.items()}
    tensors["about"] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    return tensors


def _are_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _check_replaceable(whole: Path) -> None:
    """Checks that a checkpoint's name is free, or is that of another checkpoint.

    Raises:
        FileExistsError: something else has that name.
    """
    if not whole.exists():
        return
    found = list(whole.iterdir()) if whole.is_dir() else [whole]
    if others := [path for path in found if path.name != ".metadata" and path.suffix != ".distcp"]:
        raise FileExistsError(
            f"expected a name for this alone, since it is replaced, got one where {others[0].name} is. "
            f"Give it another, such as {whole / 'dgc'}"
        )


def _replace(whole: Path, partial: Path) -> None:
    """Gives a completed checkpoint its name. Between the two renames the one before is called <directory>.replaced."""
    replaced = Path(f"{whole}.replaced")
    _remove(replaced)
    if whole.exists():
        whole.rename(replaced)
    partial.rename(whole)
    _remove(replaced)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
