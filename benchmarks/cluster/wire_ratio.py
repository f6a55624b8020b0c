"""The paper's compression ratios, from the bytes that this package sends for the paper's networks.

    python -m benchmarks.cluster.wire_ratio

Random gradients with the shapes of ResNet-50, AlexNet and PTB's LSTM go through a DGCState at 0.1 %; what it hands to
the network is counted there, a payload for each parameter (DDP's buckets join them, which saves some headers). The
paper's accounting: bytes of the whole gradient in float32 over the bytes that one worker sends for it once. That says
nothing of what a worker receives, which grows with their number: the second table compares that with a ring all-reduce.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.futures import Future
from tqdm import tqdm

import dgc
from benchmarks.harness import report
from dgc.cli.shapes import NETWORKS, Shapes
from dgc.exchange.base import Exchange
from dgc.memory.slots import Gradients
from dgc.stats import traffic

PAPER = {"ResNet-50": 277, "AlexNet": 597, "PTB LSTM": 462}
"""Compression ratios of Lin et al., tables 3 and 4."""

SETTINGS = {
    "fp32": dgc.DGCConfig(dense_below=0),
    "bf16": dgc.DGCConfig(dense_below=0, wire_dtype=torch.bfloat16),
    "8bit": dgc.DGCConfig(dense_below=0, wire_dtype="8bit"),
    "4bit": dgc.DGCConfig(dense_below=0, wire_dtype="4bit"),
    "8bit, dense bf16": dgc.DGCConfig(dense_below=0, wire_dtype="8bit", dense_wire_dtype=torch.bfloat16),
    "default": dgc.DGCConfig(),
    "default, both": dgc.DGCConfig(wire_dtype="8bit", dense_wire_dtype=torch.bfloat16),
}


@dataclass(frozen=True)
class Sent:
    """Bytes that one worker hands over for one gradient."""

    payload: int
    """For the all-gather."""
    dense: int
    """For the all-reduce."""


class _Arrived:
    def __init__(self) -> None:
        self.done: Future[None] = Future()
        self.done.set_result(None)

    def arrived(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


class Counting(Exchange):
    """One rank by itself, which counts what it would send."""

    rank, world_size = 0, 1

    def __init__(self) -> None:
        """Starts at nothing."""
        self.payload = self.dense = 0

    def refresh(self) -> None:
        """Stays alone."""

    def start(self, name: str, payload: Tensor | None, gathered: Tensor | None, dense: Tensor | None) -> _Arrived:
        """Counts, and delivers the payload to this rank itself."""
        if payload is not None and gathered is not None:
            gathered[0].copy_(payload)
            self.payload += payload.nbytes
        if dense is not None:
            self.dense += dense.nbytes
        return _Arrived()

    def everyone(self, text: str) -> list[str]:
        """Returns this rank's text."""
        return [text]

    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        """Has nobody to send to."""


def formula(shapes: Shapes, density: float = 0.001) -> float:
    """Returns the paper's ratio: 4 bytes of value and 2 of run length an entry, tensors of one dimension dense."""
    total = sum(map(math.prod, shapes.values()))
    dense = sum(math.prod(shape) for shape in shapes.values() if len(shape) < 2)
    return 4 * total / (density * (total - dense) * (4 + 2) + 4 * dense)


def sent(shapes: Shapes, config: dgc.DGCConfig) -> Sent:
    """Returns what one rank sends for one random gradient of these shapes, a parameter a bucket."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}  # never read
    exchange = Counting()
    optimizer = dgc.SGD(parameters.values(), lr=0.1, momentum=0.9)
    state = dgc.DGCState(parameters.items(), optimizer, config, exchange=exchange)
    state.begin()
    for parameter in parameters.values():
        gradient = torch.randn(parameter.shape, generator=generator)
        state.reduce(Gradients([state.slot(parameter)], [gradient], [(0, 0)])).wait()
    state.end()
    return Sent(exchange.payload, exchange.dense)


def main() -> None:
    """Counts and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows, received = [], []
    raw: dict[str, Any] = {}
    with tqdm(total=len(PAPER) * len(SETTINGS), desc="gradients", file=sys.stderr) as bar:
        for name, paper in PAPER.items():
            shapes = NETWORKS[name]()
            whole = 4 * sum(map(math.prod, shapes.values()))
            counted = {}
            for setting, config in SETTINGS.items():
                counted[setting] = sent(shapes, config)
                bar.update()
            ratios = {setting: whole / (s.payload + s.dense) for setting, s in counted.items()}
            rows.append([name, f"{paper}x", f"{formula(shapes):.1f}x", *(f"{r:.1f}x" for r in ratios.values())])
            for ranks in (8, 64):
                ring = traffic(0, whole, ranks)
                received.append([name, ranks, f"{ring / 1e6:,.1f}"])
                for setting in ("fp32", "8bit, dense bf16", "default"):
                    ours = traffic(counted[setting].payload, counted[setting].dense, ranks)
                    received[-1].append(f"{ours / 1e6:,.2f} ({ring / ours:.1f}x less)")
            raw[name] = {
                "paper": paper,
                "formula": formula(shapes),
                "bytes of the gradient": whole,
                "sent": {setting: vars(s) for setting, s in counted.items()},
                "ratio": ratios,
            }
    report(
        "wire_ratio",
        "Compression ratio by the paper's accounting: bytes of the float32 gradient over bytes that one worker sends "
        "for it once, 0.1 %, counted where they are handed to the network. Default: parameters below 16,384 elements "
        "are dense too.",
        ["network", "paper", "formula", *SETTINGS],
        rows,
        raw,
        [
            (
                "MB that one worker receives for one gradient: all-gather of the payloads and ring all-reduce of what "
                "is dense, against a ring all-reduce of the whole float32 gradient (half of it in 16 bits).",
                ["network", "ranks", "all-reduce fp32", "fp32", "8bit, dense bf16", "default"],
                received,
            )
        ],
    )


if __name__ == "__main__":
    main()
