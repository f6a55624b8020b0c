"""Undo: what one bucket's pass has done to memory, so that it can be taken back until step() has applied it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from dgc import ops
from dgc.memory.memory import Memory
from dgc.memory.slots import Slot
from dgc.ops.segments import Segments
from dgc.ops.selection import positions


class Undo:
    """The undo log of a bucket's compressed parameters. It never reads what travels.

    Attributes:
        sent: by kind, float32 [entries]: what the rule kept where entries were sent, before it became 0.
        taken: uint8 [parameters], 1 for each whose sent entries are out of v, and not yet applied.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        segments: Segments,
        workspace: Tensor,
        selection: Tensor,
        dtype: torch.dtype,
        sent: Mapping[str, Tensor],
        *,
        droppable: bool,
    ) -> None:
        """Takes what compress() writes.

        Args:
            slots: of the parameters.
            segments: the table that their entries were selected by.
            workspace: from dgc.ops.workspace, for these segments.
            selection: uint8, the entries that were taken off v, with the values that were.
            dtype: of these values.
            sent: see the class.
            droppable: whether memory is copied before each pass (DGCConfig).
        """
        self._slots, self._segments, self._workspace = slots, segments, workspace
        self._selection, self._dtype, self._droppable = selection, dtype, droppable
        self._spans = [slot.span for slot in slots]
        self.sent = sent
        self.taken = torch.zeros(len(slots), dtype=torch.uint8, device=selection.device)

    def begin(self, memory: Memory) -> None:
        """Copies memory as it is before the pass, where a pass can be dropped."""
        if self._droppable:
            memory.keep(self._spans)

    def restore(self, memory: Memory, which: Tensor | None = None) -> None:
        """Takes back what was sent for the chosen parameters, or for all: memory is as before selection.

        Args:
            memory: v and what the rule keeps.
            which: uint8, one for all or [parameters], not 0 for the chosen.
        """
        which = self.taken if which is None else self.taken * which
        kinds = list(self.sent)
        # The op puts back v and one kind; there is more than one only where a rule is not fused.
        ops.restore_(
            payload=self._selection,
            which=which,
            segments=self._segments.table,
            workspace=self._workspace,
            sent_momentum=self.sent[kinds[0]] if kinds else None,
            momentum=memory.kinds[kinds[0]] if kinds else None,
            residual=memory.residual,
            wire_dtype=self._dtype,
        )
        if len(kinds) > 1:
            where, _ = positions(self._selection, self._segments, self._dtype)
            chosen = torch.repeat_interleave(which, self._segments.entries.to(which.device)) != 0
            for kind in kinds[1:]:
                flat = memory.kinds[kind]
                flat[where] = torch.where(chosen, self.sent[kind], flat[where])
        self.taken *= 1 - which

    def drop(self, memory: Memory, names: Collection[str] | None = None) -> None:
        """Takes back all that this pass did to the chosen parameters, or to all: memory is as before accumulation.

        Only with DGCConfig.droppable.
        """
        rows = [row for row, slot in enumerate(self._slots) if names is None or slot.name in names]
        memory.put_back([self._spans[row] for row in rows])
        self.taken[rows] = 0

    def give_back(self, memory: Memory, which: Tensor) -> None:
        """Drops the chosen parameters' part of the pass where DGCConfig.droppable is set, and restores it where not.

        Args:
            memory: v and what the rule keeps.
            which: uint8 [parameters], 1 for each whose gradient was thrown away.
        """
        if not self._droppable:
            self.restore(memory, which)
            return
        memory.put_back(self._spans, which)
        self.taken *= 1 - which

    def thrown_away(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Returns parameters that have lost their .grad since, and with it what was sent for them.

        Those that no rank used have got back what was sent, and DDP leaves their .grad alone. On a GPU this waits for
        the device, where there is a parameter without .grad.
        """
        without = [row for row, slot in enumerate(self._slots) if parameters[slot.name].grad is None]
        if not without:
            return []
        taken = self.taken.tolist()
        return [self._slots[row].name for row in without if taken[row]]
