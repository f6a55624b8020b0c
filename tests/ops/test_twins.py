"""Structs, constants and lists of names that Python and csrc both write down are equal, number by number."""

import ctypes
import re
from pathlib import Path

import pytest

from dgc.ops import args, cuda, segments, wire

CSRC = Path(__file__).parents[2] / "csrc"
ARGS, WIRE = (CSRC / "cuda/args.h").read_text(), (CSRC / "wire.h").read_text()
ASSERTED = {name: int(size) for name, size in re.findall(r"static_assert\(sizeof\((\w+)\) == (\d+)\);", ARGS)}
STRUCTS = {
    name: kind for name, kind in vars(args).items() if isinstance(kind, type) and issubclass(kind, ctypes.Structure)
}


def fields(source: str, struct: str) -> list[str]:
    """Returns the names of a C++ struct's members, in order."""
    body = re.search(rf"struct {struct} {{\n(.*?)\n}};", source, re.DOTALL)
    assert body is not None, struct
    return re.findall(r"^  [\w:*]+(?: \w+)*?[ *]+(\w+)(?:\[\w+\])?;", body[1], re.MULTILINE)


def test_every_struct_that_python_knows_has_the_asserted_size():
    known = {name: ctypes.sizeof(kind) for name, kind in STRUCTS.items()} | cuda.STRUCT_BYTES
    assert known == ASSERTED


@pytest.mark.parametrize("name", sorted(STRUCTS))
def test_structs_have_the_same_fields_in_the_same_order(name):
    assert [field for field, _ in STRUCTS[name]._fields_] == fields(ARGS, name)


def test_a_row_has_the_same_columns():
    columns = fields(WIRE, "Segment")
    assert columns == list(segments.COLUMNS)
    assert fields(ARGS, "DeviceSegment")[: cuda.ROW_COLUMNS] == columns[: cuda.ROW_COLUMNS]
    assert 8 * len(fields(ARGS, "DeviceSegment")) == cuda.STRUCT_BYTES["DeviceSegment"]


@pytest.mark.parametrize(
    ("source", "name", "value"),
    [
        (WIRE, "kTile", wire.TILE),
        (WIRE, "kGroup", wire.GROUP),
        (WIRE, "kAlign", wire.ALIGN),
        (WIRE, "kMagic", wire.MAGIC),
        (WIRE, "kSegmentColumns", len(segments.COLUMNS)),
        (ARGS, "kThreads", cuda.THREADS),
        (ARGS, "kChunk", cuda.CHUNK),
        (ARGS, "kBins", cuda.BINS),
        (ARGS, "kMaxSources", args.MAX_SOURCES),
        (ARGS, "kMaxPairs", args.MAX_PAIRS),
    ],
)
def test_constants_are_equal(source, name, value):
    found = re.search(rf"constexpr \w+ {name} = (\w+);", source)
    assert found is not None
    assert int(found[1], 0) == value
