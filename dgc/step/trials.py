"""Trials: the steps that are timed to find out whether dense steps are quicker, and what their times decide.

    ... as before | other  as before | other  as before | ...        a round is two blocks of BLOCK steps
                    s s t t t  s s t t t                             s: settles, t: timed

All of it is arithmetic of numbers that all ranks have alike, so that all ranks decide alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

LEAD = 8
"""Steps of a phase before its first trial: DDP lays out its buckets anew, and allocators fill."""
SETTLE = 2
"""Steps after a switch that are not timed: the first averages the momentum, both lay out buffers. On a GPU the host is
up to one step ahead of the device, so the second also pays for the first."""
TIMED = 3
"""Timed steps of a block. One that is slow for another reason, as one with a checkpoint, does not move the median."""
BLOCK = SETTLE + TIMED
ROUND = 2 * BLOCK
ROUNDS = 3
"""Most rounds of a trial."""
CLEAR = 4.0
"""Factor between both exchanges, over the rounds so far, at which a trial ends early."""
MARGIN = 0.02
"""Share of a step that the other exchange has to save before a measured choice is given up."""
EVERY = 2000
"""Fewest steps between two trials of a phase."""
SHARE = 0.005
"""Most of the run's time that trials may lose by steps of the slower exchange."""
LONG = 300
"""Fewest steps that a phase must have before it for a trial of its own."""


class Round(NamedTuple):
    """The times of one round: of each rank the median step, and of the ranks the median rank."""

    dense: float
    """Seconds of a dense step."""
    sparse: float
    """Seconds of a step that compresses."""

    @property
    def ratio(self) -> float:
        """Times that a sparse step goes into a dense one: above 1 where sparse ones are quicker."""
        return self.dense / self.sparse


def is_other(position: int) -> bool:
    """Returns whether a step of a trial (from 0) takes the exchange that is not the chosen one."""
    return position % ROUND < BLOCK


def report(times: Mapping[int, float], number: int, chosen_dense: bool) -> str:
    """Returns what a rank tells the others of a round: seconds of a dense and of a sparse step, or that it has none.

    Args:
        times: seconds by the step of the trial.
        number: of the round, from 0.
        chosen_dense: whether the chosen exchange is the dense one.
    """
    first = number * ROUND
    other, chosen = (range(first + begin + SETTLE, first + begin + BLOCK) for begin in (0, BLOCK))
    if any(position not in times for position in (*other, *chosen)):
        return json.dumps(None)
    pair = [median(times[position] for position in steps) for steps in (chosen, other)]
    return json.dumps(pair if chosen_dense else pair[::-1])


def together(reports: Sequence[str]) -> Round | None:
    """Returns the round of all ranks; None where one has no times, as it has just loaded a checkpoint.

    Each rank waits for all others in every step, so that a rank that is slow makes all steps of all ranks slow, of both
    kinds. The median over the ranks leaves out one whose times say something else.

    Args:
        reports: of report(), by rank.

    Raises:
        ValueError: a rank's are not two positive numbers.
    """
    pairs = []
    for rank, text in enumerate(reports):
        pair = json.loads(text)
        if pair is None:
            return None
        numbers = isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, (int, float)) for t in pair)
        if not numbers or not all(0 < t < math.inf for t in pair):
            raise ValueError(
                f"DGCState: expected seconds of a dense and of a compressed step from rank {rank}, got {text:.100}: "
                "restart all ranks from the same checkpoint, with the same version of dgc"
            )
        pairs.append(pair)
    dense, sparse = zip(*pairs, strict=True)
    return Round(median(dense), median(sparse))


def is_over(rounds: Sequence[Round]) -> bool:
    """Returns whether a trial has taken all its rounds, or all of them say the same, and clearly."""
    logs = [math.log(one.ratio) for one in rounds]
    agree = all(log > 0 for log in logs) or all(log < 0 for log in logs)
    return len(rounds) >= ROUNDS or (agree and abs(sum(logs)) >= math.log(CLEAR))


def figures(rounds: Sequence[Round]) -> Round:
    """Returns the median of a trial's rounds, whose ratio is the median of their ratios.

    Each round compares steps that are close together, so that a network that changes slowly does not count.
    """
    ratio = median(one.ratio for one in rounds)
    sparse = median(one.sparse for one in rounds)
    return Round(ratio * sparse, sparse)


def dense_is_quicker(found: Round, before: bool | None) -> bool:
    """Returns whether steps are to be dense after a trial.

    Args:
        found: its figures.
        before: whether they are dense by an earlier trial; None without one. That is kept unless the other exchange
            saves MARGIN of a step.
    """
    if before is None:
        return found.ratio < 1
    return found.dense * (1 - MARGIN) <= found.sparse if before else found.dense < found.sparse * (1 - MARGIN)


def steps_between(found: Round, rounds: int) -> int:
    """Returns the steps until the next trial: EVERY, or more, so that a dear trial costs SHARE of the time.

    Args:
        found: the figures of this trial.
        rounds: how many it took.
    """
    lost = rounds * BLOCK * (max(found) / min(found) - 1)
    return max(EVERY, math.ceil(lost / SHARE))
