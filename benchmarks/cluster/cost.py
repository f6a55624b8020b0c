"""How long a step takes: pure functions of sizes and rates, in bytes and seconds. docs/scaling.md has the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import dgc
from benchmarks.shapes import Shapes
from dgc.memory.refusals import dense_reasons
from dgc.memory.slots import lay_out
from dgc.ops import Segments
from dgc.ops.codec import EliasFano
from dgc.optim.base import MASKED_BELOW
from dgc.step.phase import phase_at
from dgc.step.schedule import entries

FIRST_BUCKET, LATER_BUCKETS = 2**20, 25 * 2**20
"""DDP's bucket_cap_mb, in bytes: a bucket is closed when it has as many."""


@dataclass(frozen=True)
class Link:
    """A connection."""

    rate: float
    """Bytes a second, each way at once."""
    latency: float
    """Seconds for a message to the next worker of a ring, besides its bytes."""


@dataclass(frozen=True)
class Cluster:
    """Workers, a GPU or a process each, spread evenly over nodes."""

    workers: int
    per_node: int
    network: Link
    """One for each node, shared by its workers."""
    inside: Link
    """One for each worker, to the others of its node."""

    @property
    def nodes(self) -> int:
        """Nodes; the last may be partly filled."""
        return -(-self.workers // self.per_node)


def all_gather(nbytes: float, cluster: Cluster) -> float:
    """Returns the seconds in which every worker gets nbytes from each other one: a ring through all nodes.

    Each payload passes every node's network link once, so this link carries those of all workers but one.
    """
    if nbytes == 0:
        return 0.0
    n, nodes = cluster.workers, cluster.nodes
    link = cluster.network if nodes > 1 else cluster.inside
    latency = (nodes - 1) * cluster.network.latency + (n - nodes) * cluster.inside.latency
    return (n - 1) * nbytes / link.rate + latency


def all_reduce(nbytes: float, cluster: Cluster, trees: bool = True) -> float:
    """Returns the seconds in which all workers average nbytes.

    Within the node reduce-scatter, between nodes a ring or a tree, whichever is faster, and all-gather within the node.

    Args:
        nbytes: of the gradient.
        cluster: where.
        trees: whether the library has trees, which wait less often among many nodes (NCCL; gloo has not).
    """
    if nbytes == 0:
        return 0.0
    w, nodes = min(cluster.per_node, cluster.workers), cluster.nodes
    seconds = 2 * (w - 1) / w * nbytes / cluster.inside.rate + 2 * (w - 1) * cluster.inside.latency
    if nodes == 1:
        return seconds
    network = cluster.network
    ring = 2 * (nodes - 1) / nodes * nbytes / network.rate + 2 * (nodes - 1) * network.latency
    tree = 2 * nbytes / network.rate + 2 * math.ceil(math.log2(nodes)) * network.latency
    return seconds + (min(ring, tree) if trees else ring)


def step_time(compute: float, overhead: float, communication: Sequence[float], hidden: float) -> float:
    """Returns the seconds of a step: compute, what compression adds, and the communication that nothing hides.

    Args:
        compute: of forward pass, backward pass and optimizer.
        overhead: of compression, none of it hidden.
        communication: of each bucket, in the order in which they are sent, one after the other.
        hidden: backward time that the communication of all buckets but the last can hide in.
    """
    total = sum(communication)
    return compute + overhead + max(communication[-1], total - hidden)


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


def dgc_traffic(buckets: Sequence[Shapes], workers: int, config: dgc.DGCConfig) -> list[Traffic]:
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
        switched_off=False,
        divided=False,
        masked_below=MASKED_BELOW,
    )
    found = []
    for bucket in buckets:
        numel = {name: math.prod(shape) for name, shape in bucket.items()}
        rows = [(0, 0, 0, n, entries(phase.density, n)) for name, n in numel.items() if name not in phase.dense]
        payload = codec.nbytes(Segments.from_rows(rows)) if rows else 0
        compressed = sum(row[3] for row in rows)
        dense = 4 * (sum(numel.values()) - compressed)
        found.append(Traffic(payload, dense, compressed, sum(row[4] for row in rows)))
    return found


def communication(traffic: Sequence[Traffic], cluster: Cluster, trees: bool = True) -> list[float]:
    """Returns the seconds of each bucket's collectives, one after the other."""
    return [all_gather(t.payload, cluster) + all_reduce(t.dense, cluster, trees) for t in traffic]
