"""Sparse: the compressed half of a bucket, from gradients to a payload and from all payloads to averages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dgc import ops
from dgc.exchange.base import Topology
from dgc.memory.memory import Memory
from dgc.memory.slots import Gradients, Slot
from dgc.ops import wire
from dgc.ops.codec import Codec
from dgc.ops.segments import Segment, Segments
from dgc.ops.selection import first_indices, positions
from dgc.optim.base import Rule
from dgc.optim.work import Work

from .allotment import evidence_of
from .undo import Undo


class Member(NamedTuple):
    """One compressed parameter of a bucket."""

    slot: Slot
    position: int
    """Position in the bucket, from 0."""
    entries: int
    """k, the number of its entries that are sent."""
    alive: int
    """Number of its elements that are not masked."""


class Sparse:
    """The compressed parameters of one bucket in one phase: segment tables, buffers and the undo log.

    `selection` holds the entries that the op has chosen, with the values that receivers will read; the codec makes the
    payload of it.
    """

    def __init__(
        self,
        gradients: Gradients,
        members: Sequence[Member],
        memory: Memory,
        rule: Rule,
        codec: Codec,
        topology: Topology,
        *,
        masking: bool,
        droppable: bool,
        decay: float,
        agreed: str,
    ) -> None:
        """Allocates the buffers of a pass.

        Args:
            gradients: the bucket, of which only sizes and places are used.
            members: the compressed parameters, in the bucket's order.
            memory: v, and the rule's tensors.
            rule: the optimizer's.
            codec: turns entries into bytes.
            topology: for the number of payloads.
            masking: whether the rule's tensors become 0 where an entry is sent.
            droppable: whether a pass can be dropped (DGCConfig).
            decay: factor of v in each pass (DGCConfig.residual_decay).
            agreed: a text that has to be equal on all ranks; it enters the header's fingerprint.
        """
        device = gradients.buffers[0].device
        self.members = members
        self._codec = codec
        self._row, self._decay = topology.row, decay
        # Types and devices are written out everywhere, since users change torch's defaults.
        rows = [Segment(*gradients.places[m.position], m.slot.offset, m.slot.numel, m.entries) for m in members]
        self.receiving = Segments.from_rows(rows)
        self.alive = sum(m.alive for m in members)
        self.entries = sum(m.entries for m in members)
        self._updates: Tensor | None = None
        self.sending = self.receiving
        if not rule.fused:
            begins = accumulate((row.numel for row in rows), initial=0)
            updates = zip(rows, begins, strict=False)
            self.sending = Segments.from_rows(row._replace(source=0, offset=begin) for row, begin in updates)
            self._updates = torch.zeros(sum(row.numel for row in rows), dtype=torch.float32, device=device)
        self._workspace = ops.workspace(self.receiving, device)
        self._sending_workspace = self._workspace if rule.fused else ops.workspace(self.sending, device)

        self._layout = self.receiving.wire(codec.dtype)
        self.selection = torch.zeros(self._layout.nbytes, dtype=torch.uint8, device=device)
        self.selections = torch.zeros(topology.rows, self._layout.nbytes, dtype=torch.uint8, device=device)
        """uint8 [rows, bytes]: the selections of all ranks, as received."""
        nbytes = codec.nbytes(self.receiving)
        self.payload = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self.gathered = torch.zeros(topology.rows, nbytes, dtype=torch.uint8, device=device)

        layout = [(m.slot.name, m.slot.numel, m.entries) for m in members]
        text = repr((layout, topology.rows, codec.name, agreed))
        self._fingerprint = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
        self._stamped = self._fingerprint
        self._step_in_header = wire.stamp(self.selection, self._fingerprint)
        masked = tuple(kind for kind in memory.kinds if kind in rule.masked) if masking else ()
        sent = {kind: torch.zeros(self.entries, dtype=torch.float32, device=device) for kind in masked}
        self.undo = Undo(
            [m.slot for m in members],
            self.sending,
            self._sending_workspace,
            self.selection,
            codec.dtype,
            sent,
            droppable=droppable,
        )
        self._columns: list[tuple[float, ...]] = []
        self._numbers = torch.ones(1, len(rows), dtype=torch.float32, device=device)
        self._one = torch.ones(1, dtype=torch.float32, device=device)

    def stamp(self, step: int, loss_scale: Tensor | None, dropped: int) -> None:
        """Writes into the header the values that change from step to step and have to be equal on all ranks.

        Args:
            step: of this pass.
            loss_scale: float32 [1], or None. Ranks with different scales would not find the same overflows.
            dropped: fingerprint of the parameters whose gradients were thrown away before the last step(); 0 for none.
        """
        self._step_in_header.fill_(step)
        fingerprint = self._fingerprint ^ dropped
        in_header = wire.header(self.selection)[2:3]
        if loss_scale is not None:
            in_header.copy_(loss_scale.view(torch.int32).long() ^ fingerprint)
        elif fingerprint != self._stamped:
            in_header.fill_(fingerprint)
            self._stamped = fingerprint

    def compress(
        self, gradients: Gradients, memory: Memory, rule: Rule, factors: list[tuple[float, ...]], scale: Tensor | None
    ) -> Tensor:
        """Accumulates gradients in the rule's tensors and in v, and returns the payload.

        Args:
            gradients: the bucket. Compressed gradients are overwritten by the values that decompress() expects there.
            memory: v and the rule's tensors, which change.
            rule: the optimizer's.
            factors: Rule.factors of each member.
            scale: float32 [1], the factor by which gradients are multiplied first; None for 1.
        """
        self._write_numbers(factors)
        self.undo.begin(memory)
        rule.compress(
            Work(
                gradients=gradients.buffers,
                receiving=self.receiving,
                updates=gradients.buffers if self._updates is None else [self._updates],
                sending=self.sending,
                kinds=memory.kinds,
                residual=memory.residual,
                numbers=self._numbers,
                factors=factors,
                scale=self._one if scale is None else scale,
                selection=self.selection,
                dtype=self._codec.dtype,
                workspace=self._sending_workspace,
                sent=self.undo.sent,
            )
        )
        if memory.kinds:
            memory.diverged.update(m.slot.name for m in self.members)
        self.undo.taken.fill_(1)
        self._codec.encode(self.selection, self.sending, self._sending_workspace, memory.residual, self.payload)
        return self.payload

    def _write_numbers(self, factors: list[tuple[float, ...]]) -> None:
        """Writes the decay of v and the factors, where they have changed, a row for each and a column for each member.

        By fill_, which passes each as an argument: a copy from the host would wait for the GPU.
        """
        columns = [(self._decay,) * len(factors), *zip(*factors, strict=True)]
        if len(columns) != len(self._numbers):
            self._numbers = self._numbers.new_empty(len(columns), len(factors))
        if len(columns) != len(self._columns):
            self._columns = [()] * len(columns)
        for row, column, before in zip(self._numbers, columns, self._columns, strict=True):
            if column == before:
                continue
            if len(set(column)) == 1:
                row.fill_(column[0])
            else:
                for i, number in enumerate(column):
                    row[i].fill_(number)
        self._columns = columns

    def decompress(self, gradients: Gradients, loss_scale: Tensor | None, report: Tensor) -> None:
        """Writes the average of the sent entries into the gradients, times the loss scale; reports each row's status.

        Args:
            gradients: the bucket, as compress() left it.
            loss_scale: float32 [1]; None for 1.
            report: int32 [rows + 1], receives dgc::unpack's status.
        """
        self._codec.decode(self.gathered, self.receiving, self._workspace, self.selections)
        ops.unpack(
            payloads=self.selections,
            rank=self._row,
            segments=self.receiving.table,
            workspace=self._workspace,
            scale=self._one if loss_scale is None else loss_scale,
            wire_dtype=self._codec.dtype,
            out=gradients.buffers,
            status=report,
        )

    def findings(self, codes: Sequence[int]) -> set[str]:
        """Returns descriptions of the gradients that were not finite, with their ranks.

        Args:
            codes: the status of each row, from decompress(), on the host.

        Raises:
            PayloadError: a rank sent what does not fit.
        """
        found = set()
        for row in wire.check_status(codes, self.selections):
            marks = self._marks(self.selections)[row].tolist()
            names = [m.slot.name for m, mark in zip(self.members, marks, strict=True) if mark & wire.LEFT_OUT]
            found.add(f"{', '.join(names)} on rank {row}")
        return found

    def look(self) -> Tensor:
        """Returns what the received payloads say of each parameter, int64 [3, members]; see allotment.Evidence.

        The tensor is on the host. On a GPU the copy is queued, and complete when the verdict on the step is.
        """
        found = evidence_of(self.selections, self.receiving, self._codec.dtype)
        if not found.is_cuda:
            return found
        return torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)

    def _marks(self, selections: Tensor) -> Tensor:
        at = self._layout.used
        return selections[..., at : at + len(self.members)]

    def witnesses(self, gradients: Gradients, unscale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns one sent element of each parameter, and whether its average is not zero.

        Args:
            gradients: the bucket, reduced.
            unscale: float32 [1]: the factor by which a GradScaler will multiply gradients; None for 1.

        Returns:
            int64 [members], indices in the flat parameters; bool [members].
        """
        first = first_indices(self.selection, self.sending, self._codec.dtype)
        if len(gradients.buffers) == 1:
            averages = gradients.buffers[0].view(-1)[first + self.receiving.column("offset", first.device)]
        else:
            flat = [gradients.of(m.position) for m in self.members]
            averages = torch.cat([g.index_select(0, i).float() for g, i in zip(flat, first.split(1), strict=True)])
        if unscale is not None:
            averages = (averages.float() * unscale).to(averages.dtype)
        return first, averages != 0

    def chosen(self) -> Tensor:
        """Returns the elements of memory that this rank sends, int64 [entries]."""
        return positions(self.selection, self.sending, self._codec.dtype)[0]

    def restore_unused(self, memory: Memory) -> None:
        """Returns to memory the sent entries of parameters whose gradient was zero on every rank.

        unpack wrote zeros for them, since DDP with find_unused_parameters discards the result of such a parameter.
        """
        unused = (self._marks(self.selections) & wire.USED).amax(0) == 0
        if unused.is_cuda or unused.any():  # any() on the device would wait for it
            self.undo.restore(memory, unused.to(torch.uint8))
