"""The door for Horovod: a compressor that carries the configuration, and the DistributedOptimizer that acts on it.

Both take the places of Horovod's own:

    optimizer = dgc.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = dgc.horovod.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(),
                                                 compression=dgc.horovod.DGCCompressor(dgc.DGCConfig(density=0.001)))
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

try:
    import horovod.torch as hvd
except ImportError as error:
    raise ImportError(
        f"dgc.horovod: expected Horovod with support for this torch, got: {error}. launch/install_horovod.sh builds "
        "and installs Horovod 0.28.1"
    ) from error
from horovod.torch.compression import Compressor
from horovod.torch.optimizer import _DistributedOptimizer as _Horovod
from torch import Tensor
from torch.amp import GradScaler
from torch.optim.optimizer import Optimizer

from . import horovod_elastic
from .config import DGCConfig
from .exchange.horovod_islands import Nodes, exchange_of
from .horovod_state import HorovodState, agreed, fused
from .memory.names import by_name
from .optim.base import DGCOptimizer


class DGCCompressor(Compressor):
    """Says that gradients are to be compressed by DGC, and how: the `compression` of our DistributedOptimizer.

    DGC keeps state for each parameter, which a Horovod Compressor is not told: with plain hvd.DistributedOptimizer the
    first exchange raises.

    Args:
        config: DGCConfig() where it is left out.
        bucket_cap_mb: gradients of so many MiB are compressed and sent together, as in DistributedDataParallel.

    Raises:
        ValueError: bucket_cap_mb is not positive.
    """

    def __init__(self, config: DGCConfig | None = None, *, bucket_cap_mb: float = 25.0) -> None:
        """Checks the arguments; see the class."""
        if not bucket_cap_mb > 0:
            raise ValueError(f"bucket_cap_mb: expected a number > 0, got {bucket_cap_mb!r}")
        self.config = config or DGCConfig()
        """How gradients are compressed."""
        self.bucket_cap_mb = bucket_cap_mb
        """MiB of gradients that are compressed and sent together."""

    def __repr__(self) -> str:
        """Says how gradients are to be compressed."""
        return f"DGCCompressor({self.config}, bucket_cap_mb={self.bucket_cap_mb:g})"

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Any]:
        """Raises RuntimeError: only hvd.DistributedOptimizer calls it."""
        raise RuntimeError(
            "DGCCompressor: expected DGC's DistributedOptimizer, got Horovod's own, which knows no residual. Write\n"
            "    import dgc.horovod as dgc_hvd\n"
            "    optimizer = dgc_hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(),\n"
            "                                             compression=dgc_hvd.DGCCompressor(dgc.DGCConfig(...)))"
        )

    @staticmethod
    def decompress(tensor: Tensor, ctx: Any) -> Tensor:
        """Returns the tensor: it is reduced and dense."""
        return tensor


def DistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: DGCCompressor = DGCCompressor(),  # noqa: B008  (it has no state)
    backward_passes_per_step: int = 1,
    op: int = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | list[list[Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: Any = hvd.global_process_set,
    *,
    grad_scaler: GradScaler | None = None,
    nodes: Nodes | None = None,
) -> Any:
    """Wraps an optimizer so that step() applies gradients that DGC has reduced: hvd.DistributedOptimizer, compressed.

    Behaves as Horovod's own (synchronize, skip_synchronize, the guard of zero_grad, several backward passes a step).
    Like that, it takes over the parameter groups, and the given optimizer is not to be used any more. Its DGCState
    (stats, state_dict, dense, discard) is `dgc_state`. All processes of the set must call this, except in an elastic
    run, where they compare their configurations at the first exchange.

    Args:
        optimizer: dgc.SGD or dgc.AdamW; or one without momentum, for plain accumulation.
        named_parameters: model.named_parameters(). Names are the state's, and those of the collectives.
        compression: with the DGCConfig.
        backward_passes_per_step: gradients are summed locally over so many backward passes before they are compressed.
        op: hvd.Average or hvd.Sum.
        gradient_predivide_factor: for gradients that are sent dense, as in Horovod; compressed ones are summed in
            float32, where it makes no difference.
        num_groups: Horovod's older name of groups.
        groups: how many groups of parameters travel together, or lists of those that do. None: by
            DGCCompressor.bucket_cap_mb.
        sparse_as_dense: has to be False.
        process_set: exchange among these processes only. In any other process DGC runs by itself.
        grad_scaler: the torch.amp.GradScaler that scales the loss; see DGCState.
        nodes: makes each node a worker (docs/islands.md). "auto": the processes of a host, after
            hvd.init(process_sets="dynamic"); or two process sets, of this node and of the same place in all nodes.

    Returns:
        An optimizer of the given one's class, with Horovod's methods and the attribute `dgc_state`.

    Raises:
        ValueError: an argument that DGC cannot honour, or Horovod's and DGCState's own checks.
        TypeError: compression is not a DGCCompressor.
    """
    if not isinstance(compression, DGCCompressor):
        raise TypeError(
            f"compression: expected a DGCCompressor, such as dgc.horovod.DGCCompressor(dgc.DGCConfig()), got "
            f"{compression!r}. Without DGC, use horovod.torch.DistributedOptimizer"
        )
    if op not in (hvd.Average, hvd.Sum):
        raise ValueError(
            f"op: expected hvd.Average or hvd.Sum, got {'hvd.Adasum' if op == hvd.Adasum else op}. DGC adds up what "
            "ranks send; Adasum weighs whole gradients by their angles, which sparse ones of different entries do not "
            "have"
        )
    if sparse_as_dense:
        raise ValueError(
            "sparse_as_dense: expected False, got True. DGC accumulates dense gradients: create the embedding with "
            "sparse=False"
        )
    if gradient_predivide_factor != 1.0 and op != hvd.Average:
        raise ValueError("gradient_predivide_factor: expected 1 unless op is hvd.Average, whose division it splits")
    if not backward_passes_per_step > 0:
        raise ValueError(f"backward_passes_per_step: expected an integer > 0, got {backward_passes_per_step!r}")
    if num_groups:
        warnings.warn("num_groups: Horovod calls it groups now", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    if process_set.process_set_id is None:
        raise ValueError(
            f"process_set: expected a registered one, got {process_set}. Pass it to hvd.init(process_sets=[...]), or "
            "call hvd.add_process_set()"
        )
    named = None if named_parameters is None else list(named_parameters)

    parent: Any = type(optimizer)  # mypy takes no type for hashable
    distributed: Any = _class_of(parent)(
        params=optimizer.param_groups,
        named_parameters=named,
        compression=compression,
        backward_passes_per_step=backward_passes_per_step,
        op=op,
        gradient_predivide_factor=gradient_predivide_factor,
        groups=groups,
        sparse_as_dense=False,
        process_set=process_set,
    )
    distributed.defaults = optimizer.defaults
    distributed.state.update(optimizer.state)
    if not process_set.included():
        distributed.process_set = _Alone()  # or synchronize() would leave out what DGC does by itself
    distributed._groups = None  # hooks then ask for each parameter; Fusion puts them together

    names = distributed._parameter_names
    held = [p for group in distributed.param_groups for p in group["params"]]
    ids = set(map(id, held))
    pairs = [(name, p) for name, p in named if id(p) in ids] if named is not None else [(names[p], p) for p in held]
    trained = by_name(pairs)
    ours = {p: name for name, p in trained.items()}
    distributed._grouping = [[ours[p] for p in g if p in ours] for g in groups] if isinstance(groups, list) else groups
    compared = agreed(distributed, trained, fused(distributed, trained))
    exchange = exchange_of(held[0].device, process_set, nodes, gradient_predivide_factor, compared)
    state = HorovodState(
        pairs,
        distributed,
        compression.config,
        grad_scaler=grad_scaler,
        exchange=exchange,
        average=op == hvd.Average,
    )
    state.connect()  # with one process too, where Horovod has no hooks
    return distributed


@functools.cache
def _class_of(parent: type[Optimizer]) -> Any:
    """Returns, as Horovod does, one class with the methods of both, since these call super(self.__class__, self)."""
    methods = {k: v for k, v in vars(_Methods).items() if not k.startswith("__")}
    if issubclass(parent, DGCOptimizer):
        methods["_step_supports_amp_scaling"] = property(_answer_grad_scaler)
    return type(parent.__name__, (parent, horovod_elastic.Compressed), {**vars(_Horovod), **methods})


def _answer_grad_scaler(optimizer: Any) -> bool:
    """Answers GradScaler.step(), before it unscales; see dgc.SGD.

    Raises:
        RuntimeError: gradients are being reduced.
    """
    if optimizer._handles:
        raise RuntimeError(
            "GradScaler.step: expected reduced gradients, got some that are under way. Write\n"
            "    optimizer.synchronize()\n"
            "    with optimizer.skip_synchronize():\n"
            "        scaler.step(optimizer)"
        )
    return DGCOptimizer._step_supports_amp_scaling.fget(optimizer)  # type: ignore[attr-defined, no-any-return]


class _Alone:
    """A stand-in for a process set that this process is not in."""

    def included(self) -> bool:
        return True


class _Methods:
    """Methods that replace Horovod's; `self` is an object of the class that DistributedOptimizer makes."""

    def _register_hooks(self: Any) -> None:
        """Does nothing: HorovodState registers them, once everything has been checked."""

    def _allreduce_grad_async(self: Any, p: Tensor) -> tuple[Callable[[], Tensor], None]:
        self._synchronized = False
        try:
            return self._fusion.add(p), None
        except Exception:
            self._start_afresh()
            raise

    def _start_afresh(self: Any) -> None:
        """Forgets a backward pass that broke off; dgc_state takes back its sent entries."""
        self._handles.clear()
        self._synchronized = False
        self.set_backward_passes_per_step(self.backward_passes_per_step)
        self._fusion.reset()
        self._fusion.forget()

    def synchronize(self: Any) -> None:
        """Waits until all gradients are reduced; at once, where they are.

        Raises:
            HorovodInternalError: a process is gone.
            RuntimeError: a rank sent what does not fit. Nothing is applied; dgc_state.discard() goes on.
        """
        if self._synchronized and not self._handles:
            return  # again, by a step() without skip_synchronize(): their average is what they are
        try:
            _Horovod.synchronize(self)
            self._fusion.forget()
        except Exception:
            self._start_afresh()
            raise

    def step(self: Any, closure: Callable[[], float] | None = None) -> float | None:
        """Waits for the reduced gradients and applies them; a closure runs first, with its backward pass."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _Horovod.step(self)
        return loss

    # torch would call hooks of step() around this one too, before the gradients are reduced.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self: Any, set_to_none: bool = True) -> None:
        """Sets gradients to None or zero, unless they are being reduced.

        Raises:
            AssertionError: backward() was called since, but neither step() nor synchronize().
        """
        if self._handles or set_to_none:
            _Horovod.zero_grad(self)
        else:
            super(self.__class__, self).zero_grad(set_to_none=False)  # type: ignore[misc]

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        """Loads the optimizer's own state, and forgets a backward pass that broke off."""
        self._start_afresh()
        super(self.__class__, self).load_state_dict(state_dict)  # type: ignore[misc]


horovod_elastic.register()
__all__ = ["DGCCompressor", "DistributedOptimizer"]
