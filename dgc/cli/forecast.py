"""Forecast: the step time of each way to exchange, what it costs to the end of a run, and which one to take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dgc.config import DGCConfig
from dgc.ops.codec import EliasFano
from dgc.stats import traffic as bytes_carried

from .cost import CAST_BYTES, COMPRESS_BYTES, Speeds, exposed, flat_seconds, node_seconds
from .shapes import Shapes
from .traffic import Traffic, dense_traffic, dgc_traffic, node_traffic

FLOAT32, HALF = "float32", "16 bits"
"""Dense exchanges."""
DENSITIES = (0.01, 0.001)
BACKWARD = 2 / 3
"""Share of compute that is the backward pass: twice the multiply-adds of the forward pass."""
WORTH = 1.05
"""How many times faster DGC has to be before it is recommended: a forecast cannot tell less apart."""


@dataclass(frozen=True)
class Local:
    """The step of one way to exchange, as if the network cost nothing."""

    seconds: float
    ready: Sequence[float]
    """When each bucket's exchange can begin, on any clock; the backward pass ends with the last one."""


@dataclass(frozen=True)
class Forecast:
    """One way to exchange."""

    name: str
    density: float | None
    """None where the whole gradient is exchanged."""
    nodes: bool
    """Whether nodes are the workers."""
    local: float
    """Seconds of a step without the network."""
    waiting: float
    """Seconds that a step waits for the network."""
    nbytes: float
    """Bytes that a rank sends in a step."""

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.local + self.waiting


def waiting(seconds: Sequence[float], ready: Sequence[float], overlap: float) -> float:
    """Returns the seconds by which an exchange makes a step longer.

    What the backward pass hides counts in full where it takes the processor away from it.

    Args:
        seconds: of each bucket's collectives.
        ready: when each can begin, on any clock.
        overlap: share of an exchange that goes on while a rank computes.
    """
    open_ = exposed(seconds, ready)
    return open_ + (1 - overlap) * (sum(seconds) - open_)


def ready_by_share(buckets: Sequence[Shapes], backward: float) -> list[float]:
    """Returns when each bucket is full, if every parameter takes the same part of a backward pass that ends at 0."""
    sizes = [sum(map(math.prod, bucket.values())) for bucket in buckets]
    return [backward * (sum(sizes[: i + 1]) / sum(sizes) - 1) for i in range(len(sizes))]


def local_steps(
    buckets: Sequence[Shapes], ranks: int, step: float, backward: float, memory: float
) -> dict[str | float, Local]:
    """Returns each way's step without the network, by memory traffic alone: for a device that cannot be asked.

    Args:
        buckets: DDP's.
        ranks: workers.
        step: seconds of forward pass, backward pass and optimizer.
        backward: seconds of the backward pass.
        memory: bytes a second that the device reaches.
    """
    ready = ready_by_share(buckets, backward)
    parameters = sum(math.prod(shape) for bucket in buckets for shape in bucket.values())
    found: dict[str | float, Local] = {
        FLOAT32: Local(step, ready),
        HALF: Local(step + CAST_BYTES * parameters / memory, ready),
    }
    for density in DENSITIES:
        config = DGCConfig(density=density)
        received = ranks * EliasFano(config.wire_dtype).entry_bytes(density)
        sent = dgc_traffic(buckets, ranks, config)
        moved = sum(COMPRESS_BYTES * t.compressed + received * t.entries for t in sent)
        found[density] = Local(step + moved / memory, ready)
    return found


def forecasts(
    buckets: Sequence[Shapes], ranks: int, speeds: Speeds, local: Mapping[str | float, Local], alone: float
) -> list[Forecast]:
    """Returns all ways to exchange, dense ones first.

    Args:
        buckets: DDP's.
        ranks: workers.
        speeds: of the links.
        local: by FLOAT32, HALF and each density of DENSITIES.
        alone: seconds of a step that exchanges nothing.
    """
    found = []

    def add(
        name: str, density: float | None, step: Local, traffic: Sequence[Traffic], seconds: list[float], of: int
    ) -> None:
        nbytes = sum(bytes_carried(t.payload, t.dense, of) for t in traffic)
        wait = waiting(seconds, step.ready, speeds.overlap)
        found.append(Forecast(name, density, of != ranks, step.seconds, wait, nbytes))

    for name, itemsize in ((FLOAT32, 4), (HALF, 2)):
        traffic = dense_traffic(buckets, itemsize)
        add(f"dense, {name}", None, local[name], traffic, flat_seconds(traffic, speeds, itemsize), ranks)
    for density in DENSITIES:
        config = DGCConfig(density=density)
        traffic = dgc_traffic(buckets, ranks, config)
        add(f"dgc {100 * density:g} %", density, local[density], traffic, flat_seconds(traffic, speeds), ranks)
    if node := speeds.node:
        for density in DENSITIES:
            traffic = node_traffic(buckets, node.places, DGCConfig(density=density))
            # A rank compresses its rows alone; all payloads of all nodes are unpacked as before.
            step = local[density]
            own = alone + (step.seconds - alone) / node.places if step.seconds > alone else step.seconds
            a_rank = [Traffic(t.payload // node.places, t.dense, t.compressed, t.entries) for t in traffic]
            seconds = node_seconds(traffic, speeds, node)
            add(f"dgc {100 * density:g} %, nodes", density, Local(own, step.ready), a_rank, seconds, node.nodes)
    return found


def best_dense(found: Sequence[Forecast]) -> Forecast:
    """Returns the fastest way that exchanges the whole gradient."""
    return min((f for f in found if f.density is None), key=lambda f: f.seconds)


def recommended(found: Sequence[Forecast]) -> Forecast:
    """Returns the way to take.

    Among those within WORTH of the fastest, DGC of the highest density, since it costs the least accuracy; flat before
    nodes where both are as fast. Dense where it is among them too, unless it waits for the network for longer than
    that and each rank can be a worker: then DGCConfig.exchange "auto" can find out, and undecided() says so.
    """
    dense = best_dense(found)
    limit = WORTH * min(f.seconds for f in found)
    close = [f for f in found if f.density is not None and f.seconds <= limit]
    if dense.seconds <= limit:
        most_to_gain = dense.seconds / min(f.local for f in found)
        close = [f for f in close if not f.nodes] if most_to_gain > WORTH else []
    return max(close, key=lambda f: (f.density or 0, not f.nodes), default=dense)


def undecided(found: Sequence[Forecast], chosen: Forecast) -> bool:
    """Returns whether dense steps may be as fast as the way to take, so that DGCConfig.exchange "auto" has to find out.

    Never where nodes are the workers, which refuse it: momentum is divided there.
    """
    return chosen.density is not None and not chosen.nodes and best_dense(found).seconds <= WORTH * chosen.seconds


def hours(forecast: Forecast, steps: int) -> float:
    """Returns the hours of so many steps."""
    return forecast.seconds * steps / 3600
