"""The figures of one backward pass."""

from __future__ import annotations

from collections.abc import Iterable

from dgc.exchange.base import Topology
from dgc.stats import Stats, traffic

from .bucket import Bucket
from .standing import Standing


def bytes_sent(buckets: Iterable[Bucket], topology: Topology) -> int:
    """Returns the bytes that this rank sends for these buckets."""
    once = [bucket.bytes_once for bucket in buckets]
    return traffic(sum(payload for payload, _ in once), sum(dense for _, dense in once), topology.rows)


def count(
    buckets: Iterable[Bucket],
    standing: Standing,
    *,
    inside: int,
    total_bytes_sent: int,
    forgotten: int,
    skipped: int,
) -> Stats:
    """Returns the figures of a backward pass.

    Args:
        buckets: of the pass.
        standing: after it.
        inside: bytes that this rank sent inside its node.
        total_bytes_sent: since the state was made.
        forgotten: entries dropped since the state was made.
        skipped: passes that were left out.
    """
    buckets, topology, phase = list(buckets), standing.exchange.topology, standing.layouts.phase
    slots, ages = standing.parameters.slots, standing.memory.ages
    once = sum(sum(bucket.bytes_once) for bucket in buckets)
    whole = sum(slot.piece.whole * slot.dtype.itemsize for slot in slots.values()) // topology.places
    sparse = [bucket.sparse for bucket in buckets if bucket.sparse is not None]
    sent = bytes_sent(buckets, topology)
    return Stats(
        steps=standing.step,
        density=phase.density,
        sent_density=sum(s.entries for s in sparse) / max(1, sum(s.alive for s in sparse)) if sparse else 0.0,
        bytes_sent=sent,
        bytes_received=sent,
        bytes_in_node=inside,
        bytes_dense=traffic(0, whole, topology.rows),
        compression_ratio=whole / once if once else 1.0,
        entries={m.slot.name: m.entries for s in sparse for m in s.members},
        dense=dict(phase.dense),
        total_bytes_sent=total_bytes_sent,
        forgotten=forgotten,
        skipped=skipped,
        choice=standing.choice,
        age=None if ages is None else ages.figure,
    )
