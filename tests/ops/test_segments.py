"""The segment table: what follows from it, worked out once, and what is refused."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dgc.ops import Segments, reference, wire
from dgc.ops.segments import COLUMNS, segments_of, wire_layout
from dgc.ops.selection import first_indices
from support.buckets import equal, make
from support.roads import ops

ROWS = [(0, 3, 0, 70_000, 70), (1, 0, 70_016, 65_536, 1), (1, 70_000, 140_000, 131_073, 9)]


def test_everything_that_follows_from_a_table():
    known = Segments.from_rows(ROWS)
    for at, name in enumerate(COLUMNS):
        assert getattr(known, name).tolist() == [tuple(row)[at] for row in known.rows], name
    assert len(known) == 3
    assert known.tiles.tolist() == [2, 1, 3]
    assert known.first_tile.tolist() == [0, 2, 3]
    assert known.n_tiles == 6
    assert known.segment_of_tile.tolist() == [0, 0, 1, 2, 2, 2]
    assert known.tile_begin.tolist() == [0, 65_536, 0, 0, 65_536, 131_072]
    assert known.tile_numel.tolist() == [65_536, 70_000 - 65_536, 65_536, 65_536, 65_536, 1]
    assert known.first_entry.tolist() == [0, 70, 71]
    assert known.n_entries == 80
    assert known.n_state == 140_000 + 131_073
    known.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layout_of_a_payload_is_worked_out_once_for_each_type(dtype):
    known = Segments.from_rows(ROWS)
    assert known.wire(dtype) is known.wire(dtype)
    assert known.wire(dtype) == wire.layout_of(3, 6, 80, dtype.itemsize) == wire_layout(known.table, dtype)


def test_a_bucket_without_compressed_parameters_has_an_empty_table():
    known = Segments.from_rows([])
    assert known.table.shape == (0, len(COLUMNS))
    assert (known.n_tiles, known.n_entries, known.n_state) == (0, 0, 0)
    known.check()


def test_a_table_is_a_copy_of_its_own():
    table = Segments.from_rows(ROWS).table
    known = Segments(table)
    table[0, 3] = 5
    assert known.rows[0].numel == int(known.numel[0]) == 70_000
    with pytest.raises(AttributeError):
        known.table = table


def test_what_is_known_of_a_tensor_is_kept_until_the_tensor_changes_or_goes():
    table = Segments.from_rows(ROWS).table
    known = segments_of(table)
    assert segments_of(table) is known
    assert segments_of(known) is known
    table[0, 4] = 71
    assert segments_of(table).n_entries == 81
    table.numpy()[0, 4] = 72  # behind torch's back
    assert segments_of(table).n_entries == 82
    gone = weakref.ref(segments_of(table))
    del table
    gc.collect()
    assert gone() is None


def test_a_table_made_in_inference_mode_is_known_too():
    with torch.inference_mode():
        table = torch.tensor(Segments.from_rows(ROWS).table.tolist())
        assert segments_of(table).n_entries == 80
        table[0, 4] = 71
        assert segments_of(table).n_entries == 81


@pytest.mark.parametrize(
    "table",
    [
        torch.zeros(2, len(COLUMNS) - 1, dtype=torch.int64),
        torch.zeros(2, len(COLUMNS)),
        torch.zeros(len(COLUMNS), dtype=torch.int64),
        torch.zeros(2, len(COLUMNS), dtype=torch.int64, device="meta"),
    ],
)
def test_what_is_no_table_is_refused(table):
    with pytest.raises(RuntimeError, match=r"segments: expected a contiguous int64 CPU tensor of shape \[segments, "):
        Segments(table)


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (0, "numel", 0, "0 < entries <= numel"),
        (0, "entries", 0, "0 < entries <= numel"),
        (1, "entries", 65_537, "0 < entries <= numel"),
        (2, "source", -1, "source, offset, state >= 0"),
        (2, "offset", 2**47, "source, offset, state >= 0"),
        (1, "state", 69_999, "none to overlap"),
        (2, "offset", 65_535, "none to overlap"),
    ],
)
def test_a_table_that_would_leave_its_memory_is_refused_again_and_again(row, column, value, message):
    rows = [list(r) for r in ROWS]
    rows[row][COLUMNS.index(column)] = value
    known = Segments.from_rows(rows)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            known.check()


def test_more_entries_than_32_bits_are_refused():
    known = Segments.from_rows([(i, 0, i * 2**40, 2**40, 2**31) for i in range(2)])
    with pytest.raises(RuntimeError, match=r"fewer than 2\^32 entries a bucket, got 4294967296: use smaller buckets"):
        known.check()


@pytest.mark.usefixtures("road")
def test_the_first_entry_of_each_parameter_is_found_in_the_payload():
    args = make([100, 200_000, 70_000], 0.001, torch.bfloat16, torch.float16)
    ops.compress_(*args.list())
    first = first_indices(args.payload, segments_of(args.segments), args.wire_dtype)
    assert first.tolist() == [min(args.entries(segment)) for segment in range(3)]


BAD = [
    ("entries", 101, "0 < entries <= numel"),
    ("numel", -1, "0 < entries <= numel"),
    ("offset", 2**62, "0 < entries <= numel"),
    ("state", 2**46, "(residual|kept): expected"),
    ("source", 1, "gradients"),
]


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize(("column", "value", "message"), BAD, ids=[column for column, *_ in BAD])
def test_a_bad_table_is_refused_after_a_good_one_at_the_same_address(column, value, message):
    args = make([100, 50])
    memory = args.segments.numpy()  # writes that torch does not count
    good = memory.copy()
    ops.compress_(*args.list())
    for _ in range(2):
        args.segments[1, COLUMNS.index(column)] = value
        with pytest.raises(RuntimeError, match=message):
            ops.compress_(*args.list())
        args.segments.copy_(torch.from_numpy(good))
        ops.compress_(*args.list())
    memory[1, COLUMNS.index(column)] = value
    with pytest.raises(RuntimeError, match=message):
        ops.compress_(*args.list())


@pytest.mark.usefixtures("road")
def test_overlap_is_refused_after_a_good_table_at_the_same_address():
    args = make([100, 50])
    ops.compress_(*args.list())
    args.segments[1, COLUMNS.index("offset")] = 99
    with pytest.raises(RuntimeError, match="segments: expected none to overlap"):
        ops.compress_(*args.list())


def test_more_tables_than_are_kept_are_all_checked():
    tables = [make([100 + i, 50], seed=i) for i in range(150)]
    for _ in range(2):
        for args in tables:
            ops.compress_(*args.list())
    for args in tables:
        args.segments[1, COLUMNS.index("entries")] = 51
        with pytest.raises(RuntimeError, match=r"0 < entries <= numel, got .* entries 51, numel 50"):
            ops.compress_(*args.list())


def test_threads_share_what_is_known():
    tables = [make([100 + i, 50], seed=i) for i in range(80)]
    expected = [args.clone() for args in tables]
    for args in expected:
        reference.compress_(*args.list())

    def run(args):
        ops.compress_(*args.list())
        return args

    with ThreadPoolExecutor(4) as pool:
        for done, other in zip(pool.map(run, tables), expected, strict=True):
            equal(done, other)
