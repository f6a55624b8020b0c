"""Self-test: a small model trained by DGC on all ranks for a moment, and whether what it promises came true."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

import dgc
from dgc import checkpoint
from dgc.exchange.distributed import everyone_of

STEPS = 20
WIDTH = 512
DENSITY = 0.01
PATIENCE = 60.0
"""Seconds until ranks that this module has started are given up."""


class Outcome(NamedTuple):
    """What the self-test found."""

    ranks: int
    device: str
    replicas: bool
    """Whether all ranks have the same weights, bit by bit."""
    falling: bool
    """Whether the loss is lower than at first."""
    bytes_sent: int
    """In the last step, by one rank."""
    bytes_dense: int
    """That a dense exchange would have sent."""
    restored: bool | None
    """Whether a step after loading a checkpoint gives the bits that it gave before; None where it was not tried."""
    seconds: float


def digest(module: nn.Module) -> str:
    """Returns a text that differs where a bit of a module's parameters does."""
    found = hashlib.sha256()
    for p in module.parameters():
        found.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def train(device: torch.device, folder: Path | None) -> Outcome:
    """Trains on all ranks of the default process group; a collective.

    Args:
        device: of this rank.
        folder: empty, the same on all ranks, for a checkpoint; None where they share none.
    """
    began = time.monotonic()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)).to(device)
    model = DistributedDataParallel(net)
    optimizer = dgc.SGD(model.parameters(), lr=0.01, momentum=0.9)
    state = dgc.DGCState(model.named_parameters(), optimizer, dgc.DGCConfig(density=DENSITY))
    state.register(model)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    x = torch.randn(64, WIDTH, generator=generator).to(device)

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    losses = [step() for _ in range(STEPS)]
    restored = _round_trip(model, optimizer, state, step, folder) if folder is not None else None
    replicas = len(set(everyone_of(None, digest(model)))) == 1
    falling = set(everyone_of(None, str(losses[-1] < losses[0]))) == {"True"}
    sent, dense = state.stats.bytes_sent, state.stats.bytes_dense
    return Outcome(
        dist.get_world_size(), device.type, replicas, falling, sent, dense, restored, time.monotonic() - began
    )


def _round_trip(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dgc.DGCState,
    step: Callable[[], float],
    folder: Path,
) -> bool:
    """Returns whether all ranks' next step has the same bits after what was saved is loaded again; a collective."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    saved = optimizer.state_dict()
    checkpoint.save(state, folder / "dgc")
    step()
    first = digest(model)
    step()
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    checkpoint.load(state, folder / "dgc")
    step()
    return set(everyone_of(None, str(digest(model) == first))) == {"True"}


def worker(rank: int, ranks: int, folder: str) -> None:
    """Runs on one of the ranks that alone() starts."""
    torch.set_num_threads(1)
    on_gpu = torch.cuda.device_count() >= ranks
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=ranks, store=store)
    outcome = train(device, Path(folder))
    if rank == 0:
        torch.save(tuple(outcome), f"{folder}/outcome.pt")
    dist.barrier()
    dist.destroy_process_group()


def alone(ranks: int = 2) -> Outcome:
    """Starts ranks on this machine, and returns what they found.

    Raises:
        RuntimeError: a rank failed, or was not through in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.spawn(worker, (ranks, folder), ranks, join=False)
        deadline = time.monotonic() + PATIENCE
        try:
            while not processes.join(timeout=1):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{ranks} ranks were not through in {PATIENCE:.0f} s")
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise RuntimeError(str(error)) from error
        finally:
            for process in processes.processes:
                if process.is_alive():
                    process.kill()
        return Outcome(*torch.load(f"{folder}/outcome.pt"))
