"""How long a step takes: pure functions of sizes and rates, in bytes and seconds. docs/scaling.md has the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .traffic import Traffic

COMPRESS_BYTES = 21 + 4
"""Memory traffic of DGC for each compressed parameter: compress_, and the zeros around what is received."""
CAST_BYTES = 2 * (4 + 2)
"""The same of an all-reduce in 16 bits, for each parameter: to 16 bits and back."""


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


def exposed(seconds: Sequence[float], ready: Sequence[float]) -> float:
    """Returns the seconds that a step waits for its exchange after the last bucket is full.

    Args:
        seconds: of each bucket's collectives; the buckets are exchanged one after the other.
        ready: when each is full, on any clock. The backward pass ends with the last one.
    """
    now = ready[0]
    for full, needed in zip(ready, seconds, strict=True):
        now = max(now, full) + needed
    return now - ready[-1]


def step_time(compute: float, overhead: float, communication: Sequence[float], hidden: float) -> float:
    """Returns the seconds of a step: compute, what compression adds, and the communication that nothing hides.

    Args:
        compute: of forward pass, backward pass and optimizer.
        overhead: of compression, none of it hidden.
        communication: of each bucket, in the order in which they are sent, one after the other.
        hidden: backward time that the communication of all buckets but the last can hide in.
    """
    ready = [0.0] * (len(communication) - 1) + [hidden]
    return compute + overhead + exposed(communication, ready)


def communication(traffic: Sequence[Traffic], cluster: Cluster, trees: bool = True) -> list[float]:
    """Returns the seconds of each bucket's collectives, one after the other."""
    return flat_seconds(traffic, speeds_of(cluster, trees))


Seconds = Callable[[float], float]
"""Seconds of a collective, by the bytes that each rank hands over; 0 for none."""


@dataclass(frozen=True)
class Line:
    """Seconds of a collective as a straight line: what it takes at least, and what each byte adds."""

    fixed: float
    per_byte: float

    def __call__(self, nbytes: float) -> float:
        """Returns the seconds for so many bytes."""
        return self.fixed + self.per_byte * nbytes if nbytes > 0 else 0.0

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float]) -> Line:
        """Returns the line through two measured points (bytes, seconds).

        Noise may put the second one lower, or the line below 0 for few bytes: then neither part becomes negative.
        """
        (few, short), (many, long) = small, large
        per_byte = max(long - short, 0.0) / (many - few)
        fixed = short - per_byte * few
        return cls(fixed, per_byte) if fixed >= 0 else cls(0.0, long / many)


@dataclass(frozen=True)
class Node:
    """Collectives where nodes are the workers."""

    nodes: int
    places: int
    """Ranks of a node."""
    mean: Seconds
    """Of each rank's part of a bucket, over the ranks of its node, by the bytes of the bucket."""
    across: Seconds
    """All-gather of one rank's payload among the ranks of its place, all places at once."""
    inside: Seconds
    """All-gather among the ranks of a node."""


@dataclass(frozen=True)
class Speeds:
    """How fast the ranks exchange."""

    all_reduce: Seconds
    """Of float32."""
    all_reduce_16: Seconds
    """Of 16 bits."""
    all_gather: Seconds
    node: Node | None = None
    """None where each node has one rank, or all are on one."""
    overlap: float = 1.0
    """Share of an exchange that goes on while a rank computes; 0 where both need the same processor."""
    at_once: bool = False
    """Whether the two collectives of a bucket wait at the same time (gloo), or one after the other (NCCL)."""

    def together(self, gathered: float, reduced: float) -> float:
        """Returns the seconds of an all-gather and a float32 all-reduce that are started together, by their bytes."""
        both = self.all_gather(gathered) + self.all_reduce(reduced)
        if self.at_once and gathered and reduced:
            both -= min(self.all_gather(1), self.all_reduce(1))
        return both


def speeds_of(cluster: Cluster, trees: bool = True) -> Speeds:
    """Returns the speeds by the formulas; trees as all_reduce()."""
    w, n, network, inside = cluster.per_node, cluster.nodes, cluster.network, cluster.inside
    dense: Seconds = lambda nbytes: all_reduce(nbytes, cluster, trees)  # noqa: E731
    node = Node(
        nodes=n,
        places=w,
        mean=Line((w - 1) * inside.latency, (w - 1) / w / inside.rate),
        across=Line((n - 1) * network.latency, (n - 1) * w / network.rate),
        inside=Line((w - 1) * inside.latency, (w - 1) / inside.rate),
    )
    return Speeds(dense, dense, lambda nbytes: all_gather(nbytes, cluster), node if n > 1 and w > 1 else None)


def flat_seconds(traffic: Sequence[Traffic], speeds: Speeds, itemsize: int = 4) -> list[float]:
    """Returns the seconds of each bucket's collectives where each rank is a worker.

    Args:
        traffic: of a rank.
        speeds: of all ranks.
        itemsize: bytes of a value that is sent dense; with 2, all are.
    """
    if itemsize == 2:
        return [speeds.all_reduce_16(t.dense) for t in traffic]
    return [speeds.together(t.payload, t.dense) for t in traffic]


def node_seconds(traffic: Sequence[Traffic], speeds: Speeds, node: Node) -> list[float]:
    """Returns the seconds of each bucket's collectives where nodes are the workers, one after the other.

    The mean inside the node, as many rings between nodes as a node has ranks, which share its link, and an all-gather
    inside the node of what has come. What is dense is an all-reduce of all ranks.

    Args:
        traffic: of a node: Traffic.payload is that of all of its ranks together.
        speeds: of all ranks.
        node: of nodes as workers.
    """
    found = []
    for t in traffic:
        mine = t.payload / node.places
        compressed = node.mean(4 * t.compressed) + node.across(mine) + node.inside(node.nodes * mine)
        found.append(speeds.all_reduce(t.dense) + compressed)
    return found
