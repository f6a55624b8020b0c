"""Nodes as workers in the cost model: what crosses a node's link, and when a dense exchange is faster.

Pure functions in bytes and seconds; docs/scaling.md has the formulas.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import dgc
from dgc.cli.cost import Cluster, Link, communication, node_seconds, speeds_of
from dgc.cli.shapes import NETWORKS
from dgc.cli.traffic import Traffic, ddp_buckets, dense_traffic, dgc_traffic, node_traffic

from .projection import GBITS, WORKLOADS, Assumptions

PLACES = 8
"""Ranks of a node."""
NODES = (2, 8, 64, 512)
MOST = 4096
"""Nodes up to which dense_from() looks."""


def island_communication(traffic: Sequence[Traffic], cluster: Cluster) -> list[float]:
    """Returns the seconds of each bucket's collectives where nodes are the workers; traffic is a node's."""
    speeds = speeds_of(cluster)
    return communication(traffic, cluster) if speeds.node is None else node_seconds(traffic, speeds, speeds.node)


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
        dense, ours = dense_traffic(buckets, 2), node_traffic(buckets, PLACES, config)
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
