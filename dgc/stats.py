"""Stats: what was compressed, what was not and why, and how many bytes that took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Choice:
    """The exchange that DGCConfig.exchange "auto" has chosen for a phase, with the figures of its last trial."""

    density: float
    """Density of the phase."""
    rows: int
    """Number of payloads that are gathered."""
    dense: bool
    """Whether its steps are dense."""
    dense_ms: float
    """Milliseconds of a dense step."""
    sparse_ms: float
    """Milliseconds of a step that compresses."""
    step: int
    """Step at which it was chosen."""
    again: int
    """Step at which the next trial begins."""

    @classmethod
    def of(cls, saved: object) -> Choice:
        """Returns a saved choice.

        Raises:
            ValueError: a value is missing or wrong.
        """
        values: Mapping[str, Any] = saved if isinstance(saved, Mapping) else {}
        types: dict[str, type] = {"dense": bool, "rows": int, "step": int, "again": int}
        typed = all(type(value) is types.get(name, float) for name, value in values.items())
        complete = values.keys() == {one.name for one in fields(cls)}
        good = complete and typed and all(0 <= value < math.inf for value in values.values())
        if not good:
            raise ValueError(f"state_dict['choices']: expected what \"auto\" has chosen by density, got {saved!r:.200}")
        return cls(**values)


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
    forgotten: int = 0
    """Entries that forget() and mask() have dropped on this rank since the state was made."""
    skipped: int = 0
    """Backward passes that were left out: non-finite, or discarded."""
    choice: Choice | None = None
    """What DGCConfig.exchange "auto" has chosen for this phase; None without it, or before its first trial is over."""
    age: float | None = None
    """Mean number of steps whose gradients an entry summed when this rank sent it, over the sampled entries that were
    sent in the last 100 steps; None unless DGCState.watch_ages() was called 100 steps ago."""

    def scalars(self) -> dict[str, float]:
        """Returns every figure by its name, as TensorBoard and Weights & Biases take them, but `choice`.

        They are plain numbers that the host has already, so nothing is copied, and no GPU is waited for. `entries` is
        the number of entries that this rank sent of all parameters together, `dense` that of the parameters that were
        not compressed. `age` is left out where it is None.
        """
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "choice"}
        if self.age is None:
            del values["age"]
        values |= {"entries": sum(self.entries.values()), "dense": len(self.dense)}
        return {name: float(value) for name, value in values.items()}


def traffic(payload_bytes: int, dense_bytes: int, world_size: int) -> int:
    """Returns the bytes that a rank sends, and as many received: all-gather of payloads, ring all-reduce of the rest.

    Args:
        payload_bytes: of one payload.
        dense_bytes: of the gradients that are all-reduced.
        world_size: number of payloads.
    """
    return (world_size - 1) * payload_bytes + 2 * (world_size - 1) * dense_bytes // world_size
