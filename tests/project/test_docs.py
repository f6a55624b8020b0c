"""The documentation's links lead somewhere, and docs/check_docs.py sees a link, an anchor and a docstring that do not.

That the public API has its docstrings is launch/docs.sh's to say: it imports Horovod too, and builds the reference.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(root: Path, *modules: str) -> subprocess.CompletedProcess[str]:
    """Runs the checks on a folder, and on modules that are there."""
    command = [sys.executable, "docs/check_docs.py", "--root", str(root), "--modules", *modules]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_all_links_of_the_repository_lead_somewhere():
    result = check(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


GOOD = """# What it is

See [the other page](sub/other.md), [a part of it](sub/other.md#two-words-and-a-name "title"), [the second of one
name](#twice-1), [a folder](sub), ![a picture](/sub/picture.png), [elsewhere](https://example.org/nowhere#none),
[<b>HTML</b>](#by-hand) and [a name][name].

[name]: sub/other.md

## Twice
## Twice

<a id="by-hand"></a> `[code](nowhere.md)`

```
[code](nowhere.md)
```
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with two pages in which everything is right, and with pages that are not looked at."""
    (tmp_path / "README.md").write_text(GOOD)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.md").write_text("## Two words, and a `name`\n[back](../README.md#what-it-is)\n")
    (tmp_path / "sub" / "picture.png").touch()
    for name in ("build", ".hidden", "environment"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "page.md").write_text("[broken](nowhere.md)\n")
    (tmp_path / "environment" / "pyvenv.cfg").touch()
    return tmp_path


def test_links_that_are_right_are_no_error(folder):
    result = check(folder)
    assert (result.returncode, result.stdout) == (0, "2 pages, modules none: 0 wrong\n"), result.stderr


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("[text](nowhere.md)", "nowhere.md: expected a file or folder, found none"),
        ("![picture](sub/nothing.png)", "sub/nothing.png: expected a file or folder, found none"),
        ("[text](/other.md)", "/other.md: expected a file or folder, found none"),
        ("[![picture](sub/picture.png)](nowhere.md)", "nowhere.md: expected a file or folder, found none"),
        ("[text][name]\n\n[name]: nowhere.md", "nowhere.md: expected a file or folder, found none"),
        ('<img width="9" src="nowhere.png">', "nowhere.png: expected a file or folder, found none"),
        ("[text](#nothing)", "#nothing: expected a heading of that name in page.md, found none"),
        ("[text](#in-code)\n```\n# In code\n```", "#in-code: expected a heading of that name in page.md, found none"),
        ("[text](README.md#twice-2)", "README.md#twice-2: expected a heading of that name in README.md, found none"),
        ("[text](../page.md)", "../page.md: expected a path in the repository, found one that leads out of it"),
        ("[text]()", ": expected where it leads, found nothing"),
    ],
)
def test_a_broken_link_is_named(folder, link, why):
    (folder / "page.md").write_text(f"# A page\n\nFirst ` a stray backtick.\n\n{link}\n\nLast ` another.\n")
    result = check(folder)
    assert result.returncode == 1, result.stdout + result.stderr
    wrong, summary = result.stdout.splitlines()
    assert wrong.startswith("page.md:")
    assert wrong.endswith(f": {why}")
    assert summary == "3 pages, modules none: 1 wrong"


def test_a_broken_link_is_named_with_its_line(folder):
    (folder / "sub" / "page.md").write_text("```\n[code](a.md)\n```\n\n[good](other.md) and `x`, then [bad](no.md)\n")
    assert check(folder).stdout.splitlines()[0] == "sub/page.md:5: no.md: expected a file or folder, found none"


MODULE = '''"""A module."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Public", "Record", "function", "CONSTANT"]

CONSTANT = 1
"""A constant."""


class Public(Exception):
    """A class."""  # else it has the one of Exception

    def __init__(self) -> None:
        """Makes it."""
        self.attribute = 1
        """An attribute."""
        self._private = 2

    def method(self) -> None:
        """Does nothing."""

    @property
    def answer(self) -> int:
        """The answer."""
        return self._private

    def _private_method(self) -> None:
        pass


@dataclass
class Record:
    """A record."""  # else dataclass makes one

    field: int = 0
    """A field."""


def function() -> None:
    """Does nothing."""


def not_public() -> None:
    pass
'''


def check_module(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("pdoc", reason="NOT CHECKED: no pdoc, so docstrings were not looked for")
    (folder / "checked.py").write_text(text)
    return check(folder, "checked")


def test_public_names_with_docstrings_are_no_error(tmp_path):
    result = check_module(tmp_path, MODULE)
    assert (result.returncode, result.stdout) == (0, "0 pages, modules checked: 0 wrong\n"), result.stderr


@pytest.mark.parametrize(
    ("docstring", "name"),
    [
        ("A module.", "checked"),
        ("A constant.", "checked.CONSTANT"),
        ("A class.", "checked.Public"),
        ("An attribute.", "checked.Public.attribute"),
        ("The answer.", "checked.Public.answer"),
        ("A record.", "checked.Record"),
        ("A field.", "checked.Record.field"),
    ],
)
def test_a_missing_docstring_is_named(tmp_path, docstring, name):
    result = check_module(tmp_path, MODULE.replace(f'"""{docstring}"""', "..."))
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines() == [
        f"{name}: expected a docstring, found none",
        "0 pages, modules checked: 1 wrong",
    ]


def test_functions_and_methods_without_docstrings_are_named(tmp_path):
    result = check_module(tmp_path, MODULE.replace('"""Does nothing."""', "..."))
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines() == [
        "checked.Public.method: expected a docstring, found none",
        "checked.function: expected a docstring, found none",
        "0 pages, modules checked: 2 wrong",
    ]


def test_without_horovod_its_module_is_said_not_to_be_checked(tmp_path):
    # A Python without site-packages has no Horovod.
    command = [sys.executable, "-S", "docs/check_docs.py", "--root", str(tmp_path), "--modules", "dgc.horovod"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("NOT CHECKED: dgc.horovod, since horovod is not installed")


def test_docs_sh_explains_itself():
    result = subprocess.run(["launch/docs.sh", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "launch/docs.sh" in result.stdout
