"""What network.py reads off clocks and cables: a step's time, the slowest rank's, and the bytes that it sends."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist

from dgc.cli.links import slowest, timed

from . import namespaces

__all__ = ["OPEN", "bytes_a_step", "counted", "limit_of", "reached", "sent", "slowest", "timed"]

OPEN = "open"
"""A rate that nothing here comes near. It is a limit all the same, since that is what counts frames."""
BLOCK = 5  # steps between two readings of the counter


def limit_of(rate: str) -> str:
    """Returns a rate as tc writes it."""
    return "100gbit" if rate == OPEN else rate


def sent(link: namespaces.Link | None) -> int:
    """Returns what a cable has sent; 0 on a rank that has none of its own."""
    return link.sent() if link else 0


def counted(link: namespaces.Link | None, action: Callable[[], object], links: int) -> float:
    """Returns the bytes of frames that leave over a cable in what all ranks do, the mean of all cables."""
    dist.barrier()
    before = sent(link)
    dist.barrier()
    action()
    dist.barrier()
    there = torch.tensor(float(sent(link) - before), dtype=torch.float64)
    dist.all_reduce(there)
    return there.item() / links


def bytes_a_step(link: namespaces.Link | None, step: Callable[[], object], links: int) -> float:
    """Returns the bytes of frames that left over a cable in a step, on average over cables and a block of steps."""

    def block() -> None:
        for _ in range(BLOCK):
            step()

    return counted(link, block, links) / BLOCK


def reached(link: namespaces.Link | None, rate: str) -> float:
    """Returns the Mbit/s, of frames, at which this cable sends in an all-reduce of 50 ms, or less: median of 3."""
    tensor = torch.zeros(min(namespaces.bits(limit_of(rate)), namespaces.bits("10gbit")) // 8 // 4 // 20)
    measured = []
    for _ in range(3):
        before = sent(link)
        [seconds] = slowest([timed(lambda: dist.all_reduce(tensor))])
        measured.append((sent(link) - before) * 8 / seconds / 1e6)
    return statistics.median(measured)
