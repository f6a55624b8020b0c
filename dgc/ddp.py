"""The door for DistributedDataParallel: a communication hook, and what only the DDP module knows.

No `from __future__ import annotations` here: DDP compares the hook's annotations with the types themselves.
"""

import functools
import gc
import sys
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from .copied import Copy
from .exchange.base import Exchange
from .exchange.distributed import is_alive
from .memory.slots import Gradients, Slot


class Reducer(Protocol):
    """The part of DGCState that the hook uses."""

    @property
    def exchange(self) -> Exchange:
        """The collectives of the ranks."""

    @property
    def detached(self) -> bool:
        """Whether gradients are averaged densely again."""

    follower: "Reducer | None"
    """The state that was attached after this one was detached, since DDP keeps its first hook."""

    @property
    def keeps_state(self) -> bool:
        """Whether the optimizer keeps state between steps, which a rank without step() would miss."""

    @property
    def model(self) -> DistributedDataParallel | None:
        """The DDP module whose gradients come; None where it is unknown or gone."""

    def bind(self, model: nn.Module) -> DistributedDataParallel:
        """Checks a DDP module, takes its process group, and returns the module."""

    def slot(self, parameter: Tensor) -> Slot:
        """Returns where a parameter lies in memory."""

    def begin(self, shadow: bool = False) -> None:
        """Begins a backward pass."""

    def reduce(self, gradients: Gradients) -> Future[Tensor]:
        """Reduces one bucket of gradients in place."""

    def end(self) -> None:
        """Ends a backward pass."""


def dgc_hook(
    state: Reducer,
    bucket: dist.GradBucket,
    *rest: object,
) -> torch.futures.Future[torch.Tensor]:
    """Reduces one DDP bucket; the hook that `state.register(model)` registers on a DDP module.

    Args:
        state: a DGCState, made of this model's named_parameters().
        bucket: from DDP; its buffer receives the result.
        rest: nothing. A caller other than DDP may pass more, and is refused.

    Returns:
        A future of the buffer.

    Raises:
        TypeError: state is no DGCState, or bucket none of DDP's.
        ValueError: the bucket holds a sparse gradient, or a parameter that the state does not know; DDP has another
            group or other parameters than the state; or join() is used with an optimizer that keeps momentum or other
            state.
        RuntimeError: a second backward pass before optimizer.step() has taken the first one's gradients.
    """
    _check_arguments(state, bucket, rest)
    # Where the whole step is compiled, Dynamo traces this thread, and would trace the hook too. Its import takes a
    # second, so it is disabled only if it has been imported already.
    reduce = _without_dynamo() if "torch._dynamo" in sys.modules else _reduce
    return reduce(state, bucket)


@functools.cache
def _without_dynamo() -> Callable[[Reducer, dist.GradBucket], Future[Tensor]]:
    disabled: Callable[[Reducer, dist.GradBucket], Future[Tensor]] = torch.compiler.disable(_reduce)
    return disabled


def _reduce(state: Reducer, bucket: dist.GradBucket) -> Future[Tensor]:
    while state.follower is not None:
        state = state.follower
    if state.detached:
        return _averaged(state, bucket)
    buffer = bucket.buffer()
    if buffer.layout != torch.strided:
        raise ValueError(
            "dgc_hook: expected dense gradients, got a sparse one (nn.Embedding(sparse=True)?): use sparse=False"
        )
    parameters = bucket.parameters()
    # DDP packs a bucket without gaps.
    starts = accumulate((p.numel() for p in parameters), initial=0)
    places = [(0, start) for start, _ in zip(starts, parameters, strict=False)]
    # On a rank that has run out of data, DDP's join() calls the hook with zero gradients, outside of any backward pass.
    # That rank keeps sending its residual, and no step() follows there.
    shadow = torch._C._current_graph_task_id() == -1
    if bucket.index() == 0:
        if state.exchange.changed:
            for model in registered_on(state):
                if is_alive(model.process_group):
                    state.bind(model)
        _check_join(state, shadow)
        state.begin(shadow)
    future = state.reduce(Gradients([state.slot(p) for p in parameters], [buffer], places))
    if bucket.is_last():
        state.end()
    return future


def _averaged(state: Reducer, bucket: dist.GradBucket) -> Future[Tensor]:
    """Averages a bucket densely, as DDP without a hook does, since it keeps its hook for good."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook  # takes long to import

    # It takes the default group for None, whatever its annotation says.
    group: Any = None if state.model is None else state.model.process_group
    return allreduce_hook(group, bucket)


def register(state: Reducer, model: DistributedDataParallel) -> None:
    """Registers the hook on a DDP module, once; see DGCState.register."""
    hooks = list(model._comm_hooks)
    for _, before in hooks:
        if before is not state and getattr(before, "detached", False):
            cast("Reducer", before).follower = state
            model._comm_hooks[:] = [(dgc_hook, state)]
            return
    if all(its_state is not state for _, its_state in hooks):
        try:
            model.register_comm_hook(state, dgc_hook)
        except RuntimeError as error:
            model._comm_hooks[:] = hooks  # DDP lists it before it looks
            raise ValueError(
                f"register: expected a DDP module without a hook, got one that has one: {error}. DDP takes one hook "
                "only: leave out _register_builtin_comm_hook(), or wrap the module in DistributedDataParallel again"
            ) from error
        return
    # An unpickled module has the list of its hooks, and a new reducer without them.
    model._comm_hooks.clear()
    try:
        model.register_comm_hook(state, dgc_hook)
    except RuntimeError as error:
        model._comm_hooks[:] = hooks
        if "only be called once" not in str(error):
            raise


def check_module(state: object, model: object, parameters: Mapping[str, Tensor]) -> DistributedDataParallel:
    """Returns a DDP module whose gradients a state can reduce.

    Args:
        state: the DGCState.
        model: the argument of register().
        parameters: the state's, by name.

    Raises:
        TypeError: it is no DDP module.
        ValueError: DDP reduces more or fewer parameters than the state has; or it has another hook.
    """
    if not isinstance(model, DistributedDataParallel):
        compiled = getattr(model, "_orig_mod", None)
        hint = (
            "Pass the module inside: model._orig_mod"
            if compiled is not None
            else ("Wrap it first: model = DistributedDataParallel(net), or shard it by fully_shard (FSDP2)")
        )
        raise TypeError(
            f"register: expected a DistributedDataParallel module, or one sharded by fully_shard, got "
            f"{type(model).__name__}. {hint}"
        )
    if model._use_python_reducer:
        raise ValueError(
            'register: expected a DDP module with buckets, got one made under optimize_ddp="python_reducer", which '
            'exchanges single gradients. Set torch._dynamo.config.optimize_ddp to True or "ddp_optimizer" before the '
            "model is wrapped"
        )
    if others := [
        hook.__qualname__
        for hook, its_state in model._comm_hooks
        if its_state is not state and not getattr(its_state, "detached", False)
    ]:
        raise ValueError(
            f"register: expected a DDP module without a hook, got one with {others[0]} and a state of its own, and DDP "
            "takes one hook only. Wrap the module in DistributedDataParallel again"
        )
    inside = {id(p) for p in model.module.parameters()}
    ignored = {id(p) for name, p in model.module.named_parameters() if name in model.parameters_to_ignore}
    reasons = {
        "outside of the module that DDP wraps": [n for n, p in parameters.items() if id(p) not in inside],
        "ignored or delayed by DDP": [n for n, p in parameters.items() if id(p) in ignored],
    }
    if wrong := [f"{', '.join(names)} ({why})" for why, names in reasons.items() if names]:
        raise ValueError(
            f"register: expected every parameter of named_parameters in what DDP reduces, but not {'; '.join(wrong)}: "
            "each rank would apply its own gradient. One DGCState serves one DDP module: put everything that is "
            "trained with this optimizer into the module that DDP wraps, or give the rest an optimizer of its own"
        )
    known = {id(p) for p in parameters.values()}
    if unknown := [
        name
        for name, p in model.module.named_parameters()
        if p.requires_grad and id(p) not in known and id(p) not in ignored
    ]:
        raise ValueError(
            f"register: expected a DGCState made of all that DDP reduces, but not of {', '.join(unknown)}. Pass "
            "model.named_parameters(), and one optimizer that holds them all, in parameter groups where they differ"
        )
    return model


def holding(parameters: Mapping[str, Tensor]) -> DistributedDataParallel | None:
    """Returns a DDP module that reduces some of these parameters; None without one. It searches all objects."""
    known = {id(p) for p in parameters.values()}

    def found() -> DistributedDataParallel | None:
        modules = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
        return next((m for m in modules if any(id(p) in known for p in m.parameters())), None)

    if found() is not None:
        gc.collect()  # it may be one that nobody holds any more
    return found()


def ranks_of(model: DistributedDataParallel) -> list[int]:
    """Returns the ranks of a DDP module's group, by their numbers in the default group."""
    return dist.get_process_group_ranks(model.process_group)


def registered_on(state: object) -> list[DistributedDataParallel]:
    """Returns the DDP modules on which a hook with this state is registered.

    DDP does not tell the hook which module calls it, but lists hook and state in the module. The search through all
    objects takes about 50 ms, so backward passes do it only while the group is unknown, as at the first one.
    """
    return [
        module
        for module in gc.get_objects()
        if issubclass(type(module), DistributedDataParallel)
        and any(its_state is state for _, its_state in getattr(module, "_comm_hooks", ()))
    ]


def _check_join(state: Reducer, shadow: bool) -> None:
    model = state.model
    joining = model is not None and model._join_config.enable and not model._join_config.throw_on_early_termination
    if (shadow or joining) and state.keeps_state:
        raise ValueError(
            "DistributedDataParallel.join: expected an optimizer that keeps nothing between steps, got one that keeps "
            "momentum or other state: a rank that runs out of data takes no step, so its state of dense parameters "
            "stays behind and replicas part. Give every rank as many batches (DistributedSampler does), use "
            "join(throw_on_early_termination=True), or dgc.SGD without momentum"
        )


def _check_arguments(state: Any, bucket: Any, rest: tuple[object, ...]) -> None:
    """Checks that DDP itself calls the hook, and with a DGCState.

    Raises:
        TypeError: the caller or the state is another one; the message names it and the remedy.
    """
    if isinstance(state, Copy):
        state.reduce  # noqa: B018  (says what to do)
    if not (callable(getattr(state, "reduce", None)) and callable(getattr(state, "bind", None))):
        raise TypeError(
            f"dgc_hook: expected a DGCState, got {type(state).__name__}. Write\n"
            "    state = dgc.DGCState(model.named_parameters(), optimizer, config)\n"
            "    state.register(model)"
        )
    if isinstance(bucket, dist.GradBucket) and not rest:
        return
    if isinstance(bucket, tuple):
        raise TypeError(
            "dgc_hook: expected DDP's buckets, got single gradients from its Python reducer. Set "
            'torch._dynamo.config.optimize_ddp to True or "ddp_optimizer", in place of "python_reducer"'
        )
    raise TypeError(
        f"dgc_hook: expected a bucket from DistributedDataParallel, got {type(bucket).__name__}. FSDP1 hands a hook "
        "flat shards, without the parameters that DGC keeps its residual for. Shard the model by fully_shard (FSDP2), "
        "and call state.register(model) in place of this hook"
    )
