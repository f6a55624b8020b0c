"""Fixtures that choose where a test runs."""

from collections.abc import Iterator

import pytest
import torch
from roads import ROADS, ops


@pytest.fixture(params=[name for name in ROADS if name != "cuda" or torch.cuda.is_available()])
def road(request: pytest.FixtureRequest) -> Iterator[str]:
    """The road that roads.ops takes in this test; see roads.py. tests/test_cuda.py says where there is no GPU."""
    ops.take(request.param)
    yield request.param
    ops.take("native")
