"""Runs a function on several ranks, each a process of its own, and returns what each rank returned."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

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


def run_ranks(
    world_size: int, body: Callable[..., Any], *args: Any, timeout: float = 60, backend: str = "gloo"
) -> list[Any]:
    """Calls body(rank, world_size, *args) on every rank and returns the results by rank; a rank's error is raised."""
    with tempfile.TemporaryDirectory() as folder:
        # A fork server that has imported torch already, and torch._dynamo, which DDP imports when it is made: a rank
        # then starts in a tenth of a second.
        mp.get_context("forkserver").set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "dgc"])
        mp.start_processes(
            _main,
            (world_size, folder, timeout, backend, body, args),
            nprocs=world_size,
            start_method="forkserver",
            daemon=True,
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
