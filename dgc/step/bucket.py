"""Bucket: the gradients that travel together, and the two calls that move them: send() and receive()."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from dgc.config import DGCConfig
from dgc.exchange.base import Exchange, Transfer
from dgc.memory.memory import Memory
from dgc.memory.parameters import Parameters
from dgc.memory.slots import Gradients
from dgc.ops.codec import Codec

from .dense import NOT_FINITE, Dense
from .probes import Probes
from .sparse import Member, Sparse

_OVERFLOW = 1
"""Bit of a report's last number that unpack writes: an average of sent entries is not finite."""


class PassContext(NamedTuple):
    """What all buckets of one backward pass go by."""

    step: int
    """Which it is, without those that were left out."""
    loss_scale: Tensor | None
    """float32 [1], what gradients are multiplied with; None for 1."""
    dropped: int
    """A number for the gradients that were thrown away before the last step(), 0 where none were."""
    probes: Probes
    """What its gradients were when they were handed back."""

    @property
    def unscale(self) -> Tensor | None:
        """Inverse of the loss scale, float32 [1]: as GradScaler takes it, so that both unscale to the same bits."""
        return None if self.loss_scale is None else self.loss_scale.double().reciprocal().float()


class Bucket:
    """One bucket in one phase: what is compressed of it and what is dense, laid out once.

    Attributes:
        name: that of its first parameter: the same on all ranks, and no other bucket's of this model.
        sparse: the compressed half; None where there is none.
        dense: the dense half; None where there is none.
        report: int32 [rows + 1] on the device, what the last pass found: the status of each payload, then in bits which
            averages are not finite.
    """

    def __init__(
        self,
        gradients: Gradients,
        entries: Sequence[int | None],
        parameters: Parameters,
        memory: Memory,
        exchange: Exchange,
        codec: Codec,
        config: DGCConfig,
        masking: bool,
    ) -> None:
        """Lays the bucket out.

        Args:
            gradients: the bucket as it comes; only sizes and places matter here.
            entries: k of each slot; None where it is dense.
            parameters: the optimizer's numbers for each.
            memory: v, and what the rule keeps.
            exchange: how the ranks talk.
            codec: how entries travel.
            config: the user's.
            masking: whether what the rule keeps becomes 0 where an entry is sent.
        """
        self.name = gradients.slots[0].name
        self._parameters, self._memory, self._exchange = parameters, memory, exchange
        topology = exchange.topology
        members = [
            Member(slot, index, k)
            for index, (slot, k) in enumerate(zip(gradients.slots, entries, strict=True))
            if k is not None
        ]
        self.sparse: Sparse | None = None
        if members:
            self.sparse = Sparse(
                gradients,
                members,
                memory,
                parameters.rule,
                codec,
                topology,
                masking=masking,
                droppable=config.droppable,
                agreed=repr(asdict(config)),
            )
        dense = [index for index, k in enumerate(entries) if k is None]
        self.dense = Dense(gradients, dense, memory, exchange.reducible) if dense else None
        device = gradients.buffers[0].device
        self.report = torch.zeros(topology.rows + 1, dtype=torch.int32, device=device)

    @property
    def bytes_once(self) -> tuple[int, int]:
        """Bytes of this rank's payload, and of the tensor that is all-reduced."""
        payload = 0 if self.sparse is None else self.sparse.payload.numel()
        return payload, 0 if self.dense is None else self.dense.nbytes

    @property
    def averages_once(self) -> bool:
        """Whether it averages what the rule keeps, which is done once, so that it serves one pass only."""
        return self.dense is not None and bool(self.dense.averaged)

    def send(self, gradients: Gradients, context: PassContext, scale: Tensor | None) -> Transfer:
        """Compresses, and starts the exchange.

        Args:
            gradients: the bucket; its buffers are used up.
            context: of the pass.
            scale: float32 [1], what gradients are multiplied with first; None for 1.
        """
        payload = gathered = dense = None
        if self.sparse is not None:
            with record_function("dgc.accumulate_select_pack"):
                workers = self._exchange.topology.workers
                numbers = [self._parameters.factors(m.slot.name, workers) for m in self.sparse.members]
                self.sparse.stamp(context.step, context.loss_scale, context.dropped)
                payload = self.sparse.compress(gradients, self._memory, self._parameters.rule, numbers, scale)
                gathered = self.sparse.gathered
        with record_function("dgc.exchange"):
            if self.dense is not None:
                dense = self.dense.load(gradients, self._memory, scale)
            return self._exchange.start(self.name, payload, gathered, dense)

    def receive(self, gradients: Gradients, context: PassContext, late: bool) -> None:
        """Writes the averages into the gradients, once the exchange is through.

        Args:
            gradients: the bucket.
            context: of the pass.
            late: whether a wrong payload is reported to the step only; else it is raised here.

        Raises:
            PayloadError: a rank sent what does not fit.
        """
        self.report.zero_()
        if self.sparse is not None:
            self.sparse.decompress(gradients, context.loss_scale, self.report)
            if not late:
                self.sparse.findings(self.report[:-1].tolist())
            self.sparse.restore_unused(self._memory)
        if self.dense is not None:
            self.dense.store(gradients, self._memory, context.loss_scale, self.report[-1:])
        if self.sparse is not None:
            reduced = [gradients.of(m.position) for m in self.sparse.members]
            witnesses = self.sparse.witnesses(gradients, context.unscale)
            context.probes.take([m.slot for m in self.sparse.members], reduced, witnesses, context.step)

    def findings(self, report: list[int]) -> set[str]:
        """Returns in words which gradients were not finite, and on which rank.

        Args:
            report: this bucket's, on the host.

        Raises:
            PayloadError: a rank sent what does not fit.
        """
        found = set() if self.sparse is None else self.sparse.findings(report[:-1])
        if report[-1] & NOT_FINITE and self.dense is not None:
            found.add(" ".join(["the average of dense parameters", *self.dense.nonfinite]))
        if report[-1] & _OVERFLOW:
            found.add(f"an average of {self.name} and what travels with it, which overflows")
        return found

    def restore(self, which: Tensor | None = None) -> None:
        """Takes back what was sent for all parameters, or where `which`, a uint8 scalar on the device, is not 0."""
        if self.sparse is not None:
            self.sparse.undo.restore(self._memory, which)

    def drop(self, names: Collection[str] | None = None) -> None:
        """Takes back all that this pass did to memory, for these parameters or for all."""
        if self.sparse is not None:
            self.sparse.undo.drop(self._memory, names)

    def give_back(self, which: Tensor) -> None:
        """Drops or restores the compressed parameters that `which`, uint8 [compressed], says; see Undo.give_back."""
        if self.sparse is not None:
            self.sparse.undo.give_back(self._memory, which)

    def thrown_away(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Returns compressed parameters that have lost their .grad since."""
        return [] if self.sparse is None else self.sparse.undo.thrown_away(parameters)
