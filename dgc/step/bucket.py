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
from dgc.ops.wire import PayloadError

from .allotment import EVERY
from .dense import NOT_FINITE, Dense
from .probes import Probes
from .sparse import Member, Sparse

NODE_DIFFERS = 4
"""Bit of a report's last number: what a rank of this node has passed on does not fit; see node.py."""
_OVERFLOW = 1
"""Bit of a report's last number, written by unpack: an average of sent entries is not finite."""


class PassContext(NamedTuple):
    """The values that all buckets of one backward pass share."""

    step: int
    """Number of the pass; skipped passes do not count."""
    loss_scale: Tensor | None
    """float32 [1], the factor by which the loss was multiplied; None for 1."""
    dropped: int
    """Fingerprint of the parameters whose gradients were thrown away before the last step(); 0 for none."""
    probes: Probes
    """Samples of the reduced gradients, taken when they were handed back."""

    @property
    def unscale(self) -> Tensor | None:
        """Inverse of the loss scale, float32 [1], computed as GradScaler does, to the same bits; None for 1."""
        return None if self.loss_scale is None else self.loss_scale.double().reciprocal().float()


class Bucket:
    """One bucket in one phase, divided into a compressed and a dense half; it serves many passes.

    Attributes:
        name: the name of its first parameter, equal on all ranks and unique among the model's buckets.
        sparse: the compressed half; None without compressed parameters.
        dense: the dense half; None without dense parameters.
        evidence: of the last pass, int64 [3, compressed parameters] on the host; None where no k changes by it.
        report: int32 [rows + 1] on the device, the findings of the last pass: the status of each payload, then a number
            whose bits say which averages are not finite.
    """

    def __init__(
        self,
        gradients: Gradients,
        entries: Sequence[int | None],
        alive: Sequence[int],
        parameters: Parameters,
        memory: Memory,
        exchange: Exchange,
        codec: Codec,
        config: DGCConfig,
        masking: bool,
    ) -> None:
        """Lays the bucket out.

        Args:
            gradients: the bucket, of which only sizes and places are used.
            entries: k of each slot; None where it is dense.
            alive: number of elements of each slot that are not masked.
            parameters: for the optimizer's rule, and its factors for each parameter.
            memory: v, and the rule's tensors.
            exchange: the collectives.
            codec: turns entries into bytes.
            config: the user's.
            masking: whether the rule's tensors become 0 where an entry is sent.
        """
        self.name = gradients.slots[0].name
        self._parameters, self._memory, self._exchange = parameters, memory, exchange
        topology = exchange.topology
        members = [
            Member(slot, index, k, n)
            for index, (slot, k, n) in enumerate(zip(gradients.slots, entries, alive, strict=True))
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
                decay=config.residual_decay,
                agreed=repr(asdict(config)),
            )
        dense = [index for index, k in enumerate(entries) if k is None]
        self.dense: Dense | None = None
        if dense:
            self.dense = Dense(gradients, dense, memory, exchange.reducible, config.dense_wire_dtype)
        self._one_selection = config.selection == "global"
        self.evidence: Tensor | None = None
        device = gradients.buffers[0].device
        self.report = torch.zeros(topology.rows + 1, dtype=torch.int32, device=device)

    @property
    def bytes_once(self) -> tuple[int, int]:
        """Bytes of this rank's payload, and of the tensor that is all-reduced."""
        payload = 0 if self.sparse is None else self.sparse.payload.numel()
        return payload, 0 if self.dense is None else self.dense.nbytes

    @property
    def averages_once(self) -> bool:
        """Whether it also averages the rule's tensors. Since that is done once, such a bucket serves one pass only."""
        return self.dense is not None and bool(self.dense.averaged)

    def send(self, gradients: Gradients, context: PassContext, scale: Tensor | None) -> Transfer:
        """Compresses, and starts the exchange.

        Args:
            gradients: the bucket, whose buffers are overwritten.
            context: of the pass.
            scale: float32 [1], the factor by which gradients are multiplied first; None for 1.
        """
        payload = gathered = dense = None
        if self.sparse is not None:
            with record_function("dgc.accumulate_select_pack"):
                workers = self._exchange.topology.workers
                factors = [self._parameters.factors(m.slot.name, workers) for m in self.sparse.members]
                self.sparse.stamp(context.step, context.loss_scale, context.dropped)
                payload = self.sparse.compress(gradients, self._memory, self._parameters.rule, factors, scale)
                self._parameters.accumulated([m.slot.name for m in self.sparse.members])
                if self._memory.ages is not None:
                    self._memory.ages.note(self.sparse.chosen(), context.step)
                gathered = self.sparse.gathered
        with record_function("dgc.exchange"):
            if self.dense is not None:
                dense = self.dense.load(gradients, self._memory, scale)
            return self._exchange.start(self.name, payload, gathered, dense)

    def receive(self, gradients: Gradients, context: PassContext, late: bool) -> None:
        """Writes the averages into the gradients, once the exchange is complete.

        Args:
            gradients: the bucket.
            context: of the pass.
            late: whether a wrong payload is only reported, for step() to raise; else it is raised here.

        Raises:
            PayloadError: a rank sent what does not fit.
        """
        self.report.zero_()
        if self.sparse is not None:
            self.sparse.decompress(gradients, context.loss_scale, self.report)
            if not late:
                self.sparse.findings(self.report[:-1].tolist())
            looks = self._one_selection and context.step % EVERY == EVERY - 1
            self.evidence = self.sparse.look() if looks else None
            self.sparse.restore_unused(self._memory)
        if self.dense is not None:
            self.dense.store(gradients, self._memory, context.loss_scale, self.report[-1:])
        if self.sparse is not None:
            reduced = [gradients.of(m.position) for m in self.sparse.members]
            witnesses = self.sparse.witnesses(gradients, context.unscale)
            context.probes.take([m.slot for m in self.sparse.members], reduced, witnesses, context.step)

    def findings(self, report: list[int]) -> set[str]:
        """Returns descriptions of the gradients that were not finite, with their ranks.

        Args:
            report: this bucket's, on the host.

        Raises:
            PayloadError: a rank sent what does not fit.
        """
        found = set() if self.sparse is None else self.sparse.findings(report[:-1])
        if report[-1] & NOT_FINITE and self.dense is not None:
            found.add(" ".join(["the average of dense parameters", *self.dense.nonfinite]))
        if report[-1] & NODE_DIFFERS:
            raise PayloadError(
                f"payloads of {self.name} and what travels with it, passed on inside the node: they do not fit. "
                "Nothing of them was applied; restart all ranks from the same checkpoint with the same model and "
                "configuration"
            )
        if report[-1] & _OVERFLOW:
            found.add(f"an average of {self.name} and what travels with it, which overflows")
        return found

    def restore(self, which: Tensor | None = None) -> None:
        """Returns all sent entries to memory; with `which`, a uint8 scalar on the device, only if that is not 0."""
        if self.sparse is not None:
            self.sparse.undo.restore(self._memory, which)
        if self.dense is not None:
            self.dense.restore(self._memory, which)

    def drop(self, names: Collection[str] | None = None) -> None:
        """Undoes this pass in memory, for the named parameters or for all."""
        if self.sparse is not None:
            self.sparse.undo.drop(self._memory, names)
            self.uncount(names)
        if self.dense is not None and names is None:
            self.dense.restore(self._memory)

    def uncount(self, names: Collection[str] | None = None) -> None:
        """Takes this pass off the rule's count of gradients, for the named parameters or for all."""
        if self.sparse is not None:
            dropped = [m.slot.name for m in self.sparse.members if names is None or m.slot.name in names]
            self._parameters.accumulated(dropped, times=-1)

    def give_back(self, which: Tensor, bad: Tensor) -> None:
        """Takes back the pass of some compressed parameters, or what all sent in a bad step; see Undo.give_back."""
        if self.sparse is not None:
            self.sparse.undo.give_back(self._memory, which, bad)
        if self.dense is not None:
            self.dense.restore(self._memory, bad)

    def thrown_away(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Returns the names of compressed parameters that have lost their .grad, and with it their sent entries."""
        return [] if self.sparse is None else self.sparse.undo.thrown_away(parameters)
