"""Fixtures that choose where a test runs, and the order of the files."""

from collections.abc import Iterator

import pytest
import torch

from support.roads import AVAILABLE, ops

LONG = ["elastic_torchrun", "examples", "compress", "sanitizers", "network", "lightning", "transformers", "elastic"]
"""The files that take longest, which xdist's --dist loadfile starts first: at the end nothing runs beside them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests so that long files come first."""
    names = [item.path.stem.removeprefix("test_") for item in items]
    places = [LONG.index(name) if name in LONG else len(LONG) for name in names]
    items[:] = [item for _, item in sorted(zip(places, items, strict=True), key=lambda pair: pair[0])]


@pytest.fixture(params=AVAILABLE)
def road(request: pytest.FixtureRequest) -> Iterator[str]:
    """The road that roads.ops takes in this test; see support/roads.py.

    tests/ops/test_cuda.py says where there is no GPU.
    """
    ops.take(request.param)
    yield request.param
    ops.take("native")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, since the tensors are small; and roads.ops is native again afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    ops.take("native")
