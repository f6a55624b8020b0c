"""Plain accumulation (paper, Algorithm 1): gradients are added to v, and nothing else is kept of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dgc.ops import Accumulation

from .base import Rule
from .work import Work


class Plain(Rule):
    """A rule that adds gradients to v, and keeps no other tensor."""

    masked_below = 0.0

    @property
    def kept(self) -> tuple[str, ...]:
        """The empty tuple, since v is the only tensor."""
        return ()

    def factors(self, parameter: Tensor, group: Mapping[str, Any], workers: int) -> tuple[float, ...]:
        """Returns no numbers."""
        return ()

    def compress(self, work: Work) -> None:
        """Adds gradients to v, and selects and packs."""
        work.compress(Accumulation.SUM)
