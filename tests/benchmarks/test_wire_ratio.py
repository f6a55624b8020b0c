"""The ratios of benchmarks/cluster/wire_ratio.py: the paper's by formula, and the bytes that are counted."""

import pytest
import torch

import dgc
from benchmarks.cluster.wire_ratio import PAPER, Sent, formula, sent
from dgc.cli.shapes import NETWORKS


@pytest.mark.parametrize("name", PAPER)
def test_the_formula_gives_the_papers_ratios(name):
    assert formula(NETWORKS[name]()) == pytest.approx(PAPER[name], abs=0.75)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # 120 entries: header 32, used 16, 120 + 119,999 / 512 upper bits 48, 9 low bits each 144, values 480 or 240.
        (dgc.DGCConfig(dense_below=0), Sent(payload=32 + 16 + 48 + 144 + 480, dense=4 * 7)),
        (dgc.DGCConfig(dense_below=0, wire_dtype=torch.bfloat16), Sent(payload=32 + 16 + 48 + 144 + 240, dense=4 * 7)),
        # A scale of 8 bytes, and 120 bytes or 60 of values.
        (dgc.DGCConfig(dense_below=0, wire_dtype="8bit"), Sent(payload=32 + 16 + 16 + 48 + 144 + 128, dense=4 * 7)),
        (dgc.DGCConfig(dense_below=0, wire_dtype="4bit"), Sent(payload=32 + 16 + 16 + 48 + 144 + 64, dense=4 * 7)),
        (dgc.DGCConfig(dense_below=120_001), Sent(payload=0, dense=4 * 120_007)),
    ],
)
def test_what_is_counted_is_what_the_wire_format_says(config, expected):
    assert sent({"matrix": (300, 400), "bias": (7,)}, config) == expected
