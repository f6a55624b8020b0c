"""Imports inside dgc go down only, so that the folder can be read from the bottom up."""

import ast
from pathlib import Path

import dgc

LAYERS = [
    {"config", "wire", "advice", "foreign", "copied"},
    {"reference", "cuda", "schedule", "clip", "stats", "exchange", "memory"},
    {"kernels", "probes"},
    {"jit"},
    {"ops", "phase", "share", "horovod_exchange"},
    {"optim", "bucket"},
    {"parameters", "report", "verdict"},
    {"buckets", "backward", "ddp"},
    {"state"},
    {"horovod_elastic", "checkpoint"},
    {"horovod"},
    {"__init__"},
]
FOLDER = Path(dgc.__file__).parent


def level(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return {name for name in found if (FOLDER / f"{name}.py").exists()}


def test_every_module_has_a_layer():
    assert {p.stem for p in FOLDER.glob("*.py")} == set().union(*LAYERS)


def test_imports_go_down():
    upward = [
        f"{path.stem} imports {name}"
        for path in FOLDER.glob("*.py")
        for name in imports_of(path)
        if level(name) >= level(path.stem)
    ]
    assert upward == []
