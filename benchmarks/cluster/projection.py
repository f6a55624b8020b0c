"""What the cost model says of GPUs and clusters that nobody has measured here: published figures, and assumptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import dgc
from dgc.cli.cost import CAST_BYTES, COMPRESS_BYTES, Cluster, Link, communication, step_time
from dgc.cli.shapes import NETWORKS
from dgc.cli.traffic import ddp_buckets, dense_traffic, dgc_traffic
from dgc.ops.codec import EliasFano

NODES = (8, 1)
"""Workers a node: a machine of eight GPUs, or a rented machine of one."""
WORKERS = (8, 64, 512, 4096)
GBITS = (1, 10, 25, 100)
"""Of each node's network link."""


@dataclass(frozen=True)
class Gpu:
    """Data sheet of a GPU, bytes a second."""

    name: str
    memory: float
    nvlink: float
    """Each way."""


V100, H100 = Gpu("V100", 900e9, 150e9), Gpu("H100", 3350e9, 450e9)


@dataclass(frozen=True)
class Workload:
    """One worker's step."""

    network: str
    gpu: Gpu
    seconds: float
    """Of forward pass, backward pass and optimizer."""
    about: str


_EXAMPLES = "NVIDIA DeepLearningExamples, PyTorch"
WORKLOADS = (
    Workload(
        network="ResNet-50",
        gpu=V100,
        seconds=256 / 1200,
        about=f"256 images, mixed precision, 1,200 a second on one V100 16 GB ({_EXAMPLES}, resnet50v1.5)",
    ),
    Workload(
        network="VGG-16",
        gpu=V100,
        seconds=64 / (1200 * 4.09 / 15.47),
        about="64 images, ResNet-50's rate times the ratio of multiply-adds, 4.09 to 15.47 (torchvision): 317 a second",
    ),
    Workload(
        network="BERT-large",
        gpu=V100,
        seconds=64 / 171.52,
        about=f"64 sequences of 128, mixed precision, 171.52 a second on one V100 32 GB ({_EXAMPLES}, BERT, 2020)",
    ),
    Workload(
        network="Llama-3-8B",
        gpu=H100,
        seconds=8192 / 12_273,
        about="one sequence of 8,192 tokens, FP8, 12,273 a second for each of 8 H100 (NVIDIA NeMo 24.12)",
    ),
)


@dataclass(frozen=True)
class Assumptions:
    """What no run here tells."""

    latency: float = 14e-6
    """Seconds from node to node; NCCL's tuning table, ring, Simple, network."""
    inside_latency: float = 3.4e-6
    """The same over NVLink."""
    reached: float = 0.8
    """Share of a data sheet's rates that memory and NVLink reach."""
    backward: float = 2 / 3
    """Share of compute that is the backward pass, which hides communication."""
    compress_bytes: float = COMPRESS_BYTES
    cast_bytes: float = CAST_BYTES


@dataclass(frozen=True)
class Projected:
    """Seconds of a step in one setting."""

    network: str
    per_node: int
    workers: int
    gbits: float
    fp32: float
    fp16: float
    dgc: float
    all_dense: bool
    """Whether DGC sends everything dense by itself, all-gather being dearer."""

    @property
    def one_node(self) -> bool:
        """Whether all workers share a node, and use no network."""
        return self.workers <= self.per_node

    @property
    def speedup(self) -> float:
        """How many times faster DGC is than the better of the dense ones."""
        return min(self.fp32, self.fp16) / self.dgc


def project(
    workload: Workload, share: float, workers: Sequence[int], assumptions: Assumptions | None = None
) -> list[Projected]:
    """Returns all settings of a workload.

    Args:
        workload: what each worker computes.
        share: of the line rate that a collective reaches.
        workers: how many there are.
        assumptions: the rest.
    """
    a = assumptions or Assumptions()
    memory = a.reached * workload.gpu.memory
    inside = Link(a.reached * workload.gpu.nvlink, a.inside_latency)
    config = dgc.DGCConfig()
    buckets = ddp_buckets(NETWORKS[workload.network]())
    dense = {itemsize: dense_traffic(buckets, itemsize) for itemsize in (4, 2)}
    parameters = sum(t.dense for t in dense[4]) // 4
    found = []
    for n in workers:
        ours = dgc_traffic(buckets, n, config)
        compressed, entries = sum(t.compressed for t in ours), sum(t.entries for t in ours)
        received = n * entries * EliasFano(config.wire_dtype).entry_bytes(config.density)
        competitors = (
            (dense[4], 0.0),
            (dense[2], a.cast_bytes * parameters),
            (ours, a.compress_bytes * compressed + received),
        )
        for per_node in NODES:
            for gbits in GBITS:
                cluster = Cluster(n, per_node, Link(share * gbits * 1e9 / 8, a.latency), inside)
                fp32, fp16, dgc_seconds = (
                    step_time(
                        compute=workload.seconds,
                        overhead=nbytes / memory,
                        communication=communication(traffic, cluster),
                        hidden=a.backward * workload.seconds,
                    )
                    for traffic, nbytes in competitors
                )
                found.append(Projected(workload.network, per_node, n, gbits, fp32, fp16, dgc_seconds, not compressed))
    return found


def losses(projected: Sequence[Projected]) -> list[str]:
    """Returns in words where DGC is slower than the better dense exchange, by reason and then by network."""
    everywhere = [p for p in projected if p.speedup < 1]
    sentences = [
        f"DGC is slower than the better dense exchange in {len(everywhere)} of {len(projected)} settings, by more than "
        f"5 % in {sum(p.speedup < 0.95 for p in everywhere)}."
    ]
    reasons = (
        ("All workers in one node, no network", [p for p in projected if p.one_node]),
        (
            "DGC sends everything dense, in float32, since all-gather would carry more",
            [p for p in projected if p.all_dense],
        ),
    )
    for reason, settings in reasons:
        if lost := [p.speedup for p in settings if p.speedup < 1]:
            text = f"{min(lost):.3f} to {max(lost):.3f} times as fast"
            sentences.append(f"{reason}: slower in {len(lost)} of {len(settings)} settings, {text}.")
    others = [p for p in everywhere if not p.one_node and not p.all_dense]
    for network in dict.fromkeys(p.network for p in projected):
        places = [
            f"{p.workers:,} workers, {p.per_node} a node, {p.gbits:g} Gb/s ({p.speedup:.3f})"
            for p in others
            if p.network == network
        ]
        sentences.append(f"Otherwise {network}: slower with {'; '.join(places) or 'none of these settings'}.")
    return sentences


def sensitivity(share: float, latencies: Sequence[float]) -> list[list[str]]:
    """Returns rows: in how many settings DGC loses, by the latency from node to node."""
    rows = []
    for latency in latencies:
        assumptions = replace(Assumptions(), latency=latency)
        found = [p for workload in WORKLOADS for p in project(workload, share, WORKERS, assumptions)]
        lost = sum(p.speedup < 1 for p in found)
        rows.append([f"{1e6 * latency:.0f}", f"{lost} of {len(found)}"])
    return rows
