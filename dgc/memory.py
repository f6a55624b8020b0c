"""Memory: momentum u and residual v of every parameter, by name."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .wire import GROUP, align_up


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
        self.residual = torch.zeros(end, device=device)
        for name in parameters:
            if name not in self.offset:
                end = self._place(name, end)
        self.numel = end

    def _place(self, name: str, end: int) -> int:
        self.offset[name] = end
        return align_up(end + self.parameters[name].numel(), GROUP)

    def allocate_momentum(self) -> Tensor:
        """Returns u, flat; zeros at the first call."""
        if self.momentum is None:
            self.momentum = torch.zeros(self.numel, device=self.device)
        return self.momentum

    def momentum_of(self, name: str) -> Tensor | None:
        """Returns u of one parameter, a view in its shape; None while nothing has momentum."""
        return None if self.momentum is None else self._view(self.momentum, name)

    def flat_momentum(self, name: str) -> Tensor:
        """Returns u of one parameter, flat."""
        start = self.offset[name]
        return self.allocate_momentum()[start : start + self.parameters[name].numel()]

    def residual_of(self, name: str) -> Tensor | None:
        """Returns v of one parameter, a view in its shape; None for a dense one."""
        return self._view(self.residual, name) if name in self.compressed else None

    def _view(self, flat: Tensor, name: str) -> Tensor:
        parameter = self.parameters[name]
        return flat.as_strided(parameter.shape, dense_strides(parameter), self.offset[name])

    def scale(self, factor: float) -> None:
        """Multiplies this rank's share: v, and u where it differs between ranks."""
        self.residual.mul_(factor)
        for name in self.diverged:
            self.flat_momentum(name).mul_(factor)

    def state_dict(self) -> dict[str, object]:
        """Returns views of u and v by name; saving them saves each flat tensor once."""
        momentum = {} if self.momentum is None else {n: self._view(self.momentum, n) for n in self.parameters}
        residual = {name: self._view(self.residual, name) for name in self.compressed}
        return {"momentum": momentum, "residual": residual, "diverged": sorted(self.diverged)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Copies a state_dict's tensors into place; changes nothing unless all of it fits.

        Raises:
            ValueError: names or shapes differ; the message lists them.
        """
        momentum, residual = _tensors(state, "momentum"), _tensors(state, "residual")
        wrong = _differences("residual", residual, {n: self.parameters[n] for n in self.compressed})
        if momentum:
            wrong += _differences("momentum", momentum, self.parameters)
        if wrong:
            raise ValueError(
                "state_dict: expected that of this model and DGCConfig, but " + "; ".join(wrong) + ". Build the model "
                "and the DGCConfig (dense_below, dense_parameters) as they were when it was saved"
            )
        diverged = state.get("diverged")
        if not isinstance(diverged, (list, tuple)) or not set(diverged) <= self.parameters.keys():
            raise ValueError(f"state_dict['diverged']: expected a list of parameter names, got {diverged!r}")
        # In place and without clearing first: the tensors may be views of this very memory.
        for name, tensor in residual.items():
            self._view(self.residual, name).copy_(tensor)
        if momentum:
            flat = self.allocate_momentum()
            for name, tensor in momentum.items():
                self._view(flat, name).copy_(tensor)
        elif self.momentum is not None:
            self.momentum.zero_()
        self.diverged = set(diverged)


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


def _tensors(state: Mapping[str, object], key: str) -> dict[str, Tensor]:
    value = state.get(key)
    if not isinstance(value, Mapping) or not all(isinstance(t, Tensor) for t in value.values()):
        raise ValueError(
            f"state_dict[{key!r}]: expected a dict of tensors by parameter name, got {type(value).__name__}"
        )
    return dict(value)


def _differences(what: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    wrong = []
    if missing := sorted(expected.keys() - got.keys()):
        wrong.append(f"{what} of {', '.join(missing)} is missing")
    if extra := sorted(got.keys() - expected.keys()):
        wrong.append(f"{what} has {', '.join(extra)}, which this model does not")
    wrong += [
        f"{what} of {name} has shape {tuple(got[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected.keys() & got.keys()
        if got[name].shape != expected[name].shape
    ]
    return wrong
