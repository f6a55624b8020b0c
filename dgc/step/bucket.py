"""Bucket: the gradients that travel together, and the buffers of their exchange."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dgc import ops
from dgc.config import DGCConfig
from dgc.memory.memory import Memory
from dgc.ops import wire
from dgc.ops.segments import first_indices

_OVERFLOW, _DENSE = 1, 2
"""Bits of a report's last number, of which the ops write the first: which averages are not finite."""


class Gradients(NamedTuple):
    """One bucket of gradients, as a framework hands it over. The reduced ones are written to the same places."""

    parameters: Sequence[Tensor]
    buffers: list[Tensor]
    """Contiguous tensors that hold the gradients: DDP's one bucket, or Horovod's tensor for each parameter."""
    places: Sequence[tuple[int, int]]
    """For each parameter: which buffer, and its first element there."""

    def of(self, index: int) -> Tensor:
        """Returns the gradient of one parameter, flat, in the order in which it lies in memory."""
        source, offset = self.places[index]
        return self.buffers[source].view(-1)[offset : offset + self.parameters[index].numel()]


@dataclass(frozen=True)
class Member:
    """One parameter of a bucket."""

    name: str
    index: int
    """Position in the bucket."""
    entries: int | None
    """k, or None where it is dense."""


class Bucket:
    """What one bucket needs in one phase: the segment table, payloads and scratch, allocated once.

    A bucket with compressed parameters has a payload. Its dense ones travel in `flat`; if all are dense, and lie in
    one buffer, they are reduced in place.
    """

    def __init__(
        self,
        gradients: Gradients,
        members: Sequence[Member],
        memory: Memory,
        world_size: int,
        reducible: Collection[torch.dtype],
        config: DGCConfig,
        masking: bool,
    ) -> None:
        """Lays the bucket out.

        Args:
            gradients: the bucket as it comes; only sizes and places matter here.
            members: every parameter of the bucket.
            memory: where u and v are.
            world_size: number of ranks whose payloads will come.
            reducible: types that the all-reduce takes.
            config: the user's.
            masking: whether u of sent entries is masked, and so has to be kept until the step is taken.
        """
        device = gradients.buffers[0].device
        self.name = members[0].name
        """The same on all ranks, and of this model no other bucket's."""
        self.wire_dtype = config.wire_dtype
        self.compressed = [m for m in members if m.entries is not None]
        self.dense = [m for m in members if m.entries is None]
        self.averaged = [m for m in self.dense if m.name in memory.diverged]
        """Dense parameters whose u has to be averaged first, since they were compressed until now."""
        numel = [p.numel() for p in gradients.parameters]
        self.entries = sum(m.entries or 0 for m in members)
        self.compressed_numel = sum(numel[m.index] for m in self.compressed)
        self.dense_numel = sum(numel[m.index] for m in self.dense)

        rows = [
            (*gradients.places[m.index], memory.offset[m.name], numel[m.index], m.entries)
            for m in members
            if m.entries is not None
        ]
        self.segments = ops.Segments.from_rows(rows)
        self.payload: Tensor | None = None
        self.gathered: Tensor | None = None
        if rows:
            # Types and devices are written out everywhere: torch has defaults of its own that users change.
            nbytes = self.segments.wire(self.wire_dtype).nbytes
            self.payload = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            self.gathered = torch.zeros(world_size, nbytes, dtype=torch.uint8, device=device)
            self.workspace = ops.workspace(self.segments, device)
            layout = [(m.name, numel[m.index], m.entries) for m in self.compressed]
            text = repr((layout, world_size, asdict(config)))
            self.fingerprint = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
            self.step_in_header = wire.stamp(self.payload, self.fingerprint)
            self.stamped = self.fingerprint
            masked = masking and memory.momentum is not None
            self.sent_momentum = torch.zeros(self.entries, dtype=torch.float32, device=device) if masked else None
            self.momentum_factors: list[float] = []
            self.mu = torch.zeros(len(rows), dtype=torch.float32, device=device)
            self.one = torch.ones(1, dtype=torch.float32, device=device)
        self.droppable = config.droppable
        self.report = torch.zeros(world_size + 1, dtype=torch.int32, device=device)
        """What this step found: unpack's status of each rank, then which averages are not finite. On the device."""
        self.nonfinite_averages: list[str] = []
        """Names of dense parameters whose last average was not finite; on the CPU only."""
        self.taken = torch.zeros(len(rows), dtype=torch.uint8, device=device)
        """1 for each compressed parameter whose sent entries are out of v, and not yet applied."""

        dtypes = {gradients.buffers[gradients.places[m.index][0]].dtype for m in self.dense}
        one_type = len(dtypes) == 1 and dtypes.issubset(reducible)
        # u is float32, and is averaged in float32.
        self.flat_dtype = dtypes.pop() if one_type and not self.averaged else torch.float32
        self.flat_numel = self.dense_numel + sum(numel[m.index] for m in self.averaged)
        self.in_place = not self.compressed and not self.averaged and one_type and len(gradients.buffers) == 1
        self.flat: Tensor | None = None
        if self.dense and not self.in_place:
            self.flat = torch.empty(self.flat_numel, dtype=self.flat_dtype, device=device)

    @property
    def payload_bytes(self) -> int:
        """Bytes that this rank sends for the compressed parameters, once."""
        return 0 if self.payload is None else self.payload.numel()

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensor that is all-reduced."""
        return self.flat_numel * self.flat_dtype.itemsize

    def stamp(self, step: int, loss_scale: Tensor | None, dropped: int = 0) -> None:
        """Writes into the header what changes from step to step, and has to be the same on all ranks.

        Args:
            step: of this pass.
            loss_scale: float32 [1], or None. Ranks that scale differently would judge differently what overflows.
            dropped: a number for the gradients that were thrown away before the last step(), 0 where none were.
        """
        if self.payload is None:
            return
        self.step_in_header.fill_(step)
        fingerprint = self.fingerprint ^ dropped
        fingerprint_in_header = wire.header(self.payload)[2:3]
        if loss_scale is not None:
            fingerprint_in_header.copy_(loss_scale.view(torch.int32).long() ^ fingerprint)
        elif fingerprint != self.stamped:
            fingerprint_in_header.fill_(fingerprint)
            self.stamped = fingerprint

    def compress(
        self,
        gradients: Gradients,
        memory: Memory,
        factors: list[float],
        scale: Tensor | None,
        nesterov: bool,
    ) -> None:
        """Moves the compressed parameters' gradients into u and v, and fills the payload.

        Args:
            gradients: the bucket; what is left of the compressed ones is for unpack.
            memory: u and v, which change.
            factors: mu of each compressed parameter.
            scale: float32 [1], what gradients are multiplied with first; None for 1.
            nesterov: which form v accumulates.
        """
        if self.payload is None:
            return
        # By fill_, which passes the number along; a copy from the host would wait for the device.
        if factors != self.momentum_factors:
            if len(set(factors)) == 1:
                self.mu.fill_(factors[0])
            else:
                for row, factor in enumerate(factors):
                    self.mu[row].fill_(factor)
            self.momentum_factors = factors
        if self.droppable:
            memory.keep([memory.span(m.name) for m in self.compressed])
        ops.compress_(
            gradients.buffers,
            memory.momentum,
            memory.residual,
            self.segments.table,
            self.mu,
            self.one if scale is None else scale,
            self.payload,
            self.workspace,
            self.sent_momentum,
            nesterov,
            self.wire_dtype,
        )
        self.taken.fill_(1)

    def load_dense(self, gradients: Gradients, memory: Memory, scale: Tensor | None) -> Tensor | None:
        """Returns what is to be averaged over the ranks: dense gradients, then u of the averaged ones."""
        flat = gradients.buffers[0].view(-1) if self.in_place else self.flat
        if flat is None:
            return None
        if not self.in_place:
            torch.cat([gradients.of(m.index).to(flat.dtype) for m in self.dense], out=flat[: self.dense_numel])
        if scale is not None:
            flat[: self.dense_numel].mul_(scale)
        at = self.dense_numel
        for m in self.averaged:
            u = memory.flat_momentum(m.name)
            flat[at : at + u.numel()].copy_(u)
            at += u.numel()
        return flat

    def store_dense(self, gradients: Gradients, memory: Memory, loss_scale: Tensor | None) -> None:
        """Writes the averages back, times the loss scale, and reports whether one is not finite."""
        flat = gradients.buffers[0].view(-1) if self.in_place else self.flat
        if flat is None:
            return
        if loss_scale is not None:
            flat[: self.dense_numel].mul_(loss_scale)
        if flat.numel() > 0:
            low, high = flat.aminmax()  # one pass; both are NaN if any entry is
            self.report[-1:] |= _DENSE * ~(low.isfinite() & high.isfinite())
        if not flat.is_cuda and int(self.report[-1]) & _DENSE:
            ends = accumulate(gradients.parameters[m.index].numel() for m in self.dense)
            parts = zip(self.dense, flat[: self.dense_numel].tensor_split(list(ends)), strict=False)
            self.nonfinite_averages = [m.name for m, part in parts if not part.isfinite().all()]
        if not self.in_place:
            at = 0
            for m in self.dense:
                gradient = gradients.of(m.index)
                gradient.copy_(flat[at : at + gradient.numel()])
                at += gradient.numel()
            for m in self.averaged:
                u = memory.flat_momentum(m.name)
                u.copy_(flat[at : at + u.numel()])
                at += u.numel()

    def unpack(self, gradients: Gradients, rank: int, loss_scale: Tensor | None) -> None:
        """Writes the average of the sent entries into the gradients, times the loss scale; reports what is wrong."""
        self.report.zero_()
        self.nonfinite_averages = []
        if self.gathered is None:
            return
        ops.unpack(
            self.gathered,
            rank,
            self.segments.table,
            self.workspace,
            self.one if loss_scale is None else loss_scale,
            self.wire_dtype,
            gradients.buffers,
            self.report,
        )

    def findings(self, report: list[int]) -> set[str]:
        """Returns in words which gradients were not finite, and on which rank.

        Args:
            report: this bucket's, on the host.

        Raises:
            wire.PayloadError: a rank sent what does not fit.
        """
        found = set()
        if self.gathered is not None:
            for rank in wire.check_status(report[:-1], self.gathered):
                at = self.segments.wire(self.wire_dtype).used
                marks = self.gathered[rank, at : at + len(self.segments)].tolist()
                names = [m.name for m, mark in zip(self.compressed, marks, strict=True) if mark & wire.LEFT_OUT]
                found.add(f"{', '.join(names)} on rank {rank}")
        if report[-1] & _DENSE:
            found.add(" ".join(["the average of dense parameters", *self.nonfinite_averages]))
        if report[-1] & _OVERFLOW:
            found.add(f"an average of {self.name} and what travels with it, which overflows")
        return found

    def restore_unused(self, memory: Memory) -> None:
        """Takes back what was sent for parameters whose gradient was zero on every rank.

        unpack gave them zeros: under find_unused_parameters, DDP throws the result of such a parameter away.
        """
        if self.gathered is not None:
            at = self.segments.wire(self.wire_dtype).used
            unused = (self.gathered[:, at : at + len(self.segments)] & wire.USED).amax(0) == 0
            if unused.is_cuda or unused.any():  # asking the device would wait for it
                self.restore(memory, unused.to(torch.uint8))

    def restore(self, memory: Memory, which: Tensor | None = None) -> None:
        """Takes back what was sent for the chosen parameters, or for all: u and v are as before select."""
        if self.payload is None:
            return
        which = self.taken if which is None else self.taken * which
        ops.restore_(
            self.payload,
            which,
            self.segments.table,
            self.workspace,
            self.sent_momentum,
            memory.momentum,
            memory.residual,
            self.wire_dtype,
        )
        self.taken *= 1 - which

    def drop(self, memory: Memory, names: Collection[str] | None = None) -> None:
        """Takes back all that this pass did to the chosen parameters, or to all: u and v are as before accumulate.

        Only with DGCConfig.droppable.
        """
        rows = [row for row, m in enumerate(self.compressed) if names is None or m.name in names]
        memory.put_back([memory.span(self.compressed[row].name) for row in rows])
        self.taken[rows] = 0

    def give_up(self, memory: Memory, which: Tensor) -> None:
        """Drops the chosen parameters' part of the pass where DGCConfig.droppable is set, and restores it where not.

        Args:
            memory: u and v.
            which: uint8 [compressed], 1 for each whose gradient was thrown away.
        """
        if not self.droppable:
            self.restore(memory, which)
            return
        memory.put_back([memory.span(m.name) for m in self.compressed], which)
        self.taken *= 1 - which

    def witnesses(self, gradients: Gradients, unscale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns an element of each compressed parameter that this rank sent, and whether its average is not zero.

        Args:
            gradients: the bucket, reduced.
            unscale: float32 [1]: what a GradScaler is going to multiply gradients with.

        Returns:
            int64 [compressed], elements of the flat parameters; bool [compressed].
        """
        assert self.payload is not None
        first = first_indices(self.payload, self.segments, self.wire_dtype)
        if len(gradients.buffers) == 1:
            averages = gradients.buffers[0].view(-1)[first + self.segments.offset.to(first.device)]
        else:
            flat = [gradients.of(m.index) for m in self.compressed]
            averages = torch.cat([g.index_select(0, i).float() for g, i in zip(flat, first.split(1), strict=True)])
        if unscale is not None:
            averages = (averages.float() * unscale).to(averages.dtype)
        return first, averages != 0

    def thrown_away(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Returns compressed parameters that have lost their .grad since, and with it what was sent for them.

        Those that no rank used have got back what was sent (restore_unused), and DDP leaves their .grad alone. On a
        GPU this waits for the device, where there is a parameter without .grad.
        """
        without = [row for row, m in enumerate(self.compressed) if parameters[m.name].grad is None]
        if not without:
            return []
        taken = self.taken.tolist()
        return [self.compressed[row].name for row in without if taken[row]]
