"""Fixtures that choose where a test runs."""

from collections.abc import Iterator

import pytest
from support.roads import AVAILABLE, ops


@pytest.fixture(params=AVAILABLE)
def road(request: pytest.FixtureRequest) -> Iterator[str]:
    """The road that roads.ops takes in this test; see support/roads.py.

    tests/ops/test_cuda.py says where there is no GPU.
    """
    ops.take(request.param)
    yield request.param
    ops.take("native")
