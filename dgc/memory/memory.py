"""Memory: the residual v of every compressed parameter, and whatever the optimizer's rule keeps of each, by name."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgc.ops.wire import GROUP, align_up

from .slots import Slot

MOMENTUM = "momentum"
"""The kind of tensor that dgc.SGD keeps: u of the paper."""


class Memory:
    """Holds all parameters' tensors of a kind in one flat float32 tensor, so that one op call reaches any bucket's.

    "residual" is v; the other kinds are the rule's, as "momentum". Compressed parameters come first and have all kinds;
    dense ones have no residual. float32 whatever the gradient's type: with 16 bits, what is added at one step vanishes
    in what has accumulated. A parameter's elements stand in the order in which they lie in memory; views by name have
    its shape and strides.
    """

    def __init__(self, slots: Mapping[str, Slot], compressed: Sequence[str], device: torch.device) -> None:
        """Allocates zeros for v; the other kinds come with allocate().

        Args:
            slots: by name, laid out with these compressed parameters first.
            compressed: names.
            device: of all tensors.
        """
        self.slots = dict(slots)
        self.compressed = tuple(compressed)
        self.device = device
        self.kinds: dict[str, Tensor] = {}
        """What the rule keeps, flat, by kind."""
        self.diverged: set[str] = set()
        """Parameters whose kinds differ between ranks, because they were compressed since these were last averaged."""
        self.numel = _end(self.slots.values())
        # Types are written out everywhere: torch.set_default_dtype(bfloat16) is how some large models are built.
        size = _end(self.slots[name] for name in compressed)
        self.residual = torch.zeros(size, dtype=torch.float32, device=device)
        self._copies: dict[str, Tensor] = {}
        """What keep() has copied, by kind."""

    def allocate(self, kinds: Iterable[str]) -> None:
        """Has zeros for these kinds, where they are not there yet."""
        for kind in kinds:
            if kind not in self.kinds:
                self.kinds[kind] = torch.zeros(self.numel, dtype=torch.float32, device=self.device)

    @property
    def momentum(self) -> Tensor | None:
        """The momentum u, flat; None while nothing has momentum."""
        return self.kinds.get(MOMENTUM)

    @property
    def empty(self) -> bool:
        """Whether nothing has been accumulated; reads everything."""
        return not any(bool(flat.any()) for flat in (self.residual, *self.kinds.values()))

    def set(self, kind: str, name: str, value: Tensor) -> None:
        """Sets one parameter's tensor to what is the same on all ranks, as a dense run leaves it."""
        self.allocate([kind])
        self.slots[name].view(self.kinds[kind]).copy_(value)
        self.diverged.discard(name)

    def of(self, name: str) -> dict[str, Tensor]:
        """Returns what the rule keeps of one parameter: views in its shape, by kind."""
        return {kind: self.slots[name].view(flat) for kind, flat in self.kinds.items()}

    def momentum_of(self, name: str) -> Tensor | None:
        """Returns u of one parameter, a view in its shape; None while nothing has momentum."""
        return self.of(name).get(MOMENTUM)

    def residual_of(self, name: str) -> Tensor | None:
        """Returns v of one parameter, a view in its shape; None for a dense one."""
        return self.slots[name].view(self.residual) if name in self.compressed else None

    def flat(self, kind: str, name: str) -> Tensor:
        """Returns one parameter's tensor of a kind, flat."""
        start, end = self.slots[name].span
        return self.kinds[kind][start:end]

    def keep(self, spans: Sequence[tuple[int, int]]) -> None:
        """Copies all kinds of compressed parameters, for put_back(); allocates room at the first call.

        Args:
            spans: where they begin and end.
        """
        for now, kept in self._with_copies():
            for start, end in spans:
                kept[start:end].copy_(now[start:end])

    def put_back(self, spans: Sequence[tuple[int, int]], which: Tensor | None = None) -> None:
        """Returns all kinds to what keep() found there, bit for bit.

        Args:
            spans: of the parameters.
            which: on the device, [spans], not 0 for those that are returned; None for all.
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

    def scale(self, factor: float) -> None:
        """Multiplies this rank's share: v, and the other kinds where they differ between ranks."""
        self.residual.mul_(factor)
        for kind in self.kinds:
            for name in self.diverged:
                self.flat(kind, name).mul_(factor)

    def state_dict(self) -> dict[str, Any]:
        """Returns views by kind and name; torch.save() saves each flat tensor once."""
        return self._by_name({"residual": self.residual, **self.kinds})

    def state_dict_of(self, flats: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns another rank's flat tensors, by kind, as state_dict() does, on the CPU.

        Each tensor has memory of its own: a view would pickle with all that it is a view of.
        """
        return {
            kind: {name: view.to("cpu", copy=True) for name, view in views.items()}
            for kind, views in self._by_name(flats).items()
        }

    def _by_name(self, flats: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        views: dict[str, dict[str, Tensor]] = {MOMENTUM: {}}  # which earlier versions look for
        for kind, flat in flats.items():
            names: Iterable[str] = self.compressed if kind == "residual" else self.slots
            views[kind] = {name: self.slots[name].view(flat) for name in names}
        return views

    def check(self, state_dicts: Sequence[Mapping[str, object]], kinds: Sequence[str], diverged: Sequence[str]) -> None:
        """Compares state_dicts' tensors with this memory.

        Args:
            state_dicts: of ranks that saved together.
            kinds: those that they have besides the residual.
            diverged: parameters whose kinds are a rank's own there.

        Raises:
            ValueError: names, shapes, types or values do not fit; the message lists them.
        """
        if unknown := sorted(set(diverged) - self.slots.keys()):
            raise ValueError(f"state_dict['diverged']: expected parameters of this model, got {', '.join(unknown)}")
        compressed = {name: self.slots[name] for name in self.compressed}
        wrong = []
        for state_dict in state_dicts:
            wrong += _differences("residual", state_dict["residual"], compressed)
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
        self, parts: Sequence[tuple[float, Mapping[str, Any]]], kinds: Sequence[str], diverged: Sequence[str]
    ) -> None:
        """Sets all kinds to weighted sums of state_dicts' tensors.

        Args:
            parts: weights and state_dicts, checked.
            kinds: those that the state_dicts have besides the residual; others become zero.
            diverged: parameters whose kinds are summed; those of the others are copied from the first part.
        """
        share = [weight for weight, _ in parts]
        first = [1.0] + [0.0] * (len(parts) - 1)
        self.allocate(kinds)
        for kind, flat in {"residual": self.residual, **self.kinds}.items():
            if kind != "residual" and kind not in kinds:
                flat.zero_()
                continue
            for name in self.compressed if kind == "residual" else self.slots:
                tensors = [state_dict[kind][name] for _, state_dict in parts]
                weights = share if kind == "residual" or name in diverged else first
                self.slots[name].view(flat).copy_(self._weighted(weights, tensors))
        self.diverged = set(diverged)

    def _weighted(self, weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
        """Returns the weighted sum, in the order given; where one weight is 1 and the others 0, that very tensor."""
        terms = [(weight, tensor) for weight, tensor in zip(weights, tensors, strict=True) if weight]
        if [weight for weight, _ in terms] == [1.0]:
            return terms[0][1]  # perhaps a view of the memory that is written next
        total = torch.zeros(tensors[0].shape, dtype=torch.float32, device=self.device)
        for weight, tensor in terms:
            total.add_(tensor.to(self.device), alpha=weight)  # files of all ranks may name all ranks' devices
        return total


def return_free_memory() -> None:
    """Gives the C library's free heap back to the system, where it can (glibc).

    A phase of warm-up needs buffers many times as large as the next one's; glibc keeps what is freed for itself.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _end(slots: Iterable[Slot]) -> int:
    return max((align_up(slot.offset + slot.numel, GROUP) for slot in slots), default=0)


def _differences(kind: str, tensors: object, expected: Mapping[str, Slot]) -> list[str]:
    """Returns how the tensors of a state_dict differ from what is expected of them."""
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
