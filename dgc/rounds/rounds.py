"""Rounds: how a round of LocalSteps goes, from the way of H inner steps to the weights that all go on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from dgc.local import crc32, local
from dgc.optim.sgd import SGD
from dgc.state import DGCState

from . import checks, host

logger = logging.getLogger("dgc")


class Rounds:
    """Rounds of some weights, of theta_0 and of the DGCState that reduces the difference of both.

    Attributes:
        state: the DGCState of theta_0, with stats and density.
        outer: the outer optimizer. A schedule may change its lr, on all islands alike.
        every: H, the inner steps between two rounds.
        delay: inner steps for which a round travels.
        position: inner steps since the last round was sent.
        rounds: rounds held so far.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: Optimizer,
        weights: Mapping[str, Tensor],
        start: Mapping[str, nn.Parameter],
        outer: Optimizer,
        state: DGCState,
        every: int,
        delay: int,
        on_host: bool,
    ) -> None:
        """Takes what LocalSteps has made."""
        self._model, self._inner, self._weights, self._start = model, inner, weights, start
        self.outer, self.state, self.every, self.delay = outer, state, every, delay
        self.position = self.rounds = 0
        self._on_host = on_host  # whether theta_0 is in the host's memory, wherever the weights are
        self._compare_weights = False
        self._finished = False  # whether all islands were finishing in the last comparison
        self._sent_at: dict[str, Tensor] | None = None  # the weights when the round under way was sent

    @property
    def moved(self) -> bool:
        """Whether this island's weights are others than theta_0."""
        pairs = ((local(p), local(self._start[name])) for name, p in self._weights.items())
        return not all(torch.equal(weight, start.to(weight)) for weight, start in pairs)

    @property
    def under_way(self) -> bool:
        """Whether a round was sent and has not arrived."""
        return self._sent_at is not None

    def finish(self) -> None:
        """Holds a last round, with the steps taken since the last one; a collective, at the end of training.

        Islands may have taken different numbers of steps: this goes on until all of them have called it. Raises what a
        round raises; see exchange_now.
        """
        while not self.exchange_now(finishing=True):
            pass

    def _stepped(self, *_: object) -> None:
        self.position += 1
        if self.under_way and self.position >= self.delay:
            self._arrive()
        if self.position >= self.every:
            self._send(finishing=False)
            if not self.delay:
                self._arrive()

    def exchange_now(self, *, finishing: bool = False) -> bool:
        """Holds a round, and waits for it; a collective. The inner optimizer's H-th step() begins one by itself.

        A round that fails is given up on this island: weights go back to theta_0, and what they had moved waits in e,
        or, where a parameter is sent dense, stays in the weights.

        Args:
            finishing: whether this island takes no further steps.

        Returns:
            Whether all islands are finishing.

        Raises:
            FloatingPointError: a difference is not finite on some island, and config.on_nonfinite is "raise". The round
                is left out on all islands. With "skip" that is logged.
            RuntimeError: an island has gone; or parameters of the model were replaced.
            ValueError: islands are at different rounds, or their theta_0 differs. Nothing has changed.
            PayloadError: an island sent what does not fit.
        """
        if self.under_way:
            self._arrive()
        self._send(finishing)
        self._arrive()
        return self._finished

    @torch.no_grad()
    def _send(self, finishing: bool) -> None:
        """Compares this round with the other islands', and sends the way since the last one."""
        checks.check_same(self._model, self._inner, self._weights)
        if self.state.exchange.changed:
            self.state.regroup()
        self._finished = self._compare(finishing)
        last = self.state.last_pass
        for name, start in self._start.items():
            start.grad = host.way_of(self._weights[name], start, self._on_host)
        copied = self._weights if self.delay else {}
        self._sent_at = {name: host.copy_of(local(p), self._on_host) for name, p in copied.items()}
        try:
            self.state.send()
        except Exception:
            if self.state.last_pass is last:  # nothing was accumulated, and nothing has changed
                self._end()
            else:
                self.position = 0
                self._give_up()
            raise
        self.position = 0

    @torch.no_grad()
    def _arrive(self) -> None:
        """Waits for the round that was sent, and goes on from its theta_0, with what was moved since."""
        skipped = self.state.stats.skipped
        try:
            self.outer.step()
        except Exception as error:
            self._give_up()
            if isinstance(error, FloatingPointError):
                self.rounds += 1
                text = f"LocalSteps: round {self.rounds} is left out on all islands: {error}"
                raise FloatingPointError(text) from error
            raise
        self.rounds += 1
        if self.state.stats.skipped > skipped:
            self._give_up()
            return
        if self._keeps_its_own():
            # theta_0 - (theta_0 - theta) would be rounded.
            for name, start in self._start.items():
                local(start).copy_(self._was(name))
        for name in self._weights:
            self._go_on_from_start(name)
        self._end()

    def _compare(self, finishing: bool) -> bool:
        """Compares this round with all islands', and returns whether all are finishing."""
        mine: dict[str, Any] = {
            "every": self.every,
            "delay": self.delay,
            "round": self.rounds,
            "lr of outer": [float(group["lr"]) for group in self.outer.param_groups],
        }
        if self._compare_weights:
            mine.update({f"checksum of theta_0's {name}": crc32(local(p)) for name, p in self._start.items()})
        finished = checks.compare(mine, finishing, self.state.exchange)
        self._compare_weights = False
        return finished

    def _was(self, name: str) -> Tensor:
        """Returns this rank's part of a weight as it was sent."""
        return self._sent_at[name] if self._sent_at else local(self._weights[name])

    def _go_on_from_start(self, name: str) -> None:
        """Sets a weight to theta_0 plus what was moved since the round was sent."""
        weight, start = local(self._weights[name]), local(self._start[name])
        if self._sent_at:
            weight.copy_(start.to(weight) + (weight - self._sent_at[name].to(weight)))
        else:
            weight.copy_(start)

    def _keeps_its_own(self) -> bool:
        """Returns whether a single island averages its own weights, all of them."""
        plain = isinstance(self.outer, SGD) and all(
            group["lr"] == 1 and not group["momentum"] and not group["weight_decay"]
            for group in self.outer.param_groups
        )
        return plain and self.state.exchange.topology.rows == 1 and not self.state.stats.sent_density

    def _give_up(self) -> None:
        """Takes weights back to theta_0 where their way is in e now, or where they are not finite."""
        self.state.discard(drop_gradient=False)
        names = self.state.accumulated
        for name, p in self._weights.items():
            if name in names:
                self._go_on_from_start(name)
            weight, start = local(p), local(self._start[name])
            weight.copy_(torch.where(weight.isfinite(), weight, start.to(weight)))
        self._end()
        if broken := checks.forget_broken(self._inner, self._weights):
            logger.warning(
                "dgc: round %d: the inner optimizer's state of %s was not finite, and begins anew",
                self.rounds,
                ", ".join(broken[:5]),
            )

    def _end(self) -> None:
        self._sent_at = None
        for start in self._start.values():
            start.grad = None
