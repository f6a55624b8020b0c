"""The shapes of published networks: as many parameters as published, and as many of one dimension."""

import math

import pytest

from dgc.cli.shapes import NETWORKS


@pytest.mark.parametrize(
    ("name", "total", "of_one_dimension", "tensors"),
    [
        ("ResNet-50", 25_557_032, 54_120, 161),
        ("AlexNet", 60_965_224, 10_568, 16),
        ("PTB LSTM", 51_034_000, 34_000, 10),
        ("VGG-16", 138_357_544, 13_416, 32),
        ("BERT-large", 336_226_108, 356_156, 398),
        ("GPT-2 small", 124_439_808, 121_344, 148),
        ("Llama-3-8B", 8_030_261_248, 266_240, 291),
    ],
)
def test_parameter_counts_are_the_published_ones(name, total, of_one_dimension, tensors):
    shapes = NETWORKS[name]()
    assert sum(map(math.prod, shapes.values())) == total
    assert sum(shape[0] for shape in shapes.values() if len(shape) == 1) == of_one_dimension
    assert len(shapes) == tensors
