"""Counts what a whole run sends, by formula, from its schedule of densities and the shapes of its network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from torch import nn

import dgc
from dgc.ops.codec import EliasFano
from dgc.ops.segments import Segment, Segments
from dgc.stats import traffic
from dgc.step.schedule import DensitySchedule, dense_is_cheaper, entries


def is_compressed(parameter: nn.Parameter, dense_below: int) -> bool:
    """Returns whether DGC compresses a parameter, in the steps in which it compresses at all."""
    return parameter.ndim > 1 and parameter.numel() >= dense_below


def is_sparse(density: float, config: dgc.DGCConfig, workers: int) -> bool:
    """Returns whether the steps of a density send entries; else a float32 all-reduce carries no more."""
    return not dense_is_cheaper(density, workers, 4, EliasFano(config.wire_dtype).entry_bytes(density))


def share_of_dense(network: nn.Module, config: dgc.DGCConfig, steps: int, workers: int) -> float:
    """Returns a run's bytes over those of DDP with float32 gradients: warm-up, dense tensors and dense steps included.

    Each gradient is one bucket, as replicas.py reduces it. Left out are the moments that travel once where a run goes
    back to dense steps.

    Args:
        network: of which only the shapes are used.
        config: of which density, warm-up, min_entries, dense_below and wire_dtype are used.
        steps: of the run.
        workers: that send a payload each.
    """
    whole = 4 * sum(p.numel() for p in network.parameters())
    compressed = [p.numel() for p in network.parameters() if is_compressed(p, config.dense_below)]
    sent = 0
    for density, count in Counter(map(DensitySchedule(config).density, range(steps))).items():
        payload, dense = 0, whole
        if compressed and is_sparse(density, config, workers):
            payload = payload_bytes(compressed, density, config)
            dense -= 4 * sum(compressed)
        sent += count * traffic(payload, dense, workers)
    return sent / (steps * traffic(0, whole, workers))


def shown(share: float) -> str:
    """Returns a share of dense training's bytes, as the tables show it."""
    return f"{100 * share:.1f} %"


def payload_bytes(numels: Sequence[int], density: float, config: dgc.DGCConfig) -> int:
    """Returns the bytes of a payload of tensors with these numbers of elements."""
    begins = accumulate(numels, initial=0)
    rows = [
        Segment(0, begin, begin, numel, entries(density, numel, config.min_entries))
        for begin, numel in zip(begins, numels, strict=False)
    ]
    return EliasFano(config.wire_dtype).nbytes(Segments.from_rows(rows))
