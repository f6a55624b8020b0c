"""Auto: DGCConfig.exchange "auto", which times dense and compressed steps of each phase and takes the quicker ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from dgc.exchange.base import Exchange
from dgc.stats import Choice

from . import log, trials


class Auto:
    """The choices of a run, and the trial that is under way.

    A step lasts from the beginning of its exchange to that of the next step's, so that it holds all there is in a
    loop: exchange, update, data and the next forward pass. Only the host's clock is read, and no device is waited for:
    on a GPU the host waits in each backward pass for the verdict on the last one, and so keeps the device's pace.

    No rank decides by its own clock. At the end of a round all ranks exchange their medians, and decide by all of them.
    Which exchange a step takes depends on its number and on what was agreed, so that ranks at one step do the same.

    Attributes:
        choices: by density and number of payloads; equal on all ranks, and part of checkpoints.
        clock: returns seconds; of this rank alone.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Starts without a choice: steps compress."""
        self.clock = clock
        self.choices: dict[tuple[float, int], Choice] = {}
        self.leave()

    def leave(self) -> None:
        """Gives up the trial that is under way, after ranks have come or gone, or a state was loaded."""
        self._key: tuple[float, int] | None = None
        self._begin(math.inf)

    def load(self, choices: Iterable[Choice]) -> None:
        """Takes the choices of a saved run."""
        self.choices = {(one.density, one.rows): one for one in choices}
        self.leave()

    @property
    def choice(self) -> Choice | None:
        """The choice of the present phase; None before its first trial is over."""
        return None if self._key is None else self.choices.get(self._key)

    def _begin(self, first: float) -> None:
        """Plans a trial from a step on; infinity for none."""
        self._first = first
        self._rounds: list[trials.Round] = []
        self._times: dict[int, float] = {}
        self._under_way: tuple[int, float] | None = None

    def enter(self, step: int, density: float, rows: int, steps_left: float, exchange: Exchange) -> bool:
        """Returns whether a step is dense; a collective of all ranks where a round has ended.

        Args:
            step: from 0.
            density: of its phase, which compresses something.
            rows: payloads that are gathered, more than one.
            steps_left: steps until density changes.
            exchange: the collectives.
        """
        if (density, rows) != self._key:
            self.leave()
            self._key = density, rows
            first = step + trials.LEAD if steps_left >= trials.LONG else math.inf
            self._begin(first if self.choice is None else self.choice.again)
        if self._under_way is not None:
            position, began = self._under_way
            self._times[position] = self.clock() - began
            self._under_way = None
        if step - self._first >= trials.ROUND * (len(self._rounds) + 1):
            self._end_round(step, density, rows, exchange)
        dense = self.choice is not None and self.choice.dense
        if step < self._first:
            return dense
        position = step - int(self._first)
        self._under_way = position, self.clock()
        return dense != trials.is_other(position)

    def on_trial(self, step: int) -> bool:
        """Returns whether a step belongs to a trial."""
        return step >= self._first

    def _end_round(self, step: int, density: float, rows: int, exchange: Exchange) -> None:
        """Puts the times of all ranks together, and decides if that was the last round."""
        before = None if self.choice is None else self.choice.dense
        found = trials.together(exchange.everyone(trials.report(self._times, len(self._rounds), bool(before))))
        if found is None:
            self._begin(step + trials.LEAD)
            return
        self._rounds.append(found)
        if not trials.is_over(self._rounds):
            return
        found = trials.figures(self._rounds)
        choice = Choice(
            density=density,
            rows=rows,
            dense=trials.dense_is_quicker(found, before),
            dense_ms=1e3 * found.dense,
            sparse_ms=1e3 * found.sparse,
            step=step,
            again=step + trials.steps_between(found, len(self._rounds)),
        )
        self.choices[density, rows] = choice
        if exchange.rank == 0:
            log.log_choice(choice, before)
        self._begin(choice.again)
