"""What happens in a run: all of it follows from the seed, the step and the rank."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dgc

SHAPES = {
    "integers": (130, 130),
    "bias": (100,),
    "momentum": (150, 120),
    "small": (60, 20),
    "normals": (260, 260),  # more than one tile
    "more integers": (140, 120),
}
COMPRESSED = ("integers", "momentum", "normals", "more integers")
RANDOM = ("momentum", "normals")
"""Those with normally distributed gradients. Compressed ones only: gloo's dense sums round by how DDP makes its
buckets, and that differs in the first step after a start."""
GROUPS = {
    ("integers", "bias", "small", "more integers"): {"lr": 0.25, "momentum": 0.0},
    ("normals",): {"lr": 0.125, "momentum": 0.0},
    ("momentum",): {"lr": 0.001, "momentum": 0.9},
}
LARGEST = 2  # integer gradients, before they are multiplied with the number of ranks
BLOCK = 25  # steps of a stretch of accumulation or state.dense
INIT_SCALE, GROWTH_INTERVAL = 2.0**16, 35
BAD = 0.02  # share of steps with an Inf or a NaN: the scale falls about as often as it grows
DISCARDED = 0.01
HANGS = 60.0  # seconds in which the survivors of a kill have to end; gloo's own timeout comes later


@dataclass(frozen=True)
class Run:
    """What a run follows from."""

    steps: int
    ranks: int
    kills: int
    seed: int
    save_every: int
    adamw: bool = False
    """Whether dgc.AdamW trains, in place of dgc.SGD."""
    nodes: int = 0
    """Nodes that are the workers; 0 where each rank is one."""

    @property
    def workers(self) -> int:
        """Returns how many shares of the residual there are."""
        return self.nodes or self.ranks

    @property
    def places(self) -> int:
        """Returns how many ranks divide a share."""
        return self.ranks // self.workers

    @property
    def groups(self) -> dict[tuple[str, ...], dict[str, Any]]:
        """Returns the settings of the optimizer's groups, by their parameters."""
        if not self.adamw:
            return {names: dict(sgd) for names, sgd in GROUPS.items()}
        # Without decay of the moments a direction is the sign of an integer, and sums of signs times lr are exact: so
        # are averages, where lr is a multiple of the number of ranks.
        integers = {"lr": 0.25 * self.ranks, "betas": (0.0, 0.0), "eps": 2.0**-60}
        return {("integers", "bias", "small", "more integers"): integers, ("normals", "momentum"): {"lr": 0.001}}

    @property
    def config(self) -> dgc.DGCConfig:
        """With a warm-up over a tenth of the run, in which a kill may fall."""
        # Not denser: all-reduce would be cheaper on eight ranks, and the phase dense.
        return dgc.DGCConfig(density=0.005, warmup_steps=self.steps // 10, warmup_densities=(0.1, 0.03))

    def saves_after(self, finished: int) -> bool:
        """Returns whether a checkpoint is due after so many steps."""
        return finished % self.save_every == 0 or finished == self.steps


@dataclass(frozen=True)
class Event:
    """What happens in one step."""

    backwards: int
    """Backward passes, all but the last under no_sync()."""
    dense: bool
    discarded: bool
    bad: tuple[int, str, int, float] | None
    """Rank, parameter, entry and value of a gradient that is not finite."""


def event_of(run: Run, step: int) -> Event:
    """Returns what happens in a step, from 0."""
    block = random.Random(f"{run.seed} block {step // BLOCK}")
    draw = random.Random(f"{run.seed} step {step}")
    accumulates, dense = block.random() < 0.3, block.random() < 0.25
    bad = None
    if draw.random() < BAD:
        name = draw.choice(list(SHAPES))
        value = draw.choice([math.inf, -math.inf, math.nan])
        bad = draw.randrange(run.ranks), name, draw.randrange(math.prod(SHAPES[name])), value
    return Event(
        backwards=2 if accumulates else 1,
        # Not in the first step after a restart; see RANDOM. And state.dense is refused where ranks divide memory.
        dense=dense and step % run.save_every != 0 and not run.nodes,
        discarded=draw.random() < DISCARDED,
        bad=bad,
    )


def gradients(run: Run, step: int, rank: int) -> list[dict[str, Tensor]]:
    """Returns the gradients of each backward pass of a step."""
    event = event_of(run, step)
    generator = torch.Generator().manual_seed(random.Random(f"{run.seed} {step} {rank}").getrandbits(63))
    passes = [
        {
            name: torch.randn(shape, generator=generator)
            if name in RANDOM
            else torch.randint(-LARGEST, LARGEST + 1, shape, generator=generator).float() * run.ranks
            for name, shape in SHAPES.items()
        }
        for _ in range(event.backwards)
    ]
    if event.bad is not None and event.bad[0] == rank:
        _, name, entry, value = event.bad
        passes[-1][name].view(-1)[entry] = value
    return passes


class Given(nn.Module):
    """Parameters whose gradients are the inputs."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            start = torch.randint(-8, 9, shape, generator=generator).float()
            self.register_parameter(name, nn.Parameter(start))

    def forward(self, given: Mapping[str, Tensor]) -> Tensor:
        """Returns a loss with these gradients."""
        return torch.stack([(self.get_parameter(name) * g).sum() for name, g in given.items()]).sum()
