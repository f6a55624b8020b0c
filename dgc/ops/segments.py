"""The segment table, which says what a bucket compresses and where it lies, and all that follows from it.

The ops take the table itself, a plain int64 tensor on the CPU. Python code takes what `Segments` has worked out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .wire import TILE, PayloadLayout, WireLayout, div_up, layout_of, low_bits, payload_layout, upper_bits


class Segment(NamedTuple):
    """A row of the segment table: one compressed parameter of a bucket. csrc/wire.h has its twin."""

    source: int
    """The gradient tensor that holds it."""
    offset: int
    """Its first element there."""
    state: int
    """Its first element in momentum and residual."""
    numel: int
    """Its elements."""
    entries: int
    """k: the entries that it sends at each step."""


COLUMNS = Segment._fields


class Segments:
    """A segment table, and what follows from it, each worked out once."""

    def __init__(self, table: Tensor) -> None:
        """Copies the table.

        Raises:
            RuntimeError: it is no table of segments.
        """
        if table.device.type != "cpu" or table.dtype != torch.int64 or table.shape[1:] != (len(COLUMNS),):
            raise RuntimeError(
                f"segments: expected a contiguous int64 CPU tensor of shape [segments, {len(COLUMNS)}], got "
                f"{table.dtype} on {table.device} of shape {tuple(table.shape)}"
            )
        self._table = table.detach().clone(memory_format=torch.contiguous_format)
        self._layouts: dict[torch.dtype, WireLayout] = {}
        self._columns: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def table(self) -> Tensor:
        """The table that the ops take, int64 [segments, columns] on the CPU: a copy, never to be changed."""
        return self._table

    @classmethod
    def from_rows(cls, rows: Iterable[Segment | tuple[int, ...]]) -> Segments:
        """Returns the table of these rows, in the order of COLUMNS."""
        # Types and devices are written out: torch has defaults of its own that users change.
        table = torch.tensor([Segment(*row) for row in rows], dtype=torch.int64, device="cpu")
        return cls(table.view(-1, len(COLUMNS)))

    def __len__(self) -> int:
        """Returns the number of parameters."""
        return len(self.table)

    @cached_property
    def rows(self) -> tuple[Segment, ...]:
        """The rows as numbers."""
        return tuple(Segment(*row) for row in self.table.tolist())

    @property
    def source(self) -> Tensor:
        """The gradient tensor that holds each parameter: int64 [segments], as all columns are."""
        return self.table[:, 0]

    @property
    def offset(self) -> Tensor:
        """The first element of each parameter in its gradient tensor."""
        return self.table[:, 1]

    @property
    def state(self) -> Tensor:
        """The first element of each parameter in momentum and residual."""
        return self.table[:, 2]

    @property
    def numel(self) -> Tensor:
        """The elements of each parameter."""
        return self.table[:, 3]

    @property
    def entries(self) -> Tensor:
        """The entries that each parameter sends."""
        return self.table[:, 4]

    @cached_property
    def tiles(self) -> Tensor:
        """The tiles of each parameter: int64 [segments]."""
        return (self.numel + TILE - 1) // TILE

    @cached_property
    def n_tiles(self) -> int:
        """The tiles of the bucket."""
        return sum(div_up(row.numel, TILE) for row in self.rows)

    @cached_property
    def n_entries(self) -> int:
        """The entries that the bucket sends."""
        return sum(row.entries for row in self.rows)

    @cached_property
    def n_state(self) -> int:
        """The elements that momentum and residual have at least."""
        return max((row.state + row.numel for row in self.rows), default=0)

    @cached_property
    def first_tile(self) -> Tensor:
        """The first tile of each parameter, counted in the bucket: int64 [segments]."""
        return self.tiles.cumsum(0) - self.tiles

    @cached_property
    def first_entry(self) -> Tensor:
        """The first entry of each parameter, counted in the payload: int64 [segments]."""
        return self.entries.cumsum(0) - self.entries

    @cached_property
    def upper_words(self) -> Tensor:
        """The 32-bit words with the upper bits of each parameter's indices: int64 [segments]."""
        words = [div_up(upper_bits(row.numel, row.entries), 32) for row in self.rows]
        return torch.tensor(words, dtype=torch.int64, device="cpu")

    @cached_property
    def lower_words(self) -> Tensor:
        """The 32-bit words with the low bits of each parameter's indices: int64 [segments]."""
        words = [div_up(row.entries * low_bits(row.numel, row.entries), 32) for row in self.rows]
        return torch.tensor(words, dtype=torch.int64, device="cpu")

    @cached_property
    def first_upper(self) -> Tensor:
        """The first word with upper bits of each parameter, counted in the payload's section: int64 [segments]."""
        return self.upper_words.cumsum(0) - self.upper_words

    @cached_property
    def first_lower(self) -> Tensor:
        """The first word with low bits of each parameter, counted likewise: int64 [segments]."""
        return self.lower_words.cumsum(0) - self.lower_words

    @cached_property
    def segment_of_tile(self) -> Tensor:
        """The parameter that each tile belongs to: int64 [tiles]."""
        return torch.repeat_interleave(torch.arange(len(self), dtype=torch.int64, device="cpu"), self.tiles)

    @cached_property
    def segment_of_entry(self) -> Tensor:
        """The parameter that each entry belongs to: int64 [entries]."""
        return torch.repeat_interleave(torch.arange(len(self), dtype=torch.int64, device="cpu"), self.entries)

    @cached_property
    def tile_begin(self) -> Tensor:
        """The first element of each tile, counted in its parameter: int64 [tiles]."""
        tile = torch.arange(self.n_tiles, dtype=torch.int64, device="cpu")
        return (tile - self.first_tile[self.segment_of_tile]) * TILE

    @cached_property
    def tile_state(self) -> Tensor:
        """The first element of each tile in momentum and residual: int64 [tiles]."""
        return self.state[self.segment_of_tile] + self.tile_begin

    @cached_property
    def tile_numel(self) -> Tensor:
        """The elements of each tile: int64 [tiles]."""
        return (self.numel[self.segment_of_tile] - self.tile_begin).clamp(max=TILE)

    def column(self, name: str, device: torch.device) -> Tensor:
        """Returns one of the tensors above on a device; copied once, since a copy from the host waits for a GPU."""
        key = name, device
        if key not in self._columns:
            column: Tensor = getattr(self, name)
            self._columns[key] = column.to(device)
        return self._columns[key]

    def check(self) -> None:
        """Checks that the kernels stay inside their memory with this table; what passed once is not checked again.

        Raises:
            RuntimeError: a row is out of range, or two lie on the same elements, which would race.
        """
        if not self._sound:
            raise RuntimeError("segments: expected none to overlap")

    @cached_property
    def _sound(self) -> bool:
        """Checks every row on its own, and returns whether no two overlap."""
        places = self.table[:, :3]
        in_range = (places >= 0).all() & (self.table < 2**47).all()
        if not in_range or not ((self.entries > 0) & (self.entries <= self.numel)).all():
            raise RuntimeError("segments: expected source, offset, state >= 0 and 0 < entries <= numel")
        if self.n_entries >= 2**32:
            raise RuntimeError(
                f"segments: expected fewer than 2^32 entries a bucket, got {self.n_entries}: use smaller buckets"
            )
        in_state = sorted((0, row.state, row.numel) for row in self.rows)
        in_gradients = sorted((row.source, row.offset, row.numel) for row in self.rows)
        return all(
            before[0] != after[0] or before[1] + before[2] <= after[1]
            for spans in (in_state, in_gradients)
            for before, after in pairwise(spans)
        )

    def payload(self, value_bits: int) -> PayloadLayout:
        """Returns where the sections of a payload start, with values of 32, 16, 8 or 4 bits."""
        uppers, lowers = int(self.upper_words.sum()), int(self.lower_words.sum())
        return payload_layout(len(self), self.n_entries, uppers, lowers, value_bits)

    def wire(self, wire_dtype: torch.dtype) -> WireLayout:
        """Returns where the sections of a selection start, with values of this type."""
        if wire_dtype not in self._layouts:
            layout = layout_of(len(self), self.n_tiles, self.n_entries, wire_dtype.itemsize)
            self._layouts[wire_dtype] = layout
        return self._layouts[wire_dtype]


_KNOWN: MutableMapping[Tensor, Segments] = WeakIdKeyDictionary()
"""The known tables that came as tensors. Segments has a copy of the table, or the tensor would never go."""


def segments_of(table: Tensor | Segments) -> Segments:
    """Returns what a segment table says: worked out once for each tensor, and again where its contents changed."""
    if isinstance(table, Segments):
        return table
    known = _KNOWN.get(table)
    if known is None or not torch.equal(known.table, table):
        known = _KNOWN[table] = Segments(table)
    return known


def checked(table: Tensor) -> Segments:
    """Returns what a segment table says, where it is sound: see Segments.check."""
    segments = segments_of(table)
    segments.check()
    return segments


def wire_layout(segments: Tensor | Segments, wire_dtype: torch.dtype) -> WireLayout:
    """Returns where the sections of a bucket's selection start.

    Args:
        segments: the table, or what is known of it.
        wire_dtype: of the values: float32, bfloat16 or float16.
    """
    return segments_of(segments).wire(wire_dtype)
