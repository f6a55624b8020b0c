"""Structs, constants and lists of names that Python and csrc both write down are equal, number by number."""

import ctypes
import inspect
import re
from pathlib import Path

import pytest
import torch

from dgc import ops
from dgc.ops import Accumulation, args, cuda, reference, segments, wire
from dgc.ops.launch import Kernels
from dgc.ops.library import OPS
from support.buckets import make
from support.roads import cuda_workspace

CSRC = Path(__file__).parents[2] / "csrc"
ARGS, WIRE, RULE = ((CSRC / name).read_text() for name in ("cuda/args.h", "wire.h", "rule.h"))
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
    assert fields(ARGS, "DeviceSegment")[: len(columns)] == columns
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
        (RULE, "kMaxKept", args.MAX_KEPT),
    ],
)
def test_constants_are_equal(source, name, value):
    found = re.search(rf"constexpr \w+ {name} = (\w+);", source)
    assert found is not None
    assert int(found[1], 0) == value


def test_the_rules_are_the_same():
    listed = re.search(r"enum class Accumulation : int64_t {(.*)};", RULE)
    assert listed is not None
    numbers = {name: int(number) for name, number in re.findall(r"k(\w+) = (\d+)", listed[1])}
    assert numbers == {rule.name.title(): rule.value for rule in Accumulation}
    for rule in Accumulation:
        body = re.search(rf"struct {rule.name.title()} {{\n(.*?)\n}};", RULE, re.DOTALL)
        assert body is not None, rule
        assert f"kKept = {rule.kept};" in body[1]
        [fields_of] = re.findall(r"^  float (.*);$", body[1], re.MULTILINE)
        assert len(fields_of.split(", ")) == rule.rows
        # compress_ names them in this order.
        assert fields_of.split(", ")[0] == "decay"
        if rule == Accumulation.ADAM:
            assert fields_of.split(", ")[1:] == ["weight", "b2", "c1", "c2", "step", "root", "eps"]
            assert fields_of.removeprefix("decay, ") in " ".join(ops.compress_.__doc__.split())
    assert max(rule.kept for rule in Accumulation) == args.MAX_KEPT


KERNELS = (CSRC / "cuda/kernels.cuh").read_text()


@pytest.mark.parametrize("op", OPS)
def test_launches_are_those_of_the_list(op):
    listed = KERNELS[KERNELS.index(f"#define DGC_{op.rstrip('_').upper()}_KERNELS(X)") :].split("#define")[1]
    launches = []
    kernels = Kernels(lambda name, x, y, _: launches.append((name, x, y)))
    ranks, rows = 3, make([200_000, 70_000])
    call = {
        "compress_": rows.list(),
        "unpack": [
            rows.payload.repeat(ranks, 1),
            0,
            rows.segments,
            cuda_workspace(rows.segments),
            rows.scale,
            rows.wire_dtype,
            rows.gradients,
            torch.zeros(ranks + 1, dtype=torch.int32),
        ],
        "restore_": [
            rows.payload,
            torch.ones(2, dtype=torch.uint8),
            rows.segments,
            cuda_workspace(rows.segments),
            rows.sent,
            rows.momentum,
            rows.residual,
            rows.wire_dtype,
        ],
        "subtract_": [[torch.zeros(20_000)], [torch.zeros(20_000)], 0.1, 1.0, None],
        "encode_": [
            rows.payload,
            rows.segments,
            cuda_workspace(rows.segments),
            rows.residual,
            rows.wire_dtype,
            8,
            torch.zeros(segments.Segments(rows.segments).payload(8).nbytes, dtype=torch.uint8),
        ],
        "decode": [
            torch.zeros(ranks, segments.Segments(rows.segments).payload(8).nbytes, dtype=torch.uint8),
            rows.segments,
            cuda_workspace(rows.segments),
            rows.wire_dtype,
            8,
            rows.payload.repeat(ranks, 1),
        ],
    }[op]
    if op == "compress_":
        call[8] = cuda_workspace(rows.segments)
    getattr(kernels, op)(*call)
    numbers = {"tiles": 4 + 2, "ranks": ranks, "blocks": 3, "kChunksPerTile": cuda.CHUNKS_PER_TILE}
    numbers |= {"kWarps": cuda.THREADS // 32, "div_up": wire.div_up}
    expected = re.findall(r"X\((dgc_\w+), (.+), (\w+)\)", listed)
    assert launches == [(name, eval(x, dict(numbers)), eval(y, dict(numbers))) for name, x, y in expected]


def test_every_op_is_everywhere():
    assert len(OPS) == len(set(OPS)) == 6
    launched = {name for name, value in vars(Kernels).items() if inspect.isfunction(value) and name[0] != "_"}
    assert launched == set(OPS)
    for name in OPS:
        assert inspect.isfunction(getattr(reference, name))
        assert inspect.isfunction(getattr(ops, name))
        for key in ("CPU", "CompositeExplicitAutograd", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dgc::{name}", key), (name, key)
        arguments = [argument.name for argument in getattr(torch.ops.dgc, name).default._schema.arguments]
        for place in (reference, ops, Kernels):
            parameters = list(inspect.signature(getattr(place, name)).parameters)
            assert [parameter for parameter in parameters if parameter != "self"] == arguments
