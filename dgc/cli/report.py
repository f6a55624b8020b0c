"""What plan prints and draws."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .forecast import Forecast, hours
from .ranks import UsageError

INSTALL = "pip install 'torch-dgc[cli]'"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table; without the package tabulate, values between bars."""
    if importlib.util.find_spec("tabulate") is None:
        print(f"plan: tables are plain, since tabulate is not installed: {INSTALL}", file=sys.stderr)
        return "\n".join(" | ".join(row) for row in [headers, *rows])
    from tabulate import tabulate

    aligned = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True, colalign=aligned)


def check_picture(picture: Path | None) -> None:
    """Checks that a picture can be drawn, before anything is measured.

    Raises:
        UsageError: matplotlib is missing, or there is no such folder.
    """
    if picture is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"--picture: expected matplotlib, which draws it, found none: {INSTALL}, or leave it out")
    if not picture.resolve().parent.is_dir():
        raise UsageError(f"--picture: expected a folder that exists, got {picture}: make it, or name another")


def forecast_rows(found: Sequence[Forecast], ranks: int, steps: int | None, price: float | None) -> list[list[str]]:
    """Returns a row for each way to exchange."""
    dense = found[0].seconds
    rows = []
    for f in found:
        row = [f.name, f"{1e3 * f.seconds:,.1f}", f"{1e3 * f.waiting:,.1f}", f"{f.nbytes / 1e6:,.3f}"]
        row.append(f"{dense / f.seconds:.2f}x")
        if steps:
            row.append(f"{hours(f, steps):,.1f}")
        if steps and price:
            row.append(f"{hours(f, steps) * ranks * price:,.2f}")
        rows.append(row)
    return rows


def headers(steps: int | None, price: float | None) -> list[str]:
    """Returns the headers of forecast_rows()."""
    found = ["exchange", "ms a step", "of it waiting", "MB a rank sends", "speed-up"]
    return found + ["hours"] * bool(steps) + ["price"] * bool(steps and price)


def as_json(found: Sequence[Forecast], chosen: Forecast) -> dict[str, Any]:
    """Returns the forecast as JSON can write it."""
    ways = [
        {"name": f.name, "seconds": f.seconds, "waiting": f.waiting, "bytes": f.nbytes, "recommended": f is chosen}
        for f in found
    ]
    return {"forecast": ways}


def draw(picture: Path, title: str, found: Sequence[Forecast], chosen: Forecast) -> None:
    """Draws a bar for each way to exchange: the step itself, what exchanging adds to it, and waiting."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    names = [f"{f.name}\nrecommended" if f is chosen else f.name for f in found]
    least = min(f.local for f in found)
    parts: Mapping[str, tuple[list[float], str]] = {
        "the step itself": ([1e3 * min(least, f.local) for f in found], "tab:gray"),
        "casting or compressing": ([1e3 * max(f.local - least, 0.0) for f in found], "tab:orange"),
        "waiting for the network": ([1e3 * f.waiting for f in found], "tab:red"),
    }
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.55 * len(found)), layout="constrained")
    left = [0.0] * len(found)
    for label, (widths, colour) in parts.items():
        axes.barh(names, widths, left=left, color=colour, label=label, height=0.65)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for at, end in enumerate(left):
        axes.text(end, at, f" {end:,.0f} ms", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("milliseconds of a step, predicted")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)
