"""The values that must be equal on all ranks, and a fingerprint of names, to find a rank that differs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict

from dgc._version import __version__
from dgc.config import DGCConfig
from dgc.memory.parameters import Parameters


def description(
    config: DGCConfig, parameters: Parameters, codec: str, loss_scaling: bool, places: int
) -> dict[str, object]:
    """Returns all values that have to be equal on all ranks, by their names in messages."""
    optimizer = parameters.optimizer
    groups = [(g.get("momentum", 0), g.get("nesterov", False)) for g in optimizer.param_groups]
    return {
        "dgc": __version__,
        **asdict(config),
        "codec": codec,
        "ranks of a node": places,
        "loss scaling": loss_scaling,
        "optimizer": type(optimizer).__name__,
        "(momentum, nesterov) by group": groups,
        f"{parameters.rule.named} by group": parameters.rule.numbers(),
        "number of parameters": len(parameters.by_name),
        # With its place: two of one shape in another order would travel as each other.
        **{
            f"parameter {name}": (tuple(p.shape), p.dtype, f"number {i}")
            for i, (name, p) in enumerate(parameters.by_name.items())
        },
    }


def fingerprint(names: Iterable[str]) -> int:
    """Returns a 56-bit hash of a set of names, equal on all ranks and practically never 0."""
    return int.from_bytes(hashlib.blake2b("\n".join(sorted(names)).encode(), digest_size=7).digest(), "little")
