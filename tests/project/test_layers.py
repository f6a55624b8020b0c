"""Imports inside dgc go down only, and includes of csrc/ too; no file is long, and tests do not import each other."""

import ast
import re
from pathlib import Path

import pytest

import dgc

FOLDER = Path(dgc.__file__).parent
CSRC = FOLDER.parent / "csrc"

LEVELS = [
    {"_version", "config", "copied", "local", "needs", "stats"},
    {"ops"},
    {"exchange", "optim"},
    {"memory"},
    {"step"},
    {"ddp", "door", "doors", "fsdp", "fusion", "left", "rebind", "state"},
    {"local_steps", "rounds", "checkpoint", "checkpoint_parts", "checkpoint_reader"}
    | {"attach", "horovod", "horovod_elastic", "horovod_fusion", "horovod_state", "__init__"}
    | {"accelerate", "lightning", "torchft", "transformers", "cli", "__main__"},
]
"""From the bottom up: each imports from those before it, and from its own level without a circle."""
ROOMS = {"ops", "exchange", "optim", "memory", "step", "rounds", "cli"}
"""The folders. Two of one level do not know each other."""
MOST_LINES = {"state.py": 200}
MOST_LINES_ELSEWHERE = 300


def module_of(path: Path) -> str:
    """Returns a file's name as it is imported, without "dgc.": "step.bucket", "ops" for a folder, "__init__"."""
    parts = path.relative_to(FOLDER).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in FOLDER.rglob("*.py")}


def imports_of(module: str, source: str) -> set[str]:
    """Returns the modules of dgc that a source imports, wherever in it, by whatever form."""
    found = set()
    package = ["dgc", *module.split(".")]
    if module not in ROOMS:
        package = package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("dgc."):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0]
            names = ["dgc" + first.value] if isinstance(first, ast.Constant) else []
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != "dgc":
                continue
            # The longest beginning that is a module; a name of the package itself is a module of its own.
            inside = parts[1:]
            while inside and ".".join(inside) not in FILES:
                inside = inside[:-1]
            found.add(".".join(inside) or "__init__")
    return found - {module}


def level(module: str) -> int:
    """Returns how high a module stands, from 0."""
    first = module.split(".")[0]
    return next(i for i, names in enumerate(LEVELS) if first in names)


def graph() -> dict[str, set[str]]:
    return {module: imports_of(module, path.read_text()) for module, path in FILES.items()}


def test_every_module_has_its_place():
    assert {module.split(".")[0] for module in FILES} == set().union(*LEVELS)
    assert len(LEVELS) <= 7


def test_imports_go_down():
    upward = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if level(other) > level(module)
        or (level(other) == level(module) and {module.split(".")[0], other.split(".")[0]} == {"exchange", "optim"})
    ]
    assert upward == []


def test_there_are_no_circles():
    imports = graph()
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...] = ()) -> None:
        assert module not in above, f"a circle: {' -> '.join([*above, module])}"
        if module not in done:
            for other in imports[module]:
                visit(other, (*above, module))
            done.add(module)

    for module in imports:
        visit(module)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from dgc.state import DGCState", {"state"}),
        ("from dgc import state", {"state"}),
        ("from . import phase", {"step.phase"}),
        ("import dgc.state as s", {"state"}),
        ("import dgc\ndef f():\n    return dgc.state.DGCState", {"state", "__init__"}),
        ("def f():\n    from dgc.step.clip import clip_scale", {"step.clip"}),
        ("from dgc.ops import compress_", {"ops"}),
        ("from importlib import import_module\nimport_module('.checkpoint', 'dgc')", {"checkpoint"}),
        ("import torch\nfrom torch import Tensor", set()),
    ],
)
def test_every_form_of_import_is_seen(source, found):
    assert imports_of("step.bucket", source) == found


def test_no_file_is_long():
    long = {
        module: lines
        for module, path in FILES.items()
        if (lines := len(path.read_text().splitlines())) > MOST_LINES.get(path.name, MOST_LINES_ELSEWHERE)
    }
    assert long == {}


CSRC_FLOORS = [
    {"portable.h"},
    {"arithmetic.h", "wire.h"},
    {"codec.h", "rule.h"},
    {"bucket.h"},
    {"bucket.cpp", "cpu", "cuda"},
]


def csrc_floor(path: Path) -> int:
    first = path.relative_to(CSRC).parts[0]
    return next(i for i, names in enumerate(CSRC_FLOORS) if first in names)


def test_includes_of_the_kernels_go_down():
    upward = []
    sources = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 10
    for path in sources:
        for name in re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE):
            included = next(p for p in (path.parent / name, CSRC / name) if p.exists()).resolve()
            same_folder = included.parent == path.parent and path.parent != CSRC
            if not same_folder and csrc_floor(included) >= csrc_floor(path) and included.stem != path.stem:
                upward.append(f"{path.relative_to(CSRC)} includes {included.relative_to(CSRC)}")
    assert upward == []


TESTS = Path(__file__).parents[1]
TEST_FILES = sorted(TESTS.rglob("test_*.py"))
TEST_NAMES = {path.stem for path in TEST_FILES}
MOST_LINES_OF_A_TEST = 400


def imported_tests(source: str) -> set[str]:
    """Returns the test files that a source imports, wherever in it, by whatever form."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [*(alias.name for alias in node.names), *([node.module] if node.module else [])]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        found |= {part for name in names for part in name.split(".")} & TEST_NAMES
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from test_races import run", {"test_races"}),
        ("def f():\n    import test_races as races", {"test_races"}),
        ("from project import test_races", {"test_races"}),
        ("from project.test_races import run", {"test_races"}),
        ("__import__('test_races')", {"test_races"}),
        ("from support.models import Given\nimport torch", set()),
    ],
)
def test_every_form_of_import_of_a_test_is_seen(source, found):
    assert imported_tests(source) == found


def test_no_test_file_is_imported():
    assert len(TEST_FILES) > 40
    importing = {
        str(path.relative_to(TESTS)): imported
        for path in TESTS.rglob("*.py")
        if (imported := imported_tests(path.read_text()))
    }
    assert importing == {}


def test_no_test_file_is_long():
    long = {
        str(path.relative_to(TESTS)): lines
        for path in TEST_FILES
        if (lines := len(path.read_text().splitlines())) > MOST_LINES_OF_A_TEST
    }
    assert long == {}


def test_every_test_file_says_first_what_it_holds():
    silent = [
        str(path.relative_to(TESTS))
        for path in TEST_FILES
        if not path.read_text().startswith('"""') or not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []
