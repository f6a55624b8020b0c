"""What each worker hands over for each of DDP's buckets: pure functions of shapes, in exact bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dgc.config import DGCConfig
from dgc.local import rows_of
from dgc.memory.refusals import dense_reasons
from dgc.memory.slots import lay_out
from dgc.ops import Segments
from dgc.ops.codec import EliasFano
from dgc.optim.base import MASKED_BELOW
from dgc.step.phase import phase_at
from dgc.step.schedule import entries, least_entries

from .shapes import Shapes

FIRST_BUCKET, LATER_BUCKETS = 2**20, 25 * 2**20
"""DDP's bucket_cap_mb, in bytes: a bucket is closed when it has as many."""


@dataclass(frozen=True)
class Traffic:
    """What one worker hands over for one bucket."""

    payload: int
    """Bytes of the all-gather."""
    dense: int
    """Bytes of the all-reduce."""
    compressed: int
    """Elements that are compressed."""
    entries: int
    """Entries in the payload."""


def ddp_buckets(shapes: Shapes) -> list[Shapes]:
    """Returns DDP's buckets in the order in which it sends them: from the last parameter to the first, 25 MiB each."""
    buckets: list[Shapes] = [{}]
    size = 0
    for name, shape in reversed(shapes.items()):
        buckets[-1][name] = shape
        size += 4 * math.prod(shape)
        if size >= (FIRST_BUCKET if len(buckets) == 1 else LATER_BUCKETS):
            buckets.append({})
            size = 0
    return [bucket for bucket in buckets if bucket]


def dense_traffic(buckets: Sequence[Shapes], itemsize: int) -> list[Traffic]:
    """Returns what plain DDP sends in values of so many bytes."""
    return [Traffic(0, itemsize * sum(map(math.prod, bucket.values())), 0, 0) for bucket in buckets]


def dgc_traffic(buckets: Sequence[Shapes], workers: int, config: DGCConfig) -> list[Traffic]:
    """Returns what DGC sends after its warm-up: this package's own choice of what is dense, and its wire format."""
    shapes = {name: shape for bucket in buckets for name, shape in bucket.items()}
    parameters = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    never = dense_reasons(parameters, config)
    slots = lay_out(parameters, [name for name in parameters if name not in never])
    codec = EliasFano(config.wire_dtype)
    phase = phase_at(
        config.density,
        config,
        slots,
        never,
        rows=workers,
        entry_bytes=codec.entry_bytes(config.density),
        whole="",
        divided=False,
        masked_below=MASKED_BELOW,
    )
    found = []
    for bucket in buckets:
        numel = {name: math.prod(shape) for name, shape in bucket.items()}
        rows = [
            (0, 0, 0, n, entries(phase.density, n, least_entries(config, n, n)))
            for name, n in numel.items()
            if name not in phase.dense
        ]
        payload = codec.nbytes(Segments.from_rows(rows)) if rows else 0
        compressed = sum(row[3] for row in rows)
        dense = config.dense_wire_dtype.itemsize * (sum(numel.values()) - compressed)
        found.append(Traffic(payload, dense, compressed, sum(row[4] for row in rows)))
    return found


def node_traffic(buckets: Sequence[Shapes], places: int, config: DGCConfig) -> list[Traffic]:
    """Returns what a node hands over for each bucket: its ranks' payloads together, each of the rows that it keeps.

    All that may be compressed is, at any number of nodes, as under DDP.
    """
    parameters = {name: torch.empty(s, device="meta") for bucket in buckets for name, s in bucket.items()}
    never = dense_reasons(parameters, config)
    found = []
    for bucket in buckets:
        compressed = [shape for name, shape in bucket.items() if name not in never]
        elements = sum(map(math.prod, compressed))
        payload = sent = 0
        for place in range(places):
            parts = []
            for shape in compressed:
                first, last = rows_of(shape[0], place, places)
                parts.append(((last - first) * math.prod(shape[1:]), math.prod(shape)))
            rows = [
                (0, 0, 0, n, entries(config.density, n, least_entries(config, n, whole))) for n, whole in parts if n
            ]
            payload += EliasFano(config.wire_dtype).nbytes(Segments.from_rows(rows)) if rows else 0
            sent += sum(row[4] for row in rows)
        dense = config.dense_wire_dtype.itemsize * (sum(map(math.prod, bucket.values())) - elements)
        found.append(Traffic(payload, dense, elements, sent))
    return found
