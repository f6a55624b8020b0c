"""What should have come of a run: the sum of all gradients, and a simulation of the parameter with momentum."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dgc.local import rows_of
from dgc.optim.base import MASKED_BELOW
from dgc.step.phase import masks
from dgc.step.schedule import DensitySchedule, entries

from .run import (
    COMPRESSED,
    GROUPS,
    GROWTH_INTERVAL,
    INIT_SCALE,
    SHAPES,
    Given,
    Run,
    event_of,
    gradients,
)


class Simulation:
    """The parameter with momentum on all workers, in float64: momentum correction and masking as the paper has them."""

    def __init__(self, run: Run) -> None:
        (sgd,) = [sgd for names, sgd in GROUPS.items() if "momentum" in names]
        self.lr, self.mu = sgd["lr"], sgd["momentum"]
        self.start = Given().get_parameter("momentum").detach().double()
        self.parameter = self.start.clone()
        self.u = [torch.zeros_like(self.parameter) for _ in range(run.workers)]
        self.v = [torch.zeros_like(self.parameter) for _ in range(run.workers)]
        self.places = run.places
        self.rows = [rows_of(len(self.parameter), place, run.places) for place in range(run.places)]
        self.config, self.schedule = run.config, DensitySchedule(run.config)

    def compare(self, snapshots: Sequence[Mapping[str, Tensor]]) -> float:
        """Returns the error as a share of the way since the last snapshots, and goes on from these."""
        end = snapshots[0]["parameter"].double()
        error = float((self.parameter - end).norm() / (end - self.start).norm())
        self.start, self.parameter = end, end.clone()
        self.u, self.v = self._whole([s["u"] for s in snapshots]), self._whole([s["v"] for s in snapshots])
        return error

    def _whole(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Puts together what the ranks of each worker keep."""
        nodes = [parts[first : first + self.places] for first in range(0, len(parts), self.places)]
        flat = [torch.cat([part.flatten() for part in node]) for node in nodes]
        return [whole.view(self.parameter.shape).double() for whole in flat]

    def step(self, gradients: Sequence[Tensor], applied: int, left_out: bool, dense: bool) -> None:
        """Takes each worker's gradient; applied is how many steps were, until now."""
        workers = len(gradients)
        if dense:
            u = sum(self.u, torch.zeros_like(self.parameter)) / workers
            if not left_out:
                u = self.mu * u + sum(gradients, torch.zeros_like(u)) / workers
                self.parameter -= self.lr * u
            self.u = [u.clone() for _ in gradients]
            return
        density = self.schedule.density(applied)
        for g, u, v in zip(gradients, self.u, self.v, strict=True):
            finite = g.isfinite()
            u.copy_(torch.where(finite, self.mu * u + g, u))
            v.copy_(torch.where(finite, v + u, v))
            if left_out:
                continue
            for begin, end in self.rows:  # each place selects among its own
                p, of_u, of_v = (whole[begin:end].view(-1) for whole in (self.parameter, u, v))
                sent = of_v.abs().topk(entries(density, len(of_v))).indices
                p[sent] -= self.lr / workers * of_v[sent]
                of_v[sent] = 0
                if masks(self.config, density, MASKED_BELOW):
                    of_u[sent] = 0


@dataclass
class Ledger:
    """What the events of a run add up to."""

    total: dict[str, Tensor] = field(default_factory=lambda: {n: torch.zeros(s).double() for n, s in SHAPES.items()})
    """Sum over the ranks of all gradients, or for dgc.AdamW directions, that have to be applied or to wait."""
    momentum: float = 0.0
    """The largest error of the parameter with momentum between two checkpoints, as a share of the way."""
    applied: int = 0
    scale: float = INIT_SCALE
    lowest: float = INIT_SCALE
    highest: float = INIT_SCALE
    counts: Counter[str] = field(default_factory=Counter)


def ledger_of(run: Run, folder: Path | None = None) -> Ledger:
    """Adds up all steps, without DGC; compares the snapshots in a folder with the simulation on the way."""
    ledger, simulation = Ledger(), Simulation(run)
    good = 0  # steps since the scale has changed
    for step in tqdm(range(run.steps), desc="ledger", file=sys.stderr):
        event = event_of(run, step)
        left_out = event.discarded or event.bad is not None
        with_momentum = []
        sums = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for worker in range(run.workers):
            # Of all ranks of a node: one that is not finite makes the node's mean so.
            ranks = range(worker * run.places, (worker + 1) * run.places)
            passes = [one for rank in ranks for one in gradients(run, step, rank)]
            for name, total in ledger.total.items():
                g = sum((one[name] for one in passes[1:]), passes[0][name])
                if run.adamw:
                    sums[name] += g
                    if name in COMPRESSED and not event.dense:
                        total += run.places * torch.where(g.isfinite(), g.sign(), 0.0)
                elif name in COMPRESSED and not event.dense:
                    total += g.nan_to_num(0.0, 0.0, 0.0)  # an entry that is not finite is left out by itself
                elif not left_out:
                    total += g
                if name == "momentum":
                    with_momentum.append(g.double() / run.places)
        if run.adamw:
            dense = [name for name in SHAPES if (event.dense or name not in COMPRESSED) and not left_out]
            for name in dense:  # the direction of the average, on every rank
                ledger.total[name] += run.ranks * sums[name].sign()
        else:
            simulation.step(with_momentum, ledger.applied, left_out, event.dense)
        ledger.counts["accumulated over two passes"] += event.backwards == 2
        ledger.counts["with state.dense"] += event.dense
        ledger.counts["discarded"] += event.discarded
        ledger.counts["with an Inf or NaN"] += event.bad is not None
        ledger.applied += not left_out
        if folder is not None and not run.adamw and run.saves_after(step + 1):
            names = [folder / f"momentum{step + 1}.{rank}.pt" for rank in range(run.ranks)]
            error = simulation.compare([torch.load(name, weights_only=True) for name in names])
            ledger.momentum = max(ledger.momentum, error)
        if event.discarded:
            continue
        good = 0 if event.bad else good + 1
        if event.bad:
            ledger.scale /= 2
        elif good == GROWTH_INTERVAL:
            ledger.scale, good = 2 * ledger.scale, 0
        ledger.lowest, ledger.highest = min(ledger.lowest, ledger.scale), max(ledger.highest, ledger.scale)
    return ledger
