"""Fixtures that choose where a test runs."""

from collections.abc import Iterator

import pytest
import torch

from support.roads import AVAILABLE, ops


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
