"""DGCConfig: everything that can be chosen, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DGCConfig:
    """How a model's gradients are compressed. Equal on all ranks.

    The defaults differ from the paper in two points, each of which cost accuracy in our measurements (docs/results.md):
    momentum is not masked at high densities, and small tensors are sent dense. `DGCConfig(momentum_masking=True,
    dense_below=0)` is the paper's setting. Sections are those of Lin et al., ICLR 2018.

    Raises:
        ValueError: a field is out of range; the message names it, what was expected and what came.
    """

    density: float = 0.001
    """Share of a parameter's entries sent at each step, in (0, 1]. Smaller: fewer bytes, staler entries. 1: dense."""

    warmup_steps: int = 0
    """Steps over which density falls to its final value (section 3.3). The paper: 1-4 % of the run; 0: no warm-up."""

    warmup_densities: tuple[float, ...] = (0.25, 0.0625, 0.015625, 0.004)
    """Densities of the warm-up's equal phases, falling. Those not above `density` are left out. Phases in which
    all-gather would carry more bytes than all-reduce run dense."""

    momentum_masking: bool | Literal["auto"] = "auto"
    """Whether u becomes 0 where an entry was sent (section 3.2). It keeps stale momentum from overshooting, but where
    much is sent it takes most of the momentum away: "auto" masks in steps whose density is below 1 %, in warm-up as
    after it."""

    clip_norm: float | None = None
    """Threshold of the gradient norm that one worker would use (section 3.2, local gradient clipping): each rank clips
    its own gradient at sqrt(world size) * clip_norm before it accumulates. None: no clipping."""

    dense_below: int = 16384
    """Parameters with fewer elements are sent dense, as are all of one dimension or none. Larger: more bytes, less
    staleness of small tensors. The paper: 0."""

    dense_parameters: tuple[str, ...] = ()
    """Names of further parameters to send dense."""

    wire_dtype: torch.dtype = torch.float32
    """Type of the values on the wire: float32, bfloat16 or float16. 16 bits send 4.06 bytes an entry instead of 6.06;
    the rounding error stays in the residual."""

    on_nonfinite: Literal["raise", "skip"] = "raise"
    """What the optimizer's step() does when any rank's gradient has an Inf or NaN: raise FloatingPointError on every
    rank, or leave this step out on every rank (dgc.SGD only). Either way the finite entries stay accumulated. On a GPU
    the step is always left out, and the error or the log line comes with the next one."""

    def __post_init__(self) -> None:
        """Checks every field."""
        _expect(
            "dense_parameters",
            isinstance(self.dense_parameters, (tuple, list)) and all(isinstance(n, str) for n in self.dense_parameters),
            "a sequence of parameter names",
            self.dense_parameters,
        )
        _expect(
            "warmup_densities",
            isinstance(self.warmup_densities, (tuple, list)),
            "falling numbers in (0, 1]",
            self.warmup_densities,
        )
        # Lists are what a JSON or YAML file gives.
        object.__setattr__(self, "warmup_densities", tuple(self.warmup_densities))
        object.__setattr__(self, "dense_parameters", tuple(self.dense_parameters))
        _expect("density", _in_unit_interval(self.density), "a number in (0, 1]", self.density)
        _expect("warmup_steps", _is_count(self.warmup_steps), "an integer >= 0", self.warmup_steps)
        _expect(
            "warmup_densities",
            all(_in_unit_interval(d) for d in self.warmup_densities)
            and all(a > b for a, b in zip(self.warmup_densities, self.warmup_densities[1:], strict=False)),
            "falling numbers in (0, 1]",
            self.warmup_densities,
        )
        _expect(
            "momentum_masking",
            self.momentum_masking in (True, False, "auto"),
            'True, False or "auto"',
            self.momentum_masking,
        )
        _expect(
            "clip_norm",
            self.clip_norm is None or (_is_number(self.clip_norm) and 0 < self.clip_norm < math.inf),
            "None or a finite number > 0",
            self.clip_norm,
        )
        _expect("dense_below", _is_count(self.dense_below), "an integer >= 0", self.dense_below)
        _expect("wire_dtype", self.wire_dtype in WIRE_DTYPES, "float32, bfloat16 or float16", self.wire_dtype)
        _expect("on_nonfinite", self.on_nonfinite in ("raise", "skip"), '"raise" or "skip"', self.on_nonfinite)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _in_unit_interval(value: float) -> bool:
    return _is_number(value) and 0 < value <= 1


def _expect(name: str, good: bool, expected: str, got: object) -> None:
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")
