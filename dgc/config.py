"""DGCConfig: the options of compression, checked once, when it is made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal

import torch

FLOATS: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
WIRE_DTYPES: dict[str, torch.dtype | Literal["8bit", "4bit"]] = {**FLOATS, "8bit": "8bit", "4bit": "4bit"}


@dataclass(frozen=True)
class DGCConfig:
    """The options of gradient compression, equal on all ranks.

    The defaults differ from the paper in two points, because the paper's settings cost accuracy in our measurements
    (docs/results.md): momentum is not masked at high densities, and small tensors are sent dense.
    `DGCConfig(momentum_masking=True, dense_below=0)` is the paper's setting. Sections are those of Lin et al., ICLR
    2018.

    `DGCConfig(**fields)` takes the fields as a JSON or YAML file or an argument parser gives them: lists for tuples,
    types by name. `as_dict()` returns them in that form.

    Raises:
        ValueError: a field is out of range; the message names the field, the expected values and the given one.
    """

    density: float = 0.001
    """Share of a parameter's entries sent at each step, in (0, 1]. Smaller: fewer bytes, staler entries. 1: dense."""

    warmup_steps: int = 0
    """Steps over which density falls to its final value (section 3.3). The paper: 1-4 % of the run; 0: no warm-up."""

    warmup_densities: tuple[float, ...] = (0.25, 0.0625, 0.015625, 0.004)
    """Densities of the warm-up's phases, which are equally long, in falling order. Those not above `density` are left
    out. `exchange` says which of them run dense."""

    momentum_masking: bool | Literal["auto"] = "auto"
    """Momentum factor masking (section 3.2): u becomes 0 where an entry was sent. Masking keeps stale momentum from
    overshooting, but at high densities it removes most of the momentum. "auto" masks in steps whose density is
    below 1 %, during warm-up and after it. What dgc.AdamW sends has no momentum that could be masked."""

    residual_decay: float = 1.0
    """Factor of the residual at each step, in (0, 1]: v <- residual_decay * v + what is added. Smaller: what has waited
    long counts less, and is lost in part. 1: nothing is lost. SparseLoCo takes 0.95 for the rounds of LocalSteps."""

    clip_norm: float | None = None
    """Local gradient clipping (section 3.2): the gradient norm at which a single worker would clip. Each rank clips its
    own gradient at sqrt(world size) * clip_norm before accumulating it. None: no clipping."""

    min_entries: int = 1
    """Entries that each compressed parameter sends at least, where it has so many; ranks that divide a parameter divide
    these too. Larger: less staleness of small parameters, for few bytes. The paper: 1."""

    selection: Literal["parameter", "global"] = "parameter"
    """How the entries are divided among the parameters. "parameter": each sends the same share, `density` of its own
    (the paper). "global": as many together, the largest of all of them: the entries move, after every eighth step,
    to the parameters whose smallest sent value is the largest, so that one threshold comes to hold for all. A parameter
    keeps `min_entries`. See docs/guide.md, and docs/results.md for what it is worth."""

    exchange: Literal["bytes", "auto"] = "bytes"
    """Rule by which a whole phase runs dense. "bytes": where all-gather would carry at least as many bytes as
    all-reduce. "auto": also where dense steps are quicker, by trials of a few steps of both kinds in every phase of 300
    steps or more and every 2,000 steps or more after that. What waits in the residual stays there until a compressed
    step. See docs/choosing.md."""

    dense_below: int = 16384
    """Number of elements below which a parameter is sent dense. Parameters with fewer than two dimensions always are.
    Larger: more bytes, less staleness of small tensors. The paper: 0."""

    dense_parameters: tuple[str, ...] = ()
    """Names of further parameters to send dense."""

    wire_dtype: torch.dtype | Literal["8bit", "4bit"] = torch.float32
    """Form of the values on the wire: float32, bfloat16 or float16, as the torch type or its name, or "8bit" or "4bit",
    a sign and a step on a logarithmic scale of each parameter's own. At 0.1 % an entry takes 5.5, 3.5, 2.5 or 2 bytes,
    its index included. The rounding error stays in the residual."""

    dense_wire_dtype: torch.dtype = torch.float32
    """Type in which dense gradients travel: float32, bfloat16 or float16, as the torch type or its name. The rounding
    error of parameters that are always dense waits in their residual, 4 bytes an element, and is sent later. Where a
    phase is dense, compressed parameters are rounded as by PyTorch's 16-bit hooks, without one. The sum is taken in
    this type too. Gradients that have 16 bits themselves keep their type."""

    on_nonfinite: Literal["raise", "skip"] = "raise"
    """Reaction of the optimizer's step() to an Inf or NaN in any rank's gradient: "raise" raises FloatingPointError on
    every rank, "skip" leaves the step out on every rank (optimizers of dgc only). Either way the finite entries stay
    accumulated. On a GPU the step is always left out, and the error or the log line comes with the next step."""

    droppable: bool = False
    """Makes it possible to drop a backward pass with all that it added to u and v: by
    `state.discard(drop_gradient=True)`, or by `p.grad = None` before step(). It costs a copy of u and v at every pass,
    8 bytes a compressed parameter (4 without momentum). See docs/reliability.md."""

    on_changed_gradient: Literal["warn", "raise", "ignore"] = "warn"
    """Reaction of step() to a compressed parameter's .grad that was changed after backward(): "warn" once, "raise"
    RuntimeError before the update is applied (on a GPU one step later, when it has been), or "ignore", which does
    not compare. Such changes (clip_grad_norm_, weight decay by hand, noise) act on the few entries that were sent,
    which are sums of many steps, and not on the gradient."""

    check_every: int = 1000
    """Steps between two comparisons of the ranks' parameters and settings. A rank that differs is named, by a
    PayloadError on all ranks. Each takes one pass over the parameters, and 8 bytes a parameter on the network. Smaller:
    what went wrong is found sooner. 0: never. See docs/reliability.md for what it finds, and what it cannot."""

    def __post_init__(self) -> None:
        """Checks every field, and stores it in its declared type."""
        wire_type, dense_type = (str(x).removeprefix("torch.") for x in (self.wire_dtype, self.dense_wire_dtype))
        self._expect("density", _in_unit_interval(self.density), "a number in (0, 1], such as 0.01 for 1 %", float)
        self._expect("warmup_steps", _is_count(self.warmup_steps), "an integer >= 0, a number of steps", int)
        self._expect("check_every", _is_count(self.check_every), "an integer >= 0", int)
        self._expect(
            "warmup_densities",
            isinstance(self.warmup_densities, (tuple, list))
            and all(_in_unit_interval(d) for d in self.warmup_densities)
            and all(a > b for a, b in pairwise(self.warmup_densities)),
            "a sequence of falling numbers in (0, 1]",
            float,
        )
        self._expect(
            "momentum_masking",
            isinstance(self.momentum_masking, bool) or _is_one_of(self.momentum_masking, "auto"),
            'True, False (without quotes) or "auto"',
        )
        self._expect("residual_decay", _in_unit_interval(self.residual_decay), "a number in (0, 1]", float)
        self._expect(
            "clip_norm",
            self.clip_norm is None or (_is_number(self.clip_norm) and 0 < self.clip_norm < math.inf),
            "None (null in JSON and YAML) or a finite number > 0",
            float,
        )
        self._expect("min_entries", _is_count(self.min_entries) and self.min_entries > 0, "an integer >= 1", int)
        self._expect("selection", _is_one_of(self.selection, "parameter", "global"), '"parameter" or "global"')
        self._expect("exchange", _is_one_of(self.exchange, "bytes", "auto"), '"bytes" or "auto"')
        self._expect("dense_below", _is_count(self.dense_below), "an integer >= 0", int)
        self._expect(
            "dense_parameters",
            isinstance(self.dense_parameters, (tuple, list)) and all(isinstance(n, str) for n in self.dense_parameters),
            "a sequence of parameter names",
        )
        self._expect(
            "wire_dtype",
            isinstance(self.wire_dtype, (str, torch.dtype)) and wire_type in WIRE_DTYPES,
            'float32, bfloat16 or float16 (the torch type, or its name), "8bit" or "4bit"',
        )
        self._expect(
            "dense_wire_dtype",
            isinstance(self.dense_wire_dtype, (str, torch.dtype)) and dense_type in FLOATS,
            "float32, bfloat16 or float16 (the torch type, or its name)",
        )
        self._expect("on_nonfinite", _is_one_of(self.on_nonfinite, "raise", "skip"), '"raise" or "skip"')
        self._expect("droppable", isinstance(self.droppable, bool), "True or False (in JSON and YAML true, false)")
        self._expect(
            "on_changed_gradient",
            _is_one_of(self.on_changed_gradient, "warn", "raise", "ignore"),
            '"warn", "raise" or "ignore"',
        )
        stored = {
            "density": float(self.density),
            "warmup_steps": int(self.warmup_steps),
            "warmup_densities": tuple(float(d) for d in self.warmup_densities),
            "residual_decay": float(self.residual_decay),
            "clip_norm": None if self.clip_norm is None else float(self.clip_norm),
            "min_entries": int(self.min_entries),
            "dense_below": int(self.dense_below),
            "dense_parameters": tuple(self.dense_parameters),
            "wire_dtype": WIRE_DTYPES[wire_type],
            "dense_wire_dtype": FLOATS[dense_type],
        }
        for name, value in stored.items():
            object.__setattr__(self, name, value)

    def _expect(self, name: str, good: bool, expected: str, number: type[int] | type[float] | None = None) -> None:
        if not good:
            got = getattr(self, name)
            raise ValueError(f"{name}: expected {expected}, got {got!r}{_way_out(got, number) if number else ''}")

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON and YAML can write them: tuples as lists, types as their names."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        types = ("wire_dtype", "dense_wire_dtype")
        return {**fields, **{name: str(fields[name]).removeprefix("torch.") for name in types}}


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_count(value: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 0


def _in_unit_interval(value: float) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_one_of(value: object, *choices: str) -> bool:
    return isinstance(value, str) and value in choices


def _way_out(got: object, number: type[int] | type[float]) -> str:
    """Returns advice for a number that was given as a string; an empty text where none was."""
    if got == "None":
        return ". 'None' is a string: write null in JSON and YAML, None in Python, without quotes"
    for text in got if isinstance(got, (tuple, list)) else [got]:
        try:
            value = float(text) if isinstance(text, str) else math.nan
        except ValueError:
            continue
        if math.isfinite(value):
            # Python writes 1e-05, which YAML reads as a string again.
            written = str(int(value)) if number is int and value.is_integer() else repr(value)
            written = written if "." in written else written.replace("e", ".0e")
            return (
                f". {text!r} is a string: write {written} without quotes (YAML takes an exponent only as in 1.0e-3), "
                f"and in an argument parser type={number.__name__}"
            )
    return ""
