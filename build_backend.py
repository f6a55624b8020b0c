"""The build backend: setuptools', which is shown the torch that pip's build isolation hides.

The library is made with torch's headers and loads into every torch from 2.10 on, whichever it was made with. So it is
made with the torch of the environment that pip installs into, and pip brings one only where that has none.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

OLDEST_TORCH = (2, 10)
FIND = "import importlib.util as u; spec = u.find_spec('torch'); print(spec.origin if spec and spec.origin else '')"


def compiler() -> str:
    """Returns the C++ compiler."""
    return os.environ.get("CXX", "g++").split()[-1]  # "ccache g++"


def builds_native() -> bool:
    """Returns whether the library shall be built, and can be."""
    return os.environ.get("DGC_NATIVE") != "0" and shutil.which(compiler()) is not None


def is_recent(torch: Path) -> bool:
    """Returns whether the torch in a folder is one that the library can be made with."""
    file = torch / "version.py"
    found = re.search(r"""^__version__ = ["'](\d+)\.(\d+)""", file.read_text(), re.M) if file.exists() else None
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST_TORCH


def find_torch() -> Path | None:
    """Returns the folder of a torch 2.10 or later, without importing it: None where there is none.

    It is the one that can be imported, else the one that the same interpreter has outside of pip's build isolation.
    """
    spec = importlib.util.find_spec("torch")
    # pip hides it by PYTHONPATH, which -E ignores.
    hidden = subprocess.run([sys.executable, "-E", "-c", FIND], cwd="/", capture_output=True, text=True, check=False)
    for origin in (spec.origin if spec is not None else None, hidden.stdout.strip()):
        if origin and is_recent(Path(origin).parent):
            return Path(origin).parent
    return None


def torch_if_missing() -> list[str]:
    """Returns what pip has to bring so that the library can be built."""
    return ["torch>=2.10"] if builds_native() and find_torch() is None else []


def get_requires_for_build_wheel(config_settings: Mapping[str, str | list[str] | None] | None = None) -> list[str]:
    """Returns what setuptools wants, and torch where there is none."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch_if_missing()]


def get_requires_for_build_editable(config_settings: Mapping[str, str | list[str] | None] | None = None) -> list[str]:
    """Returns what setuptools wants, and torch where there is none."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *torch_if_missing()]
