"""The cost model's constants, by least squares from runs on a network of known rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

import dgc
from dgc.cli.cost import Cluster, Link, communication, step_time
from dgc.cli.shapes import Shapes
from dgc.cli.traffic import Traffic, ddp_buckets, dense_traffic, dgc_traffic
from dgc.stats import traffic as bytes_carried

COMPETITORS = ("ddp", "ddp fp16", "dgc")
"""Those that the model knows; `no_sync` gives the compute time."""


@dataclass(frozen=True)
class Measured:
    """One competitor in one setting."""

    model: str
    rate_bits: float
    """Of each rank's link, bits a second."""
    ranks: int
    competitor: str
    seconds: float
    """Of a step; the median over rounds."""
    bytes_sent: float
    """That one rank sent in a step, counted on the link."""


@dataclass(frozen=True)
class Constants:
    """What the runs have to tell."""

    share: float
    """Of the line rate, that a collective reaches."""
    latency: float
    """Seconds of a round of a collective, besides its bytes."""
    hidden: float
    """Share of the compute time that communication hides in."""
    ddp: float
    """Seconds a parameter that plain DDP adds to compute."""
    ddp_fp16: float
    """The same with fp16_compress_hook."""
    dgc: float
    """The same with DGC, compressed parameters only."""
    unpack: float
    """Seconds for each entry received, a rank's own included."""


_SCALE = np.array([1, 1e-3, 1, 1e-9, 1e-9, 1e-9, 1e-9])
"""Unit of each constant in the fit, so that all are of the same size: milliseconds, nanoseconds."""
_UPPER = np.array([1, math.inf, 1, math.inf, math.inf, math.inf, math.inf])


@dataclass(frozen=True)
class Point:
    """A measured step, and all of it that is known beforehand."""

    measured: Measured
    compute: float
    traffic: Sequence[Traffic]

    @property
    def bytes_sent(self) -> int:
        """Bytes of tensors that one rank sends, without headers."""
        return sum(bytes_carried(t.payload, t.dense, self.measured.ranks) for t in self.traffic)

    def predict(self, constants: Constants) -> float:
        """Returns the seconds of a step by the model."""
        ranks = self.measured.ranks
        parameters = sum(t.dense for t in self.traffic)
        if self.measured.competitor == "ddp":
            overhead = constants.ddp * parameters / 4
        elif self.measured.competitor == "ddp fp16":
            overhead = constants.ddp_fp16 * parameters / 2
        else:
            overhead = sum(constants.dgc * t.compressed + constants.unpack * ranks * t.entries for t in self.traffic)
        network = Link(constants.share * self.measured.rate_bits / 8, constants.latency)
        cluster = Cluster(ranks, 1, network, inside=Link(math.inf, 0))
        seconds = communication(self.traffic, cluster, trees=False)
        return step_time(self.compute, overhead, seconds, constants.hidden * self.compute)


def points(measured: Sequence[Measured], shapes: Mapping[str, Shapes]) -> list[Point]:
    """Returns the runs that the model knows, with the compute time of the same setting.

    Raises:
        ValueError: a setting was not measured without an exchange, or a model's shapes are missing.
    """
    compute = {(m.model, m.rate_bits, m.ranks): m.seconds for m in measured if m.competitor == "no_sync"}
    found = []
    for m in measured:
        if m.competitor not in COMPETITORS:
            continue
        setting = (m.model, m.rate_bits, m.ranks)
        if setting not in compute or m.model not in shapes:
            raise ValueError(f"expected a no_sync run and shapes for {setting}, got none: run network.py again")
        buckets = ddp_buckets(shapes[m.model])
        if m.competitor == "dgc":
            traffic = dgc_traffic(buckets, m.ranks, dgc.DGCConfig())
        else:
            traffic = dense_traffic(buckets, 4 if m.competitor == "ddp" else 2)
        found.append(Point(m, compute[setting], traffic))
    return found


def calibrate(runs: Sequence[Point]) -> Constants:
    """Returns the constants with the least squared relative errors.

    Raises:
        ValueError: fewer runs than constants.
    """
    if len(runs) < len(_SCALE):
        raise ValueError(f"expected at least {len(_SCALE)} runs of {', '.join(COMPETITORS)}, got {len(runs)}")

    def errors(values: NDArray[np.float64]) -> list[float]:
        constants = Constants(*(values * _SCALE).tolist())
        return [run.predict(constants) / run.measured.seconds - 1 for run in runs]

    # The maximum in the step's time has a kink, so that one start could end on the wrong side of it.
    starts = [np.array([0.9, 0.1, hidden, 1.0, 1.0, 1.0, 1.0]) for hidden in (0.1, 0.5, 0.9)]
    fits = [least_squares(errors, start, bounds=(0, _UPPER), x_scale="jac") for start in starts]
    best = min(fits, key=lambda fit: float(fit.cost))
    return Constants(*(best.x * _SCALE).tolist())


def table(runs: Sequence[Point], constants: Constants) -> list[list[str]]:
    """Returns rows of predicted against measured."""
    rows = []
    for run in runs:
        m, predicted = run.measured, run.predict(constants)
        rows.append([m.model, f"{m.rate_bits / 1e9:g}", str(m.ranks), m.competitor])
        rows[-1] += [f"{1e3 * m.seconds:.1f}", f"{1e3 * predicted:.1f}", f"{100 * (predicted / m.seconds - 1):+.0f} %"]
        rows[-1] += [f"{m.bytes_sent / 1e6:.3f}", f"{run.bytes_sent / 1e6:.3f}"]
    return rows


def constants_table(constants: Constants) -> list[list[str]]:
    """Returns rows that name the constants."""
    share, latency, hidden, *costs = astuple(constants)
    names = ("DDP, a parameter", "DDP fp16, a parameter", "DGC, a compressed parameter", "DGC, a received entry")
    return [
        ["share of the line rate", f"{100 * share:.0f} %"],
        ["latency of a round", f"{1e6 * latency:.0f} us"],
        ["compute that hides communication", f"{100 * hidden:.0f} %"],
        *([name, f"{1e9 * cost:.2f} ns"] for name, cost in zip(names, costs, strict=True)),
    ]
