"""Starts ranks that plug themselves into a switch, and hands back what they found."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from . import namespaces


def spawned(worker: Callable[..., None], ranks: int, limited: bool, *arguments: object) -> Any:
    """Returns what ranks that live no longer than this call have left by `finish`.

    Args:
        worker: is called with the rank, the arguments and a folder that all ranks share.
        ranks: their number.
        limited: whether they find a switch, for namespaces.Link().
        arguments: for the worker.
    """
    with namespaces.switch() if limited else nullcontext(), tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (*arguments, folder), ranks)
        return torch.load(Path(folder, "result.pt"))


def finish(result: object, folder: str) -> None:
    """Leaves the first rank's result, numbers in lists and dictionaries, and ends this process; a collective."""
    if dist.get_rank() == 0:
        torch.save(result, Path(folder, "result.pt"))
    dist.barrier()
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(
        0
    )  # what still holds the group, as DDP does, has threads that abort a process in its teardown now and then
