"""benchmarks/kernels/ops.py: the wire formats are measured, and seconds become the table that they should."""

import pytest
import torch

from benchmarks.harness import interleave
from benchmarks.kernels import ops
from benchmarks.kernels.steps import Fused

FORMATS = ["float32", "8bit", "4bit"]


def test_every_format_is_measured_and_payloads_are_sound():
    floor = lambda *_: None  # noqa: E731
    seconds, entry_bytes = ops.compare(200_000, 0.01, 1, [floor, floor])
    assert [*entry_bytes] == FORMATS
    for name in FORMATS:
        for competitor in (f"encode {name}", f"decode {name}", f"decode and unpack 8 {name}"):
            assert len(seconds[competitor]) == 1
            assert seconds[competitor][0] > 0
    # 8.56 bits an index at 1 % (docs/wire.md), and header, used and scales of one parameter.
    for name, bits in zip(FORMATS, (32, 8, 4), strict=True):
        assert entry_bytes[name] == pytest.approx((8.56 + bits) / 8, abs=0.06)
    rows = ops.wire_rows(200_000, seconds, entry_bytes)
    assert [row[:2] for row in rows] == [["200,000", name] for name in FORMATS]
    assert all(len(row) == len(ops.WIRE_HEADERS) for row in rows)


def test_ratios_by_hand():
    seconds = {"dgc": [1.0, 2.0, 4.0], "unpack 8": [2.0, 2.0, 2.0]}
    seconds |= {"encode 8bit": [0.01, 0.02, 0.02], "decode 8bit": [0.01, 0.04, 0.02]}
    seconds |= {"decode and unpack 8 8bit": [2.4, 2.6, 3.0]}
    row = ["1,000", "8bit", "2.50", "1.020 (1.010 to 1.030)", "1.30 (1.20 to 1.50)"]
    assert ops.wire_rows(1000, seconds, {"8bit": 2.5}) == [row]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_decoded_is_what_was_selected(name):
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(100_000, generator=generator)
    fused = Fused([gradient], [torch.zeros(100_000)], torch.zeros(100_000), torch.tensor([[0, 0, 0, 100_000, 1000]]))
    coded = ops.Coded(fused, ops.FORMATS[name])
    fused()
    coded.encode()
    coded.received[:] = coded.payload
    coded.decode()
    assert torch.equal(coded.selections, fused.payload.expand(ops.RANKS, -1))
    sent = 100_000 - int(fused.v.count_nonzero())
    assert (sent == 1000) == (name == "float32")  # what rounding takes stays in v


def test_what_comes_before_a_competitor_is_called_for_it_alone():
    called = []
    note = lambda what: lambda: called.append(what)  # noqa: E731
    competitors = {"a": note("a"), "b": note("b")}
    interleave(competitors, 1, note("prepare"), before={"b": note("before b")})
    once = ["prepare", "a", "prepare", "a", "prepare", "before b", "b", "prepare", "before b", "b"]
    assert called == once * 2
