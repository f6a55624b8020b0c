"""Runs a function on several ranks, each a process of its own, and returns what each rank returned."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _main(
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    backend: str,
    body: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group(backend, rank=rank, world_size=world_size, store=store, timeout=timedelta(seconds=timeout))
    torch.save(body(rank, world_size, *args), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@cache
def fork_server() -> ForkServerContext:
    """Returns what starts processes, in a tenth of a second: forks of a server that has imported what they need."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["support.preloaded"])
    # Before 3.13 Python does not hand sys.path on to the server, which says nothing of what it cannot import.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return context


def run_ranks(
    world_size: int, body: Callable[..., Any], *args: Any, timeout: float = 60, backend: str = "gloo"
) -> list[Any]:
    """Calls body(rank, world_size, *args) on every rank and returns the results by rank; a rank's error is raised."""
    with tempfile.TemporaryDirectory() as folder:
        fork_server()
        mp.start_processes(
            _main,
            (world_size, folder, timeout, backend, body, args),
            nprocs=world_size,
            start_method="forkserver",
            daemon=True,
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
