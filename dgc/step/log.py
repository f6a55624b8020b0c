"""What DGCState tells: what ranks must agree on, the figures of a step, and the log."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from torch import Tensor
from torch.optim.optimizer import Optimizer

from dgc import ops
from dgc._version import __version__
from dgc.config import DGCConfig
from dgc.stats import Stats, traffic

from .bucket import Bucket
from .phase import Phase
from .schedule import DensitySchedule

logger = logging.getLogger("dgc")


def description(
    config: DGCConfig, optimizer: Optimizer, parameters: Mapping[str, Tensor], loss_scaling: bool
) -> dict[str, object]:
    """Returns everything that has to be the same on all ranks."""
    groups = [(g.get("momentum", 0), g.get("nesterov", False)) for g in optimizer.param_groups]
    return {
        "dgc": __version__,
        **asdict(config),
        "loss scaling": loss_scaling,
        "optimizer": type(optimizer).__name__,
        "(momentum, nesterov) by group": groups,
        "number of parameters": len(parameters),
        **{f"parameter {name}": (tuple(p.shape), p.dtype) for name, p in parameters.items()},
    }


def fingerprint(names: Iterable[str]) -> int:
    """Returns a number for a set of names: the same on all ranks, and 0 for none of any size that is met."""
    return int.from_bytes(hashlib.blake2b("\n".join(sorted(names)).encode(), digest_size=7).digest(), "little")


def bytes_sent(buckets: Iterable[Bucket], world_size: int) -> int:
    """Returns what this rank sends for these buckets."""
    payload = dense = 0
    for bucket in buckets:
        payload += bucket.payload_bytes
        dense += bucket.dense_bytes
    return traffic(payload, dense, world_size)


def count(
    buckets: Iterable[Bucket],
    phase: Phase,
    parameters: Mapping[str, Tensor],
    world_size: int,
    *,
    steps: int,
    total_bytes_sent: int,
    skipped: int,
) -> Stats:
    """Returns the figures of a backward pass."""
    buckets = list(buckets)
    once = sum(b.payload_bytes + b.dense_bytes for b in buckets)
    whole = sum(p.nbytes for p in parameters.values())
    compressed = sum(b.compressed_numel for b in buckets)
    sent = bytes_sent(buckets, world_size)
    return Stats(
        steps=steps,
        density=phase.density,
        sent_density=sum(b.entries for b in buckets) / compressed if compressed else 0.0,
        bytes_sent=sent,
        bytes_received=sent,
        bytes_dense=traffic(0, whole, world_size),
        compression_ratio=whole / once,
        dense=dict(phase.dense),
        total_bytes_sent=total_bytes_sent,
        skipped=skipped,
    )


def log_backend(device_type: str) -> None:
    """Says what runs the ops on a GPU."""
    choice = ops.backend(device_type)
    if choice == "reference":
        logger.warning(
            "dgc: no kernels for %s, so plain PyTorch is used: correct, but slow. Reinstall where nvcc is, or "
            "`pip install --no-build-isolation '.[cupy]'`, with which they are compiled at first use",
            device_type,
        )
    else:
        how = "built with the package" if choice == "native" else "compiled at first use by CuPy"
        logger.info("dgc: %s kernels %s", device_type, how)


def log_phase(phase: Phase, parameters: Mapping[str, Tensor], schedule: DensitySchedule, step: int, off: bool) -> None:
    """Says what is compressed from this step on; louder where nothing is, and nobody asked for that."""
    warming_up = schedule.warming_up(step)
    nothing = len(phase.dense) == len(parameters) and not warming_up
    warmup = schedule.warmup_steps - step if warming_up else 0
    logger.log(
        logging.WARNING if nothing and not off else logging.INFO,
        "dgc: step %d, %s%s",
        step,
        phase.describe(parameters),
        f"; {100 * schedule.final:.4g} % after {warmup} more steps of warm-up" if warmup else "",
    )
