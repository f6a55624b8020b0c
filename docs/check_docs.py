"""Looks for broken links in the .md files of a folder, and for names of the public API without a docstring.

    python docs/check_docs.py [--root FOLDER] [--modules [NAME ...]]

Prints a line for each of them, and exits with 1 where there is one. Nothing is fetched from the network: of a link to
another site nothing is checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

ROOT = Path(__file__).parent.parent
MODULES = [
    "dgc",
    "dgc.checkpoint",
    "dgc.horovod",
    "dgc.accelerate",
    "dgc.lightning",
    "dgc.transformers",
    "dgc.torchft",
]
"""The public API."""
GENERATED = {"build", "dist", "runs"}
"""Folders that hold no source."""
NEEDED = {
    "dgc.horovod": ("horovod", "launch/install_horovod.sh"),
    "dgc.accelerate": ("accelerate", "pip install '.[accelerate]'"),
    "dgc.lightning": ("lightning", "pip install '.[lightning]'"),
    "dgc.transformers": ("transformers", "pip install '.[transformers]'"),
    "dgc.torchft": ("torchft", "pip install '.[torchft]'"),
}
"""What has to be installed for a module to be imported, and what installs it."""

_FENCE = re.compile(r"^ {0,3}(```|~~~).*?(?:^ {0,3}\1[^\n]*$|\Z)", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)\1(?!`)", re.DOTALL)
_TARGETS = [
    re.compile(r"\]\(\s*<?([^()\s<>]*)>?(?:\s+\"[^\"]*\")?\s*\)"),  # [text](target "title")
    re.compile(r"^ {0,3}\[[^\]^][^\]]*\]:\s*<?([^\s>]+)", re.MULTILINE),  # [name]: target
    re.compile(r"<[^>]*\s(?:href|src)=[\"']([^\"']*)"),
]
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)(?:[ \t]+#+)?[ \t]*$", re.MULTILINE)
_NAMED = re.compile(r"<[^>]*\s(?:id|name)=[\"']([^\"']+)")
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)


def pages(root: Path) -> list[Path]:
    """Returns the .md files below a folder, without those of environments, of hidden folders and of what is built."""
    found = []
    for folder, inside, files in os.walk(root):
        inside[:] = [
            name
            for name in inside
            if not name.startswith(".") and name not in GENERATED and not Path(folder, name, "pyvenv.cfg").exists()
        ]
        found += [Path(folder, name) for name in files if name.endswith(".md")]
    return sorted(found)


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page: its headings (those that begin with #) as GitHub names them, and HTML's ids."""
    text = _blank(_FENCE, text)
    found: set[str] = set()
    for heading in _HEADING.findall(text):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link: its text
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        numbered = (f"{name}-{i}" for i in range(1, len(text)))
        found.add(name if name not in found else next(n for n in numbered if n not in found))
    return found | set(_NAMED.findall(text))


def targets(text: str) -> Iterator[tuple[int, str]]:
    """Yields the links and pictures of a page, outside of code: the number of the line, and where each leads."""
    text = _blank(_CODE, _blank(_FENCE, text))
    for pattern in _TARGETS:
        for match in pattern.finditer(text):
            yield text.count("\n", 0, match.start(1)) + 1, match[1]


def broken_links(root: Path) -> list[str]:
    """Returns what is wrong with the links below a folder, a line each."""
    root = root.resolve()
    wrong = []
    for page in pages(root):
        for line, target in sorted(targets(page.read_text())):
            if why := _why_broken(root, page, target):
                wrong.append(f"{page.relative_to(root)}:{line}: {target}: {why}")
    return wrong


def _why_broken(root: Path, page: Path, target: str) -> str | None:
    if not target:
        return "expected where it leads, found nothing"
    if _ELSEWHERE.match(target):
        return None
    path, _, anchor = unquote(target).partition("#")
    # A slash at the beginning is GitHub's way to write the repository's root.
    there = (root / path.lstrip("/") if path.startswith("/") else page.parent / path).resolve() if path else page
    if not there.is_relative_to(root):
        return "expected a path in the repository, found one that leads out of it"
    if not there.exists():
        return "expected a file or folder, found none"
    if anchor and there.suffix == ".md" and anchor not in anchors(there.read_text()):
        return f"expected a heading of that name in {there.relative_to(root)}, found none"
    return None


def missing_docstrings(modules: Iterable[str]) -> list[str]:
    """Returns the public names of modules that have no docstring, a line each.

    Which names there are is what pdoc shows: modules, classes, functions, methods, properties, attributes and fields,
    without what a class inherits, and without names that begin with an underscore.

    Raises:
        RuntimeError: a module cannot be imported.
    """
    from pdoc.doc import Class, Doc, Function, Module

    def walk(found: Doc[Any]) -> Iterator[str]:
        # pdoc falls back on what a base class says.
        inherited = isinstance(found, (Class, Function)) and not found.obj.__doc__
        if inherited or not found.docstring.strip():
            yield f"{found.fullname}: expected a docstring, found none"
        if isinstance(found, (Module, Class)):
            for one in found.own_members:
                if not one.name.startswith("_") and not isinstance(one, Module):
                    yield from walk(one)

    return [line for name in modules for line in walk(Module.from_name(name))]


def _blank(pattern: re.Pattern[str], text: str) -> str:
    """Returns a text with spaces in place of what matches; lines keep their numbers."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def main() -> None:
    """Prints what is wrong, and exits with 1 where something is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the .md files (default: the repository)")
    parser.add_argument(
        "--modules", nargs="*", default=MODULES, metavar="NAME", help=f"the public API (default: {' '.join(MODULES)})"
    )
    arguments = parser.parse_args()
    if not arguments.root.is_dir():
        parser.error(f"--root: expected a folder, got {arguments.root}")

    found = pages(arguments.root)
    wrong = broken_links(arguments.root)
    modules = []
    for name in arguments.modules:
        needed, installs = NEEDED.get(name, (None, ""))
        if needed and importlib.util.find_spec(needed) is None:
            print(f"NOT CHECKED: {name}, since {needed} is not installed. {installs} installs it")
        else:
            modules.append(name)
    if modules:
        if importlib.util.find_spec("pdoc") is None:
            parser.error("expected pdoc, which finds the docstrings, found none. pip install '.[test]' installs it")
        wrong += missing_docstrings(modules)

    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"{len(found)} pages, modules {', '.join(modules) or 'none'}: {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
