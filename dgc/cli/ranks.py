"""Ranks: what torchrun, horovodrun or srun has started, the process group of it, and the nodes that the ranks form."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from dgc.exchange.distributed import everyone_of

PORT = 29_500
PATIENCE = timedelta(minutes=2)
T = TypeVar("T")


class UsageError(Exception):
    """A mistake of the user's, in one line that says what to do."""


class Started(NamedTuple):
    """One process among those that a launcher has started."""

    launcher: str
    rank: int
    ranks: int
    place: int
    """Its number on its machine."""


_VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "horovodrun": ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
"""What each launcher sets: rank, ranks, place. Slurm sets the second for srun alone, not for a batch script."""


def started(environment: Mapping[str, str]) -> Started | None:
    """Returns what this process's environment says of it; None where no launcher has started it."""
    for launcher, names in _VARIABLES.items():
        if names[0] in environment and names[1] in environment:
            rank, ranks, place = (int(environment.get(name, "0")) for name in names)
            return Started(launcher, rank, ranks, place)
    return None


def join(process: Started) -> torch.device:
    """Joins the other ranks in the default process group, over NCCL where each has a GPU, and returns the device.

    Raises:
        UsageError: the address of rank 0 is not known.
    """
    if "MASTER_ADDR" not in os.environ:
        address, port = _master(process)
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=os.environ.get("MASTER_PORT", str(port)))
    os.environ.setdefault("MASTER_PORT", str(PORT))
    gpus = torch.cuda.device_count()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("HOROVOD_LOCAL_SIZE", process.place + 1)))
    on_gpu = gpus >= local
    device = torch.device("cuda", process.place) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, rank=process.rank, world_size=process.ranks, timeout=PATIENCE)
    return device


def _master(process: Started) -> tuple[str, int]:
    """Returns host and port of rank 0."""
    if process.launcher == "horovodrun":
        import horovod.torch as hvd

        hvd.init()
        with socket.socket() as one:
            one.bind(("", 0))
            mine = (os.environ.get("HOROVOD_HOSTNAME", socket.gethostname()), one.getsockname()[1])
        host, port = hvd.broadcast_object(mine, root_rank=0)
        return str(host), int(port)
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    if process.launcher == "srun" and nodes:
        # Several nodes are written as one: host[1-4].
        if not set("[,") & set(nodes):
            return nodes, PORT
        if shutil.which("scontrol"):
            shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
            return shown.stdout.split()[0], PORT
    raise UsageError(f"expected the address of rank 0, got none from {process.launcher}: set MASTER_ADDR to its host")


def everywhere(action: Callable[[], T]) -> T:
    """Runs something on all ranks, and raises on all of them what any has raised; a collective.

    Raises:
        UsageError: naming the first rank that it comes from.
    """
    result, failure = None, ""
    try:
        result = action()
    except UsageError as error:
        failure = str(error)
    failures = everyone_of(None, failure) if dist.is_initialized() else [failure]
    if wrong := [(rank, text) for rank, text in enumerate(failures) if text]:
        rank, text = wrong[0]
        where = f"rank {rank}: " if len(failures) > len(wrong) else ""
        raise UsageError(where + text)
    assert result is not None
    return result


def machine_name() -> str:
    """Returns what tells this machine from others, also where they have one host name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def places_of(machines: Sequence[str]) -> int:
    """Returns how many ranks each node has; 1 where nodes differ, or their ranks do not follow each other.

    Args:
        machines: of each rank, in their order.
    """
    first = next((i for i, name in enumerate(machines) if name != machines[0]), len(machines))
    regular = len(machines) % first == 0 and all(
        len(set(machines[i : i + first])) == 1 for i in range(0, len(machines), first)
    )
    nodes = len(machines) // first
    return first if regular and len(set(machines)) == nodes else 1
