"""Node: what a bucket of whole gradients goes through inside the node, before its exchange with other nodes and after.

    scatter    every rank of the node gets the node's mean gradient for its rows of each parameter
    (the rows are a bucket of their own: compressed, exchanged between nodes, received; bucket.py)
    gather     the ranks of the node pass on what they have received, still packed, and each unpacks all of it

So the node is the worker, each of its ranks keeps momentum and residual for its rows alone, and a payload crosses the
node's link once. Dense gradients go the same way, their averaged rows as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.futures import Future
from torch.profiler import record_function

from dgc import ops
from dgc.config import DGCConfig
from dgc.exchange.base import Islands
from dgc.local import Piece, rows_of
from dgc.memory.slots import Gradients, Slot
from dgc.ops.segments import Segment, Segments
from dgc.ops.wire import GROUP, NON_FINITE_STATUS, align_up

from .bucket import NODE_DIFFERS, Bucket
from .schedule import entries, least_entries


class Span(NamedTuple):
    """One parameter of a bucket on its way through the node."""

    numel: int
    """Elements of the whole parameter."""
    begins: Sequence[int]
    """The first element of each place's rows, and numel after the last."""
    offset: int
    """The first element of its rows in what a place gets, where it has room for the most rows of any place."""

    @property
    def room(self) -> int:
        """Elements of the most rows that a place has."""
        return self.begins[1]


class Node:
    """A bucket's way through the node in one phase.

    Attributes:
        inner: the gradients of this rank's rows, which the exchange between nodes works on, in place.
    """

    def __init__(
        self,
        gradients: Gradients,
        compressed: Collection[str],
        config: DGCConfig,
        density: float,
        exchange: Islands,
        dtype: torch.dtype,
    ) -> None:
        """Lays out the rows of all places.

        Args:
            gradients: the bucket, of which only sizes and places are used.
            compressed: the names of all parameters whose rows are compressed.
            config: the user's.
            density: share of the entries of each place's rows that it sends.
            exchange: between nodes and inside them.
            dtype: of the values on the wire.
        """
        topology = exchange.topology
        self._name, self._exchange, self._dtype = gradients.slots[0].name, exchange, dtype
        self._place, self._places, self._row, self._rows = topology.place, topology.places, topology.row, topology.rows
        self._spans: list[Span] = []
        slots: list[Slot] = []
        self._chunk = 0
        for slot in gradients.slots:
            rows = slot.whole_rows
            size = slot.piece.whole // max(1, rows)
            begins = [rows_of(rows, place, self._places)[0] * size for place in range(self._places)]
            span = Span(slot.piece.whole, [*begins, slot.piece.whole], self._chunk)
            self._spans.append(span)
            begin, end = span.begins[self._place], span.begins[self._place + 1]
            slots.append(slot._replace(numel=end - begin, piece=Piece(begin, slot.piece.whole)))
            self._chunk += span.room
        device = gradients.buffers[0].device
        shard = torch.empty(self._chunk, dtype=gradients.buffers[0].dtype, device=device)
        self.inner = Gradients(slots, [shard], [(0, span.offset) for span in self._spans])
        self._sparse = [i for i, slot in enumerate(slots) if slot.name in compressed]
        self._dense = [i for i, slot in enumerate(slots) if slot.name not in compressed]
        self._tables = [self._table(gradients, place, config, density) for place in range(self._places)]
        self._workspaces = [ops.workspace(table, device) if len(table) else None for table in self._tables]
        nbytes = [self._rows * table.wire(dtype).nbytes if len(table) else 0 for table in self._tables]
        self._nbytes = nbytes
        self._dense_at = align_up(max(nbytes))
        dense = sum(self._spans[i].room for i in self._dense) * shard.element_size()
        self._length = align_up(self._dense_at + dense)
        self._one = torch.ones(1, dtype=torch.float32, device=device)

    def _table(self, gradients: Gradients, place: int, config: DGCConfig, density: float) -> Segments:
        """Returns the segments that a place sends, where they lie in the whole gradients."""
        rows, state = [], 0  # nothing is kept by this table, but its segments must not overlap
        for i in self._sparse:
            begins = self._spans[i].begins
            source, offset = gradients.places[i]
            if numel := begins[place + 1] - begins[place]:
                k = entries(density, numel, least_entries(config, numel, self._spans[i].numel))
                rows.append(Segment(source, offset + begins[place], state, numel, k))
                state = align_up(state + numel, GROUP)
        return Segments.from_rows(rows)

    @property
    def bytes_inside(self) -> int:
        """Bytes that this rank sends to the others of its node in one pass."""
        shard = self.inner.buffers[0]
        return (self._places - 1) * (shard.nbytes + self._length)

    def scatter(self, gradients: Gradients) -> Callable[[], None]:
        """Starts the node's mean gradient for this rank's rows, in `inner`; a collective of the node.

        Args:
            gradients: the bucket, whole.

        Returns:
            A function that waits for it.
        """
        with record_function("dgc.node"):
            return self._exchange.mean_in_node(self._name, self._by_place(gradients), self.inner.buffers[0])

    def _by_place(self, gradients: Gradients) -> Tensor:
        """Returns the rows of each place: [places, elements]."""
        shard = self.inner.buffers[0]
        sent = torch.empty(self._places, self._chunk, dtype=shard.dtype, device=shard.device)
        for i, span in enumerate(self._spans):
            whole = gradients.whole(i)
            for place in range(self._places):
                part = whole[span.begins[place] : span.begins[place + 1]]
                sent[place, span.offset : span.offset + len(part)] = part
                sent[place, span.offset + len(part) : span.offset + span.room] = 0
        return sent

    def start(self, bucket: Bucket) -> Callable[[], Tensor]:
        """Starts to pass on what this rank has received for its rows; a collective of the node.

        Args:
            bucket: of `inner`, received.

        Returns:
            A function that waits for what all have passed on, and returns it: uint8 [places, bytes].
        """
        shard = self.inner.buffers[0]
        own = torch.zeros(self._length, dtype=torch.uint8, device=shard.device)
        if bucket.sparse is not None:
            received = bucket.sparse.selections.view(-1)
            own[: len(received)] = received
        at = self._dense_at
        for i in self._dense:
            span = self._spans[i]
            part = shard[span.offset : span.offset + span.room].view(torch.uint8)
            own[at : at + len(part)] = part
            at += len(part)
        return self._exchange.gather_in_node(self._name, own)

    def finish(self, gathered: Tensor, gradients: Gradients, bucket: Bucket, loss_scale: Tensor | None) -> None:
        """Writes the averages of all rows into the gradients, and what does not fit into the bucket's report.

        Args:
            gathered: from start(), uint8 [places, bytes].
            gradients: the bucket, whole.
            bucket: of `inner`.
            loss_scale: float32 [1]; None for 1.
        """
        for i in self._sparse:
            gradients.whole(i).zero_()
        status = torch.empty(self._rows + 1, dtype=torch.int32, device=gathered.device)
        for place, (table, workspace) in enumerate(zip(self._tables, self._workspaces, strict=True)):
            if workspace is None:
                continue
            payloads = gathered[place, : self._nbytes[place]].view(self._rows, -1)
            ops.unpack(
                payloads=payloads,
                rank=self._row,
                segments=table.table,
                workspace=workspace,
                scale=self._one if loss_scale is None else loss_scale,
                wire_dtype=self._dtype,
                out=gradients.buffers,
                status=status,
            )
            wrong = ((status[:-1] != 0) & (status[:-1] != NON_FINITE_STATUS)).any()
            bucket.report[-1] |= NODE_DIFFERS * wrong
        at = self._dense_at
        for i in self._dense:
            span, whole = self._spans[i], gradients.whole(i)
            nbytes = span.room * whole.element_size()
            rows = gathered[:, at : at + nbytes].contiguous().view(whole.dtype).view(-1)
            for place in range(self._places):
                begin, end = span.begins[place], span.begins[place + 1]
                whole[begin:end] = rows[place * span.room : place * span.room + end - begin]
            at += nbytes


class Inside(NamedTuple):
    """A bucket that goes through the node before and after the exchange between nodes."""

    node: Node
    mean: Callable[[], None] | None
    """Waits for the mean of the node's gradients; None once it has, since it holds what was sent and received."""
    gradients: Gradients
    """Whole."""
    inner: Future[Tensor]
    """Completed when the node's rows have been received."""
    future: Future[Tensor]
    """Completed when the gradients hold the result."""


def gather(inside: Sequence[Inside], bucket_of: Callable[[Gradients], Bucket], loss_scale: Tensor | None) -> None:
    """Passes on inside the node what has come from other nodes, bucket after bucket; a collective of the node.

    The end of the backward pass calls it, and no callback: all ranks of the node have to start these collectives in one
    order.

    Args:
        inside: the buckets of a pass.
        bucket_of: returns the bucket of some rows.
        loss_scale: float32 [1]; None for 1.
    """
    started = []
    for one in inside:
        one.inner.wait()  # on a GPU, only the current stream waits
        started.append(one.node.start(bucket_of(one.node.inner)))
    for one, gathering in zip(inside, started, strict=True):
        with record_function("dgc.node"):
            one.node.finish(gathering(), one.gradients, bucket_of(one.node.inner), loss_scale)
        one.future.set_result(one.gradients.buffers[0])
