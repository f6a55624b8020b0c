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
HALVES = {"bf16": "bfloat16", "fp16": "float16"}
"""DGCConfig.dense_wire_dtype of the 16 bits that DDP has a hook for."""
DENSITIES = (0.01, 0.001)
BACKWARD = 2 / 3
"""Share of compute that is the backward pass: twice the multiply-adds of the forward pass."""
WORTH = 1.05
"""How many times faster DGC has to be before it is recommended: a forecast cannot tell less apart."""
DECIDES = "(docs/choosing.md, Let it decide)"


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


def advice(chosen: Forecast, auto: bool) -> str:
    """Returns a line on DGCConfig.exchange "auto" to print below lines(); an empty one where nodes are the workers.

    Args:
        chosen: the way to take.
        auto: whether lines() have it already.
    """
    if chosen.nodes:
        return ""
    if auto:
        return (
            f'exchange="auto" times dense and compressed steps while you train, and takes the quicker ones {DECIDES}.'
        )
    when = "slower" if chosen.density is None else "faster"
    config = 'dgc.DGCConfig(exchange="auto")' if chosen.density is None else 'exchange="auto" in DGCConfig'
    return f"Where the link may be {when} at times, {config} times both kinds of step and takes the quicker {DECIDES}."


def lines(chosen: Forecast, steps: int | None, half: str = "bf16", auto: Forecast | None = None) -> str:
    """Returns what to paste into the training script.

    Args:
        chosen: the way to take.
        steps: of the run; None where unknown.
        half: the 16 bits that DDP has a hook for: bf16 over NCCL, fp16 over gloo.
        auto: the dense way that DGCConfig.exchange "auto" is to try too; None without it.
    """
    if chosen.density is None:
        if chosen.name.endswith(FLOAT32):
            return "model = DistributedDataParallel(net)  # as it is: neither 16 bits nor dgc gain anything here"
        return (
            f"from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import {half}_compress_hook\n\n"
            "model = DistributedDataParallel(net)\n"
            f"model.register_comm_hook(None, {half}_compress_hook)"
        )
    options, note = [f"density={chosen.density:g}"], ""
    if chosen.density < DENSITIES[0]:
        options.append(f"warmup_steps={round(0.04 * steps) if steps else 2000}")
        note = f"# The warm-up: 4 % of {'the' if steps else 'your'} run; of a language model's half of it.\n"
    if auto is not None:
        options.append('exchange="auto"')
        if not auto.name.endswith(FLOAT32):
            options.append(f'dense_wire_dtype="{HALVES[half]}"')
    mesh = ', mesh="auto"' if chosen.nodes else ""
    return (
        "import dgc\n\n"
        "model = DistributedDataParallel(net)\n"
        f"{note}optimizer = dgc.attach(model, optimizer, dgc.DGCConfig({', '.join(options)}){mesh})"
    )
