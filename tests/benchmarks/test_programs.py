"""The package benchmarks: imports without a circle, programs that start, shapes in one place, commands that exist."""

import argparse
import ast
import importlib.util
import re
from collections.abc import Mapping

import pytest

from benchmarks.harness import ROOT, result_name
from dgc.cli.shapes import NETWORKS
from support.programs import run_program


def name_of(path):
    """Returns a file's name as it is imported: "benchmarks.kernels.ops", "benchmarks.soak" for a folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in (ROOT / "benchmarks").rglob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
MAIN = 'if __name__ == "__main__":'
PROGRAMS = [name.removesuffix(".__main__") for name, path in FILES.items() if MAIN in path.read_text()]


def imports_of(name, tree):
    """Returns the modules of benchmarks that a module imports, wherever in it."""
    package = name.split(".") if FILES[name].stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for whole in names:
            parts = whole.split(".")
            while parts and ".".join(parts) not in FILES:  # what is left is a name in a module
                parts.pop()
            found.add(".".join(parts))
    return found - {"", "benchmarks", name}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Returns a circle of a graph; an empty list where there is none."""
    done: set[str] = set()

    def visit(node: str, above: tuple[str, ...]) -> list[str]:
        if node in above:
            return [*above[above.index(node) :], node]
        found: list[str] = []
        if node not in done:
            found = next(filter(None, (visit(other, (*above, node)) for other in graph[node])), [])
            done.add(node)
        return found

    return next(filter(None, (visit(node, ()) for node in graph)), [])


def test_imports_make_no_circle():
    graph = {name: imports_of(name, tree) for name, tree in TREES.items()}
    assert sum(map(len, graph.values())) > 50
    assert graph["benchmarks.kernels.rivals"] == {"benchmarks.kernels.steps"}
    assert circle(graph) == []
    folders: dict[str, set[str]] = {}
    for name, others in graph.items():
        folder = name.split(".")[1] if name != "benchmarks" else "benchmarks"
        folders.setdefault(folder, set()).update(other.split(".")[1] for other in others)
    assert circle({folder: others - {folder} for folder, others in folders.items()}) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


HELP = """
import runpy, sys, warnings
warnings.simplefilter("ignore", RuntimeWarning)  # one has imported the other
for name in sys.argv[1:]:
    print("== program", name)
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("exit", end.code)
"""


def test_every_program_answers_help_with_its_command(tmp_path):
    assert len(PROGRAMS) == 26
    horovod = importlib.util.find_spec("horovod") is not None
    programs = [name for name in PROGRAMS if horovod or "horovod" not in name]
    (tmp_path / "help.py").write_text(HELP)
    result = run_program(str(tmp_path / "help.py"), *programs)
    assert result.returncode == 0, result.stderr[-3000:]
    said = dict(text.split("\n", 1) for text in result.stdout.split("== program ")[1:])
    assert [*said] == programs
    for name, text in said.items():
        assert text.startswith("usage: "), name
        assert text.endswith("\nexit 0\n"), name
        assert f"python -m {name}" in text or f"./launch/{name.split('.')[-1]}.sh" in text, name


def test_the_name_of_a_result_is_no_path():
    assert result_name("network_auto") == "network_auto"
    for text in ("results/network_auto", "/x", "..", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a name without folders"):
            result_name(text)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_networks_shapes_are_written_once(network):
    function = NETWORKS[network].__name__
    defined = [
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.strip("_") == function
    ]
    assert defined == []  # dgc/cli/shapes.py has them
    # Extents by which a network is known, such as a vocabulary.
    peculiar = {n for shape in NETWORKS[network]().values() for n in shape if n > 10_000 and n % 1000}
    written = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in peculiar
    }
    assert written == set()


def test_commands_and_files_that_are_named_exist():
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").glob("*")]
    texts += [path for path in (ROOT / "benchmarks").rglob("*") if path.suffix in (".py", ".md", ".cu", ".cpp")]
    named = set()
    for path in texts:
        text = path.read_text()
        named |= {name for name in re.findall(r"-m (benchmarks[\w.]*\w)", text) if name not in PROGRAMS}
        files = re.findall(r"(?<![\w./])benchmarks/[a-z][\w/]*\.\w+", text)
        if ROOT / "benchmarks" in path.parents:
            files += re.findall(r"(?<![\w./])tests/[a-z][\w/]*\.\w+", text)
        named |= {file for file in files if not (ROOT / file).exists()}
    check = TREES["benchmarks.kernels.gpu_check"]
    strings = [node.value for node in ast.walk(check) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    tests = [text for text in strings if text.startswith("tests/")]
    assert len(tests) > 4
    named |= {test for test in tests if not (ROOT / test).exists()}
    assert named == set()
