"""Stats: what was compressed, what was not and why, and how many bytes that took."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stats:
    """Figures of one rank's last backward pass. Bytes are those of tensors, without the network's own headers."""

    steps: int = 0
    """Backward passes reduced, without skipped ones."""
    density: float = 0.0
    """Density asked for at the last step."""
    sent_density: float = 0.0
    """Entries sent as a share of the elements of the compressed parameters; 0 where none was compressed."""
    bytes_sent: int = 0
    """Bytes that left this rank: the payload to N-1 ranks, and 2 (N-1)/N of the dense gradients (ring)."""
    bytes_received: int = 0
    """Bytes that this rank received: as many as it sent, since all ranks send the same number."""
    bytes_in_node: int = 0
    """Bytes that this rank sent to others of its node, where DGC averages gradients there (DGCState's mesh, under DDP).
    They are not in bytes_sent."""
    bytes_dense: int = 0
    """Bytes that a ring all-reduce of the whole gradient would have sent."""
    compression_ratio: float = 1.0
    """The paper's ratio: bytes of the whole gradient over bytes of one payload and the dense gradients. It counts one
    payload sent, not the N-1 received; for the traffic compare bytes_received with bytes_dense."""
    entries: dict[str, int] = field(default_factory=dict)
    """Entries that this rank sent of each compressed parameter: k."""
    dense: dict[str, str] = field(default_factory=dict)
    """Parameters that were not compressed, with the reason."""
    total_bytes_sent: int = 0
    """Bytes sent since the state was made, warm-up included."""
    skipped: int = 0
    """Backward passes that were left out: non-finite, or discarded."""


def traffic(payload_bytes: int, dense_bytes: int, world_size: int) -> int:
    """Returns the bytes that a rank sends, and as many received: all-gather of payloads, ring all-reduce of the rest.

    Args:
        payload_bytes: of one payload.
        dense_bytes: of the gradients that are all-reduced.
        world_size: number of payloads.
    """
    return (world_size - 1) * payload_bytes + 2 * (world_size - 1) * dense_bytes // world_size
