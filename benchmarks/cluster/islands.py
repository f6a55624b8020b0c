"""Nodes as workers in the cost model: what crosses a node's link, and when a dense exchange is faster.

Pure functions in bytes and seconds; docs/scaling.md has the formulas.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import dgc
from benchmarks.shapes import NETWORKS, Shapes
from dgc.local import rows_of
from dgc.memory.refusals import dense_reasons
from dgc.ops import Segments
from dgc.ops.codec import EliasFano
from dgc.step.schedule import entries

from .cost import Cluster, Link, Traffic, all_reduce, communication, ddp_buckets, dense_traffic, dgc_traffic
from .projection import GBITS, WORKLOADS, Assumptions

PLACES = 8
"""Ranks of a node."""
NODES = (2, 8, 64, 512)
MOST = 4096
"""Nodes up to which dense_from() looks."""


def island_traffic(buckets: Sequence[Shapes], places: int, config: dgc.DGCConfig) -> list[Traffic]:
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
                parts.append((last - first) * math.prod(shape[1:]))
            rows = [(0, 0, 0, n, entries(config.density, n)) for n in parts if n]
            payload += EliasFano(config.wire_dtype).nbytes(Segments.from_rows(rows)) if rows else 0
            sent += sum(row[4] for row in rows)
        found.append(Traffic(payload, 4 * (sum(map(math.prod, bucket.values())) - elements), elements, sent))
    return found


def island_communication(traffic: Sequence[Traffic], cluster: Cluster) -> list[float]:
    """Returns the seconds of each bucket's collectives where nodes are the workers, one after the other.

    The mean inside the node, as many rings between nodes as a node has ranks, which share its link, and an all-gather
    inside the node of what has come. What is dense is an all-reduce by nodes.

    Args:
        traffic: of a node: Traffic.payload is that of all of its ranks together.
        cluster: where.
    """
    w, n, network, inside = cluster.per_node, cluster.nodes, cluster.network, cluster.inside
    found = []
    for t in traffic:
        seconds = all_reduce(t.dense, cluster)
        if t.payload:
            carried = (w - 1) / w * (4 * t.compressed + n * t.payload)
            seconds += carried / inside.rate + 2 * (w - 1) * inside.latency
            seconds += (n - 1) * (t.payload / network.rate + network.latency)
        found.append(seconds)
    return found


@dataclass(frozen=True)
class Exchanges:
    """What is handed over in a step, bucket after bucket, by each of three."""

    dense: list[Traffic]
    """A rank of DDP, in 16 bits."""
    ranks: list[Traffic]
    """A rank of DGC, each rank a worker."""
    islands: list[Traffic]
    """A node of DGC, nodes as workers."""

    def seconds(self, cluster: Cluster) -> tuple[float, float, float]:
        """Returns the seconds of the exchange, hidden or not."""
        return (
            sum(communication(self.dense, cluster)),
            sum(communication(self.ranks, cluster)),
            sum(island_communication(self.islands, cluster)),
        )

    def link_bytes(self, cluster: Cluster) -> tuple[float, float, float]:
        """Returns the bytes that cross a node's link each way."""
        n = cluster.nodes
        ring = 2 * (n - 1) / n
        return (
            sum(ring * t.dense for t in self.dense),
            sum((cluster.workers - 1) * t.payload + ring * t.dense for t in self.ranks),
            sum((n - 1) * t.payload + ring * t.dense for t in self.islands),
        )


def dense_from(dense: Sequence[Traffic], islands: Sequence[Traffic], network: Link, inside: Link) -> int | None:
    """Returns the number of nodes from which a dense all-reduce is faster than islands; None where none of MOST is.

    Found by bisection: the all-gather's time grows by the same amount with each node, the all-reduce's ever less.
    """

    def slower(nodes: int) -> bool:
        cluster = Cluster(nodes * PLACES, PLACES, network, inside)
        return sum(island_communication(islands, cluster)) > sum(communication(dense, cluster))

    found = bisect.bisect_left(range(2, MOST + 1), True, key=slower) + 2
    return found if found <= MOST else None


def tables(share: float) -> tuple[list[list[str]], list[list[str]]]:
    """Returns rows: megabytes and milliseconds of an exchange; and the nodes from which a dense one is faster.

    Args:
        share: of the line rate that a collective reaches.
    """
    a, config = Assumptions(), dgc.DGCConfig()
    sizes, limits = [], []
    for workload in WORKLOADS:
        buckets = ddp_buckets(NETWORKS[workload.network]())
        inside = Link(a.reached * workload.gpu.nvlink, a.inside_latency)
        links = [Link(share * gbits * 1e9 / 8, a.latency) for gbits in GBITS]
        dense, ours = dense_traffic(buckets, 2), island_traffic(buckets, PLACES, config)
        for nodes in NODES:
            sent = Exchanges(dense, dgc_traffic(buckets, nodes * PLACES, config), ours)
            clusters = [Cluster(nodes * PLACES, PLACES, link, inside) for link in links]
            megabytes = (f"{nbytes / 1e6:,.1f}" for nbytes in sent.link_bytes(clusters[0]))
            milliseconds = (
                " / ".join(f"{1e3 * seconds:,.0f}" for seconds in sent.seconds(cluster)) for cluster in clusters
            )
            sizes.append([workload.network, f"{nodes}", " / ".join(megabytes), *milliseconds])
        found = (dense_from(dense, ours, link, inside) for link in links)
        limits.append([workload.network, *("none" if nodes is None else f"{nodes:,}" for nodes in found)])
    return sizes, limits
