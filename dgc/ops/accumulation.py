"""The rules by which the ops turn gradients into updates of v. csrc/rule.h is the twin of this file."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor


class Accumulation(IntEnum):
    """A rule that compress_ knows; dgc.ops.compress_ has the equations."""

    SUM = 0
    MOMENTUM = 1
    NESTEROV = 2
    ADAM = 3

    @property
    def kept(self) -> int:
        """The number of tensors that it keeps. The first one is a momentum."""
        return (0, 1, 1, 2)[self]

    @property
    def rows(self) -> int:
        """Its numbers for each parameter, the decay of v among them."""
        return (1, 2, 2, 8)[self]


def check_rule(rule: int, kept: Sequence[Tensor], numbers: Tensor, sent: Tensor | None, segments: int) -> None:
    """Checks that there are as many kept tensors and numbers as a rule has, and a momentum where it is to be logged.

    Raises:
        RuntimeError: there are not; the message names the argument.
    """
    known = [member.value for member in Accumulation]
    torch._check(rule in known, lambda: f"rule: expected 0 to {known[-1]}, got {rule}")
    of = Accumulation(rule)
    torch._check(len(kept) == of.kept, lambda: f"kept: expected {of.kept} tensors for rule {of.value}, got {len(kept)}")
    torch._check(
        tuple(numbers.shape) == (of.rows, segments),
        lambda: f"numbers: expected [{of.rows}, {segments}] for rule {of.value}, got {tuple(numbers.shape)}",
    )
    torch._check(sent is None or of.kept > 0, lambda: "sent: expected None where the rule keeps nothing")
