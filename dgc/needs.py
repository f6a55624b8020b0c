"""needs(): the oldest version of a framework that an adapter works with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version


def needs(oldest: str, *packages: str) -> None:
    """Checks that the first of these packages that is installed is new enough.

    Args:
        oldest: its oldest version that will do, as "2.6".
        packages: names of one package, newest first.

    Raises:
        ImportError: it is older, or none is installed.
    """
    for package in packages:
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if _numbers(found) < _numbers(oldest):
            raise ImportError(
                f"dgc: expected {package} {oldest} or later, got {found}: pip install '{package}>={oldest}'. Or leave "
                "its adapter out, and call dgc.attach(model, optimizer, config) in a loop of your own"
            )
        return
    raise ImportError(f"dgc: expected {packages[0]} {oldest} or later, got none: pip install '{packages[0]}>={oldest}'")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", text)[0])))  # type: ignore[index]  # matches always
