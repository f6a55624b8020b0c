"""Memory: the residual v of every compressed parameter, and the tensors of the optimizer's rule, by name."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgc.local import local
from dgc.ops.wire import GROUP, align_up

from .ages import Ages
from .slots import Slot

MOMENTUM = "momentum"
"""The kind of tensor that dgc.SGD keeps: u of the paper."""


class Memory:
    """Holds one flat float32 tensor per kind, with the elements of all parameters, so that one op call serves a bucket.

    The kind "residual" is v; the others, such as "momentum", are the rule's. Compressed parameters come first and have
    all kinds; dense ones have a residual only where they travel in 16 bits: what rounding has taken. All is float32
    whatever the gradient's type, since in 16 bits the addend of one step would be rounded away. A parameter's elements
    are in the order of the parameter's own memory, and views by name have its shape and strides.
    """

    def __init__(
        self, slots: Mapping[str, Slot], compressed: Sequence[str], device: torch.device, *, rounded: bool = False
    ) -> None:
        """Allocates zeros for v; the other kinds come with allocate().

        Args:
            slots: by name, laid out with these compressed parameters first.
            compressed: names of the compressed parameters.
            device: of all tensors.
            rounded: whether dense parameters have a residual, too.
        """
        self.slots = dict(slots)
        self.compressed = tuple(compressed)
        self.waiting = tuple(slots) if rounded else self.compressed
        """Names of the parameters that have a residual."""
        self.device = device
        self.kinds: dict[str, Tensor] = {}
        """The rule's tensors, flat, by kind."""
        self.diverged: set[str] = set()
        """Parameters whose tensors of the rule differ between ranks: compressed since those were last averaged."""
        self.numel = _end(self.slots.values())
        # Types are written out everywhere, since some large models are built under torch.set_default_dtype(bfloat16).
        size = _end(self.slots[name] for name in self.waiting)
        self.residual = torch.zeros(size, dtype=torch.float32, device=device)
        self._copies: dict[str, Tensor] = {}
        """The copies that keep() made, by kind."""
        self.ages: Ages | None = None
        """How long entries wait; None unless they are watched."""

    def watch(self, sample: int, step: int) -> None:
        """Begins to watch how long entries wait, anew from the next step, whose number is given; see Ages."""
        self.ages = Ages(len(self.residual), sample, step, self.device)

    def allocate(self, kinds: Iterable[str]) -> None:
        """Allocates zeros for those kinds that have no tensor yet."""
        for kind in kinds:
            if kind not in self.kinds:
                self.kinds[kind] = torch.zeros(self.numel, dtype=torch.float32, device=self.device)

    def release(self) -> None:
        """Frees all tensors."""
        self.residual = self.residual.new_empty(0)
        self.kinds, self._copies = {}, {}

    def lay_out_again(self, slots: Mapping[str, Slot]) -> None:
        """Goes by other strides for some parameters: values keep their index, and move in memory.

        Args:
            slots: the new ones, by name, with the old offsets and sizes.
        """
        for name, slot in slots.items():
            flats = [*self.kinds.values(), *([self.residual] if name in self.waiting else [])]
            for flat in flats:
                slot.view(flat).copy_(self.slots[name].view(flat).clone())
            self.slots[name] = slot

    @property
    def momentum(self) -> Tensor | None:
        """The momentum u, flat; None before it is allocated."""
        return self.kinds.get(MOMENTUM)

    @property
    def empty(self) -> bool:
        """Whether all tensors are zero; reads all of them."""
        return not any(bool(flat.any()) for flat in (self.residual, *self.kinds.values()))

    def set(self, kind: str, name: str, value: Tensor) -> None:
        """Sets one parameter's tensor of a kind to a value that is equal on all ranks, such as a dense run's."""
        self.allocate([kind])
        self.slots[name].view(self.kinds[kind]).copy_(self.slots[name].part(local(value)))
        self.diverged.discard(name)

    def of(self, name: str) -> dict[str, Tensor]:
        """Returns the rule's tensors of one parameter, by kind: views in its shape."""
        return {kind: self.slots[name].view(flat) for kind, flat in self.kinds.items()}

    def momentum_of(self, name: str) -> Tensor | None:
        """Returns u of one parameter, a view in its shape; None before it is allocated."""
        return self.of(name).get(MOMENTUM)

    def residual_of(self, name: str) -> Tensor | None:
        """Returns v of one parameter, a view in its shape; None for one that has none."""
        return self.slots[name].view(self.residual) if name in self.waiting else None

    def flat(self, kind: str, name: str) -> Tensor:
        """Returns one parameter's tensor of a kind, flat."""
        start, end = self.slots[name].span
        return self.kinds[kind][start:end]

    def keep(self, spans: Sequence[tuple[int, int]]) -> None:
        """Copies all kinds of compressed parameters, for put_back(); allocates room at the first call.

        Args:
            spans: begin and end of each parameter in the flat tensors.
        """
        for now, kept in self._with_copies():
            for start, end in spans:
                kept[start:end].copy_(now[start:end])

    def put_back(self, spans: Sequence[tuple[int, int]], which: Tensor | None = None) -> None:
        """Restores all kinds from the copies of keep(), bit for bit.

        Args:
            spans: begin and end of each parameter in the flat tensors.
            which: [spans] on the device, not 0 for each span to restore; None for all.
        """
        for now, kept in self._with_copies():
            for i, (start, end) in enumerate(spans):
                part = kept[start:end]
                now[start:end].copy_(part if which is None else torch.where(which[i] != 0, part, now[start:end]))

    def _with_copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        for kind, now in {"residual": self.residual, **self.kinds}.items():
            if kind not in self._copies:
                self._copies[kind] = torch.zeros_like(self.residual)  # zeros: what a kind is until it is allocated
            yield now, self._copies[kind]

    def scale(self, factor: float, averages: Collection[str] = ()) -> None:
        """Multiplies this rank's share: v, and the other kinds where they differ between ranks, but no averages."""
        self.residual.mul_(factor)
        for kind in self.kinds.keys() - set(averages):
            for name in self.diverged:
                self.flat(kind, name).mul_(factor)

    def state_dict(self) -> dict[str, Any]:
        """Returns views by kind and name; torch.save() saves each flat tensor once."""
        return self._by_name({"residual": self.residual, **self.kinds})

    def state_dict_of(self, flats: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns another rank's flat tensors in the form of state_dict(), on the CPU.

        Each tensor is a copy, since a view would be pickled with the whole flat tensor.
        """
        return {
            kind: {name: view.to("cpu", copy=True) for name, view in views.items()}
            for kind, views in self._by_name(flats).items()
        }

    def _by_name(self, flats: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        views: dict[str, dict[str, Tensor]] = {MOMENTUM: {}}  # earlier versions expect this key
        for kind, flat in flats.items():
            names: Iterable[str] = self.waiting if kind == "residual" else self.slots
            views[kind] = {name: self.slots[name].view(flat) for name in names}
        return views

    def check(self, state_dicts: Sequence[Mapping[str, object]], kinds: Sequence[str], diverged: Sequence[str]) -> None:
        """Checks that the tensors of state_dicts fit this memory.

        Args:
            state_dicts: of ranks that saved together.
            kinds: those that they have besides the residual.
            diverged: parameters whose kinds differ between the ranks that saved.

        Raises:
            ValueError: names, shapes, types or values do not fit; the message lists them.
        """
        if unknown := sorted(set(diverged) - self.slots.keys()):
            raise ValueError(f"state_dict['diverged']: expected parameters of this model, got {', '.join(unknown)}")
        compressed = {name: self.slots[name] for name in self.compressed}
        wrong = []
        for state_dict in state_dicts:
            residual = state_dict["residual"]
            if isinstance(residual, Mapping):  # of a run whose dense gradients were not rounded, they have none
                compressed |= {name: self.slots[name] for name in self.waiting if name in residual}
            wrong += _differences("residual", residual, compressed)
            for kind in kinds:
                wrong += _differences(kind, state_dict[kind], self.slots)
        if wrong:
            raise ValueError(
                "state_dict: expected that of this model and DGCConfig, but " + "; ".join(dict.fromkeys(wrong)) + ". "
                "Build the model and the DGCConfig (dense_below, dense_parameters) as they were when it was saved; "
                "where values are not finite, the file is damaged"
            )

    @torch.no_grad()
    def load(
        self,
        parts: Sequence[tuple[float, Mapping[str, Any]]],
        kinds: Sequence[str],
        diverged: Sequence[str],
        averages: Collection[str] = (),
    ) -> None:
        """Sets all kinds to weighted sums of state_dicts' tensors.

        Args:
            parts: weights and state_dicts, checked.
            kinds: those that the state_dicts have besides the residual; others become zero.
            diverged: parameters whose kinds are summed; those of the others are copied from the first part.
            averages: kinds that are averaged over the parts that are there, so that a missing one does not count as 0.
                Where all that have a weight are missing, they are the first part's.
        """
        share = [weight for weight, _ in parts]
        there = sum(share)
        first = [1.0] + [0.0] * (len(parts) - 1)
        mean = [weight / there for weight in share] if 0 < there < 1 else share if there else first
        self.allocate(kinds)
        for kind, flat in {"residual": self.residual, **self.kinds}.items():
            if kind != "residual" and kind not in kinds:
                flat.zero_()
                continue
            for name in self.waiting if kind == "residual" else self.slots:
                view = self.slots[name].view(flat)
                tensors = [state_dict[kind].get(name, torch.zeros(view.shape)) for _, state_dict in parts]
                weights = first
                if kind == "residual" or name in diverged:
                    weights = mean if kind in averages else share
                view.copy_(self._weighted(weights, tensors))
        self.diverged = set(diverged)

    def _weighted(self, weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
        """Returns the weighted sum, added in the given order; the tensor itself if its weight is 1 and all others 0."""
        terms = [(weight, tensor) for weight, tensor in zip(weights, tensors, strict=True) if weight]
        if [weight for weight, _ in terms] == [1.0]:
            return terms[0][1]  # may be a view of the memory that load() writes next
        total = torch.zeros(tensors[0].shape, dtype=torch.float32, device=self.device)
        for weight, tensor in terms:
            total.add_(tensor.to(self.device), alpha=weight)  # a rank's file may load onto that rank's device
        return total


def return_free_memory() -> None:
    """Returns the C library's free heap to the system; with glibc only.

    A phase of the warm-up needs buffers many times as large as the next one's, and glibc keeps freed memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _end(slots: Iterable[Slot]) -> int:
    return max((align_up(slot.offset + slot.numel, GROUP) for slot in slots), default=0)


def _differences(kind: str, tensors: object, expected: Mapping[str, Slot]) -> list[str]:
    """Returns how the tensors of a state_dict differ from the expected ones."""
    if not isinstance(tensors, Mapping):
        return [f"{kind} is no dict of tensors by parameter name, but {type(tensors).__name__}"]
    wrong = []
    if missing := [name for name in expected if name not in tensors]:
        wrong.append(f"{kind} of {', '.join(missing)} is missing")
    if extra := [str(name) for name in tensors if name not in expected]:
        wrong.append(f"{kind} has {', '.join(sorted(extra))}, which this model does not")
    for name in expected.keys() & tensors.keys():
        tensor, shape = tensors[name], expected[name].shape
        if not isinstance(tensor, Tensor):
            wrong.append(f"{kind} of {name} is no tensor, but {type(tensor).__name__}")
        elif tensor.dtype != torch.float32 or tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
            wrong.append(f"{kind} of {name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; expected float32")
        elif tuple(tensor.shape) != shape:
            wrong.append(f"{kind} of {name} has shape {tuple(tensor.shape)}, expected {shape}")
        elif not tensor.isfinite().all():
            wrong.append(f"{kind} of {name} has values that are not finite")
    return wrong
