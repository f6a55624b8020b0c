"""What all ranks must have alike, and a number for what one of them alone may have done."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict

from dgc._version import __version__
from dgc.config import DGCConfig
from dgc.memory.parameters import Parameters


def description(config: DGCConfig, parameters: Parameters, codec: str, loss_scaling: bool) -> dict[str, object]:
    """Returns everything that has to be the same on all ranks, by what it is called in messages."""
    optimizer = parameters.optimizer
    groups = [(g.get("momentum", 0), g.get("nesterov", False)) for g in optimizer.param_groups]
    return {
        "dgc": __version__,
        **asdict(config),
        "codec": codec,
        "loss scaling": loss_scaling,
        "optimizer": type(optimizer).__name__,
        "(momentum, nesterov) by group": groups,
        "number of parameters": len(parameters.by_name),
        **{f"parameter {name}": (tuple(p.shape), p.dtype) for name, p in parameters.by_name.items()},
    }


def fingerprint(names: Iterable[str]) -> int:
    """Returns a number for a set of names: the same on all ranks, and 0 for none of any size that is met."""
    return int.from_bytes(hashlib.blake2b("\n".join(sorted(names)).encode(), digest_size=7).digest(), "little")
