"""Measuring: links and steps of a model on the ranks of the default process group, and the forecast of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .forecast import BACKWARD, DENSITIES, FLOAT32, HALF, Forecast, Local, forecasts, ready_by_share
from .links import Links, slowest
from .models import Model, trained
from .ranks import UsageError
from .rehearsal import ALONE, Rehearsal, Rehearsed
from .shapes import Shapes
from .traffic import ddp_buckets

SAMPLES, PASSES = 3, 2
"""Times that each collective is measured, before the rehearsals and after; and turns that ways to exchange take."""


@dataclass(frozen=True)
class Setting:
    """What is planned for."""

    model: Model
    optimizer: str
    step: float | None
    """Seconds of a step without exchange; None to measure it."""
    backward: float | None
    """Seconds of the backward pass; None for BACKWARD of the step, or what is measured."""
    seconds: float = 15.0
    """For measuring, about."""


@dataclass(frozen=True)
class Measured:
    """What plan has found out by measuring."""

    buckets: list[Shapes]
    links: Links
    rehearsed: Mapping[str | float, Rehearsed]
    alone: float
    """Seconds of a step that exchanges nothing."""
    found: list[Forecast]
    took: float
    """Seconds of measuring."""


def measure(setting: Setting, device: torch.device, places: int, say: Callable[[str], object]) -> Measured:
    """Measures links and steps in the default process group; a collective.

    Args:
        setting: what is planned for.
        device: of the gradients.
        places: ranks of a node; 1 where each rank is a worker in any case.
        say: is told what is measured next.
    """
    began = time.monotonic()
    model, ranks = setting.model, dist.get_world_size()
    largest = max(4 * sum(map(math.prod, bucket.values())) for bucket in ddp_buckets(model.shapes))
    links = Links(device, places, largest)
    links.find_sizes(say)
    links.sample(SAMPLES)
    say("link: how much of an exchange goes on while a rank computes")
    links.measure_overlap()
    module, loss = trained(model, device)
    rehearsal = Rehearsal(module, loss, device, setting.optimizer, list(model.shapes))
    left = max(setting.seconds - (time.monotonic() - began), setting.seconds / 3) * 0.85
    ways = (ALONE, FLOAT32, HALF, *DENSITIES)
    for turn in range(PASSES):
        turned = time.monotonic()
        for way in ways:
            name = way if isinstance(way, str) else f"dgc {100 * way:g} %"
            say(f"step without network, {turn + 1} of {PASSES}: {name}")
            rehearsal.rehearse(way, left / len(ways) / PASSES)
        [share] = slowest([(time.monotonic() - turned) / left])
        if share > 0.75:  # long steps: the fewest of them have taken the time of all turns
            break
    rehearsed = rehearsal.found
    say("link: again")
    links.sample(SAMPLES)
    buckets, none = rehearsal.buckets, rehearsed[ALONE].seconds
    if model.loss is not None:
        alone = none
        local = {way: Local(r.seconds, r.ready) for way, r in rehearsed.items() if way != ALONE}
    else:
        # The steps had no forward and hardly a backward pass: what each adds to the step that was given.
        step, backward = times(setting)
        alone, ready = step, ready_by_share(buckets, backward)
        local = {way: Local(step + max(r.seconds - none, 0), ready) for way, r in rehearsed.items() if way != ALONE}
    found = forecasts(buckets, ranks, links.speeds, local, alone)
    return Measured(buckets, links, rehearsed, alone, found, time.monotonic() - began)


def times(setting: Setting) -> tuple[float, float]:
    """Returns the seconds of the step and of its backward pass, one of them by BACKWARD where only the other is given.

    Raises:
        UsageError: neither is given.
    """
    if setting.step is None and setting.backward is None:
        raise UsageError(
            "expected the time of a step, got a model without a loss: give --step-ms, or --backward-ms, as one of your "
            "workers has it without exchange; or a function that returns (module, loss), with loss(module) a scalar"
        )
    step = setting.step if setting.step is not None else (setting.backward or 0.0) / BACKWARD
    backward = setting.backward if setting.backward is not None else BACKWARD * step
    if backward > step:
        raise UsageError(f"--backward-ms: expected at most the step's {1e3 * step:g}, got {1e3 * backward:g}")
    return step, backward
