"""Memory: momentum u and residual v of every parameter, by name."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgc.ops.wire import GROUP, align_up


class Memory:
    """Holds u and v of all parameters in two flat float32 tensors, so that one op call reaches any bucket's.

    Compressed parameters come first and have both; dense ones have only u. float32 whatever the gradient's type: with
    16 bits, what is added at one step vanishes in what has accumulated. A parameter's elements stand in the order in
    which they lie in memory; views by name have its shape and strides.
    """

    def __init__(self, parameters: Mapping[str, Tensor], compressed: Sequence[str], device: torch.device) -> None:
        """Allocates zeros for v; u comes with allocate_momentum()."""
        self.parameters = parameters
        self.compressed = tuple(compressed)
        self.device = device
        self.offset: dict[str, int] = {}
        self.momentum: Tensor | None = None
        self.diverged: set[str] = set()
        """Parameters whose u differs between ranks, because they were compressed since u was last averaged."""
        end = 0
        for name in compressed:
            end = self._place(name, end)
        # Types are written out everywhere: torch.set_default_dtype(bfloat16) is how some large models are built.
        self.residual = torch.zeros(end, dtype=torch.float32, device=device)
        for name in parameters:
            if name not in self.offset:
                end = self._place(name, end)
        self.numel = end
        self._kept: dict[str, Tensor] = {}
        """What keep() has copied: "residual", and "momentum" where there is any."""

    def _place(self, name: str, end: int) -> int:
        self.offset[name] = end
        return align_up(end + self.parameters[name].numel(), GROUP)

    def allocate_momentum(self) -> Tensor:
        """Returns u, flat; zeros at the first call."""
        if self.momentum is None:
            self.momentum = torch.zeros(self.numel, dtype=torch.float32, device=self.device)
        return self.momentum

    @property
    def empty(self) -> bool:
        """Whether nothing has been accumulated; reads all of u and v."""
        return not any(flat is not None and bool(flat.any()) for flat in (self.residual, self.momentum))

    def set_momentum(self, name: str, buffer: Tensor) -> None:
        """Sets u of one parameter to what is the same on all ranks: the momentum of a dense run."""
        self._view(self.allocate_momentum(), name).copy_(buffer)
        self.diverged.discard(name)

    def momentum_of(self, name: str) -> Tensor | None:
        """Returns u of one parameter, a view in its shape; None while nothing has momentum."""
        return None if self.momentum is None else self._view(self.momentum, name)

    def flat_momentum(self, name: str) -> Tensor:
        """Returns u of one parameter, flat."""
        start, end = self.span(name)
        return self.allocate_momentum()[start:end]

    def residual_of(self, name: str) -> Tensor | None:
        """Returns v of one parameter, a view in its shape; None for a dense one."""
        return self._view(self.residual, name) if name in self.compressed else None

    def _view(self, flat: Tensor, name: str) -> Tensor:
        parameter = self.parameters[name]
        return flat.as_strided(parameter.shape, dense_strides(parameter), self.offset[name])

    def span(self, name: str) -> tuple[int, int]:
        """Returns where a parameter's u and v begin and end in the flat tensors."""
        start = self.offset[name]
        return start, start + self.parameters[name].numel()

    def keep(self, spans: Sequence[tuple[int, int]]) -> None:
        """Copies u and v of compressed parameters, for put_back(): 8 bytes an element, allocated at the first call."""
        for now, kept in self._with_kept():
            for start, end in spans:
                kept[start:end].copy_(now[start:end])

    def put_back(self, spans: Sequence[tuple[int, int]], which: Tensor | None = None) -> None:
        """Returns u and v to what keep() found there, bit for bit.

        Args:
            spans: of the parameters.
            which: on the device, [spans], not 0 for those that are returned; None for all.
        """
        for now, kept in self._with_kept():
            for i, (start, end) in enumerate(spans):
                part = kept[start:end]
                now[start:end].copy_(part if which is None else torch.where(which[i] != 0, part, now[start:end]))

    def _with_kept(self) -> Iterator[tuple[Tensor, Tensor]]:
        for what, now in (("residual", self.residual), ("momentum", self.momentum)):
            if now is not None:
                if what not in self._kept:
                    # Zeros, which u was until it was allocated.
                    self._kept[what] = torch.zeros_like(self.residual)
                yield now, self._kept[what]

    def scale(self, factor: float) -> None:
        """Multiplies this rank's share: v, and u where it differs between ranks."""
        self.residual.mul_(factor)
        for name in self.diverged:
            self.flat_momentum(name).mul_(factor)

    def state_dict(self) -> dict[str, Any]:
        """Returns views of u and v by name; torch.save() saves each flat tensor once."""
        momentum = {} if self.momentum is None else {n: self._view(self.momentum, n) for n in self.parameters}
        residual = {name: self._view(self.residual, name) for name in self.compressed}
        return {"momentum": momentum, "residual": residual}

    def state_dict_of(self, residual: Tensor, momentum: Tensor | None = None) -> dict[str, Any]:
        """Returns another rank's flat tensors by name, each with memory of its own, on the CPU.

        A view pickles with all that it is a view of.
        """
        flats = {"momentum": (momentum, self.parameters), "residual": (residual, self.compressed)}
        return {
            kind: {} if flat is None else {name: self._view(flat, name).to("cpu", copy=True) for name in names}
            for kind, (flat, names) in flats.items()
        }

    def check(self, state_dicts: Sequence[Mapping[str, object]], diverged: Sequence[str]) -> None:
        """Compares state_dicts' tensors with this memory.

        Raises:
            ValueError: names, shapes, types or values do not fit; the message lists them.
        """
        if unknown := sorted(set(diverged) - self.parameters.keys()):
            raise ValueError(f"state_dict['diverged']: expected parameters of this model, got {', '.join(unknown)}")
        compressed = {name: self.parameters[name] for name in self.compressed}
        wrong = []
        for state_dict in state_dicts:
            wrong += _differences("residual", state_dict["residual"], compressed)
            if state_dict["momentum"]:
                wrong += _differences("momentum", state_dict["momentum"], self.parameters)
        if wrong:
            raise ValueError(
                "state_dict: expected that of this model and DGCConfig, but " + "; ".join(dict.fromkeys(wrong)) + ". "
                "Build the model and the DGCConfig (dense_below, dense_parameters) as they were when it was saved; "
                "where values are not finite, the file is damaged"
            )

    @torch.no_grad()
    def load(self, parts: Sequence[tuple[float, Mapping[str, Any]]], diverged: Sequence[str]) -> None:
        """Sets u and v to weighted sums of state_dicts' tensors.

        Args:
            parts: weights and state_dicts, checked.
            diverged: parameters whose u is summed; that of the others is copied from the first part.
        """
        share = [weight for weight, _ in parts]
        for name in self.compressed:
            tensors = [state_dict["residual"][name] for _, state_dict in parts]
            self._view(self.residual, name).copy_(self._weighted(share, tensors))
        if parts[0][1]["momentum"]:
            flat = self.allocate_momentum()
            first = [1.0] + [0.0] * (len(parts) - 1)
            for name in self.parameters:
                tensors = [state_dict["momentum"][name] for _, state_dict in parts]
                self._view(flat, name).copy_(self._weighted(share if name in diverged else first, tensors))
        elif self.momentum is not None:
            self.momentum.zero_()
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


def dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """Returns the strides that DDP gives a parameter's gradient: the parameter's own where it has no gaps."""
    strides = [(stride, size) for stride, size in zip(parameter.stride(), parameter.shape, strict=True) if size != 1]
    expected = 1
    for stride, size in sorted(strides):
        if stride != expected:
            return torch.empty(parameter.shape, device="meta").stride()
        expected *= size
    return parameter.stride()


def _differences(what: str, tensors: object, expected: Mapping[str, Tensor]) -> list[str]:
    """Returns how the tensors of a state_dict differ from what is expected of them."""
    if not isinstance(tensors, Mapping):
        return [f"{what} is no dict of tensors by parameter name, but {type(tensors).__name__}"]
    wrong = []
    if missing := [name for name in expected if name not in tensors]:
        wrong.append(f"{what} of {', '.join(missing)} is missing")
    if extra := [str(name) for name in tensors if name not in expected]:
        wrong.append(f"{what} has {', '.join(sorted(extra))}, which this model does not")
    for name in expected.keys() & tensors.keys():
        tensor, shape = tensors[name], expected[name].shape
        if not isinstance(tensor, Tensor):
            wrong.append(f"{what} of {name} is no tensor, but {type(tensor).__name__}")
        elif tensor.dtype != torch.float32 or tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
            wrong.append(f"{what} of {name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; expected float32")
        elif tensor.shape != shape:
            wrong.append(f"{what} of {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        elif not tensor.isfinite().all():
            wrong.append(f"{what} of {name} has values that are not finite")
    return wrong
