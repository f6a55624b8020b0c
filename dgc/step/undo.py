"""Undo: the log of one bucket's changes to memory, which can be undone until step() has applied them."""

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
    """The undo log of a bucket's compressed parameters. It reads the selection, and never a codec's payload.

    Attributes:
        sent: by kind, float32 [entries]: the rule's values at sent entries, before these values became 0.
        taken: uint8 [parameters], 1 for each whose sent entries are not in v.
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
        """Takes the buffers that compress() writes.

        Args:
            slots: of the parameters.
            segments: the table that their entries were selected by.
            workspace: from dgc.ops.workspace, for these segments.
            selection: uint8, the selected entries, with the values that were subtracted from v.
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
        """Copies memory before the pass, where a pass can be dropped."""
        if self._droppable:
            memory.keep(self._spans)

    def restore(self, memory: Memory, which: Tensor | None = None) -> None:
        """Returns the sent entries of the chosen parameters, or of all, to memory, which is then as before selection.

        Args:
            memory: v and the rule's tensors.
            which: uint8, a scalar for all or [parameters], not 0 for the chosen; None for all.
        """
        which = self.taken if which is None else self.taken * which
        kinds = list(self.sent)
        # The op puts back v and one kind; there is more than one only where a rule is not fused.
        ops.restore_(
            payload=self._selection,
            which=which,
            segments=self._segments.table,
            workspace=self._workspace,
            sent=self.sent[kinds[0]] if kinds else None,
            momentum=memory.kinds[kinds[0]] if kinds else None,
            residual=memory.residual,
            wire_dtype=self._dtype,
        )
        if len(kinds) > 1:
            where, _ = positions(self._selection, self._segments, self._dtype)
            chosen = (
                torch.repeat_interleave(
                    which, self._segments.column("entries", which.device), output_size=self._segments.n_entries
                )
                != 0
            )
            for kind in kinds[1:]:
                flat = memory.kinds[kind]
                flat[where] = torch.where(chosen, self.sent[kind], flat[where])
        self.taken *= 1 - which

    def drop(self, memory: Memory, names: Collection[str] | None = None) -> None:
        """Undoes this pass for the named parameters, or for all, so that memory is as before accumulation.

        Only with DGCConfig.droppable.
        """
        rows = [row for row, slot in enumerate(self._slots) if names is None or slot.name in names]
        memory.put_back([self._spans[row] for row in rows])
        self.taken[rows] = 0

    def give_back(self, memory: Memory, which: Tensor, bad: Tensor) -> None:
        """Takes back the pass of the chosen parameters, or what all sent in a step that is left out.

        Args:
            memory: v and the rule's tensors.
            which: uint8 [parameters], 1 for each whose gradient was thrown away: its pass is dropped where
                DGCConfig.droppable is set, and what it sent restored where not.
            bad: uint8 scalar on the device, not 0 where the step is left out: what was sent is restored for all.
        """
        if self._droppable:
            memory.put_back(self._spans, which)
            self.taken *= 1 - which
            self.restore(memory, bad)
        else:
            self.restore(memory, which | bad)

    def thrown_away(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Returns the names of parameters that have lost their .grad, and with it their sent entries.

        Parameters that no rank used are left out: their sent entries are back in v, and DDP does not set their .grad.
        On a GPU this waits for the device if any .grad is None.
        """
        without = [row for row, slot in enumerate(self._slots) if parameters[slot.name].grad is None]
        if not without:
            return []
        taken = self.taken.tolist()
        return [self._slots[row].name for row in without if taken[row]]
